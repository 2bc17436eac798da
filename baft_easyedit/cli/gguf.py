"""`import-gguf`: a GGUF file as a model that can be edited."""

import argparse
from typing import Any

from baft_easyedit.cli.console import silence_loading
from baft_easyedit.cli.options import DTYPES, existing_file, new_directory


def add_commands(commands: Any) -> None:
    """Describe the command."""
    gguf = commands.add_parser(
        "import-gguf", help="convert a GGUF file to a Hugging Face directory, for --model"
    )
    gguf.add_argument("file", type=existing_file, metavar="FILE")
    gguf.add_argument("directory", type=new_directory, metavar="DIR", help="new or empty")
    gguf.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="of the weights (%(default)s)"
    )
    gguf.set_defaults(run=_import)


def _import(arguments: argparse.Namespace) -> None:
    """Convert, and say where the model is."""
    import torch

    from baft_easyedit.gguf.conversion import import_gguf

    silence_loading()
    dtype = getattr(torch, arguments.dtype)
    print(import_gguf(arguments.file, arguments.directory, dtype))
