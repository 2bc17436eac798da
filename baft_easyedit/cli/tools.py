"""`import-gguf`: a GGUF file as a model that can be edited; `doctor`: what EasyEdit is here."""

import argparse
from typing import Any

from baft_easyedit.cli.console import silence_loading
from baft_easyedit.cli.options import DTYPES, existing, new


def add_commands(commands: Any) -> None:
    """Describe the commands."""
    gguf = commands.add_parser(
        "import-gguf", help="convert a GGUF file to a Hugging Face directory, for --model"
    )
    add = gguf.add_argument
    add("file", type=existing("file"), metavar="FILE")
    add("directory", type=new("directory"), metavar="DIR", help="new or empty")
    add("--dtype", choices=DTYPES, default="float32", help="of the weights (%(default)s)")
    gguf.set_defaults(run=_import)

    doctor = commands.add_parser("doctor", help="say which EasyEdit was found and what works")
    doctor.set_defaults(run=_doctor)


def _import(arguments: argparse.Namespace) -> None:
    """Convert, and say where the model is."""
    import torch

    from baft_easyedit.gguf.conversion import import_gguf

    silence_loading()
    dtype = getattr(torch, arguments.dtype)
    print(import_gguf(arguments.file, arguments.directory, dtype))


def _doctor(_arguments: argparse.Namespace) -> int:
    """Print what `doctor` finds; the status is 1 if EasyEdit cannot be used."""
    from baft_easyedit.easyedit.doctor import doctor

    report, is_usable = doctor()
    print(report)
    return 0 if is_usable else 1
