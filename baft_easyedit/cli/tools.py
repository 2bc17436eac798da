"""The commands `ls`, `validate` and `doctor`, which list and check, and `import-gguf`."""

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from baft_easyedit.cli.console import note, silence_loading
from baft_easyedit.cli.edits_file import read_benchmark, read_requests
from baft_easyedit.cli.model import given
from baft_easyedit.cli.options import DTYPES, existing, new
from baft_easyedit.files.reading import read_yaml
from baft_easyedit.files.resources import BUNDLED_MODEL, REAL_MODEL, hparams_file, presets
from baft_easyedit.hparams import read_hparams

_LISTS = ("presets", "methods", "kinds", "models")
_OF_OTHER_KINDS = (".txt", ".tsv", ".xls", ".xlsx", ".parquet")
"""Suffixes of what may hold edits, but is not read. A preset's name may end in any other."""
_OWN_MODELS = (BUNDLED_MODEL, REAL_MODEL)  # any other name is one on the Hub


def add_commands(commands: Any) -> None:
    """Add the commands."""
    gguf = commands.add_parser(
        "import-gguf", help="convert a GGUF file to a Hugging Face directory, for --model"
    )
    add = gguf.add_argument
    add("file", type=existing("file"), metavar="FILE")
    add("directory", type=new("directory"), metavar="DIR", help="new or empty")
    add("--dtype", choices=DTYPES, default="float32", help="of the weights (%(default)s)")
    gguf.set_defaults(run=_import)

    ls = commands.add_parser("ls", help="list what there is to choose from")
    ls.add_argument("list", choices=_LISTS, nargs="?", help="one list; all if absent")
    ls.set_defaults(run=_ls)

    validate = commands.add_parser(
        "validate", help="check settings, a benchmark or a file of edits, and load no model"
    )
    add = validate.add_argument
    add("file", metavar="FILE", help="YAML, or the name of one; JSON, JSON lines or CSV of edits")
    add("--kind", help="FILE is a benchmark's, or its directory: a kind that `ls` lists")
    add("--data", type=existing(), help="the records of a benchmark")
    add("--model", help="of a benchmark, whose file may name none")
    validate.set_defaults(run=_validate)

    doctor = commands.add_parser("doctor", help="say which EasyEdit was found and what works")
    doctor.set_defaults(run=_doctor)


def _import(arguments: argparse.Namespace) -> None:
    """Convert a GGUF file, and print the directory of the model."""
    import torch

    from baft_easyedit.gguf.conversion import import_gguf

    silence_loading()
    dtype = getattr(torch, arguments.dtype)
    print(import_gguf(arguments.file, arguments.directory, dtype))


def _ls(arguments: argparse.Namespace) -> None:
    """Print one list, or all."""
    from baft_easyedit.bench.data import DATASETS
    from baft_easyedit.easyedit.peers import PEERS
    from baft_easyedit.hparams import OUR_METHODS

    found: list[Iterable[str]] = [presets(), [*OUR_METHODS, *PEERS], DATASETS, _OWN_MODELS]
    for name, content in zip(_LISTS, found, strict=True):
        if arguments.list in (None, name):
            print(f"{name}:", *content, sep="\n  ")


def _validate(arguments: argparse.Namespace) -> None:
    """Check a file of settings, of a benchmark, or of edits; print what it holds."""
    file = Path(arguments.file)
    suffix = file.suffix.lower()
    if arguments.kind is not None:
        print(f"{len(read_benchmark(arguments.kind, file))} edits, all usable")
    elif suffix in (".json", ".jsonl", ".csv") or file.is_dir():
        print(f"{len(read_requests(file))} edits, all usable")
    elif suffix in _OF_OTHER_KINDS:
        raise ValueError(
            "FILE must be YAML (.yaml), or edits as JSON (.json), JSON lines (.jsonl) or CSV "
            f"with commas (.csv); the name {arguments.file!r} says otherwise: convert or rename it"
        )
    elif "methods" in read_yaml(hparams_file(arguments.file), "settings"):
        _validate_bench(arguments)
    else:
        hparams = read_hparams(arguments.file)
        print(f"settings of {hparams.alg_name} for {hparams.model_name}, all usable")


def _validate_bench(arguments: argparse.Namespace) -> None:
    """Check a benchmark's file, its records, and the settings of its rows."""
    from baft_easyedit.bench.config import read_config
    from baft_easyedit.bench.run import check

    data = {} if arguments.data is None else {"path": str(arguments.data)}
    asked = {"data": data, "device": "cpu", **given(arguments, "model")}
    config = read_config(arguments.file, asked)
    dataset = check(config)
    for text in dataset.notes:
        note(text)
    rows = ", ".join(method.name for method in config.methods)
    print(f"benchmark of {len(dataset.requests)} records by {rows}; T = {list(config.T)}, usable")


def _doctor(_arguments: argparse.Namespace) -> int:
    """Print what `doctor` finds; the status is 1 if EasyEdit cannot be used."""
    from baft_easyedit.easyedit.doctor import doctor

    report, is_usable = doctor()
    print(report)
    return 0 if is_usable else 1
