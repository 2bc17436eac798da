"""The bridge to EasyEdit: the only part that imports `easyeditor`, and only when asked.

`register()` finds EasyEdit (a clone named by EASYEDIT_HOME, or an installed one), imports it and
adds the methods BaFT and ReFT. Nothing happens at import.
"""

from baft_easyedit.easyedit.host import Host, find_host, load_host
from baft_easyedit.easyedit.plugin import register

__all__ = ["Host", "find_host", "load_host", "register"]
