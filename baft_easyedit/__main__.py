"""`python -m baft_easyedit` is the command line."""

import sys

from baft_easyedit.cli import main

sys.exit(main())
