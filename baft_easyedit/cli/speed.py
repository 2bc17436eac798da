"""`speed`: what an edit costs."""

import argparse
from collections.abc import Callable, Mapping
from typing import Any

from baft_easyedit.cli.console import Bar, silence_loading
from baft_easyedit.cli.model import default_device
from baft_easyedit.cli.options import DTYPES, device, names, new_directory, new_file, whole

_NUMBERS: Mapping[str, tuple[Callable[[str], int], str]] = {
    "--start": (whole(0), "first of the records; 0 if absent"),
    "--prompt-length": (whole(1), "tokens of a prompt of random words; 32 if absent"),
    "--answer-length": (whole(1), "tokens of its answer; 4 if absent"),
    "--batch-size": (whole(1), "requests of an edit call; 1 if absent"),
    "--rank": (whole(1), "bases per layer; 12 if absent"),
    "--repeats": (whole(1), "measurements of each row; 5 if absent"),
    "--new-tokens": (whole(0), "tokens generated per measurement; 32 if absent"),
    "--threads": (whole(1), "CPU threads; torch's choice if absent"),
}


def add_commands(commands: Any) -> None:
    """Describe the command."""
    speed = commands.add_parser("speed", help="measure time, memory and generation of an edit")
    source = speed.add_mutually_exclusive_group()
    source.add_argument("--model", help="Hugging Face name or directory, or bundled")
    source.add_argument(
        "--shape", help="random weights: llama-2-7b, llama-3-8b, gemma-7b, llama-LAYERSxWIDTH"
    )
    speed.add_argument("--methods", type=names, help="comma-separated list; BaFT,ReFT if absent")
    for name, (number, help_text) in _NUMBERS.items():
        speed.add_argument(name, type=number, help=help_text)
    speed.add_argument("--data", help="records to edit, such as zsre=DIR; random words if absent")
    stop = speed.add_mutually_exclusive_group()
    stop.add_argument("--steps", type=whole(1), help="steps of BaFT and ReFT; 40 if absent")
    stop.add_argument("--early-stop", action="store_true", help="stop once an answer is learned")
    speed.add_argument("--dtype", choices=DTYPES, help="float32 if absent")
    speed.add_argument("--device", type=device, help="CUDA device number, or a name")
    speed.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="SETTING=VALUES",
        help="prompt-length=16,32 or rank=, layers=, batch=; may be repeated",
    )
    speed.add_argument(
        "--weights-dir", type=new_directory, help="for random weights that EasyEdit loads"
    )
    speed.add_argument(
        "--one-by-one", action="store_true", help="one model in memory at a time, not in turn"
    )
    speed.add_argument(
        "--profile", action="store_true", help="also write where the time of an edit goes"
    )
    speed.add_argument("--out", type=new_file, help="JSON file, with charts beside it")
    speed.set_defaults(run=_speed)


def _speed(arguments: argparse.Namespace) -> None:
    """Measure what an edit costs; print the table."""
    from baft_easyedit.speed import SpeedOptions, Sweep, run_speed

    given = {k: v for k, v in vars(arguments).items() if k not in ("run", "sweep")}
    options: dict[str, Any] = {k: v for k, v in given.items() if v is not None}
    options.setdefault("device", default_device())
    options["methods"] = tuple(options.get("methods", ("BaFT", "ReFT")))
    options["sweeps"] = tuple(Sweep.parse(text) for text in arguments.sweep)
    silence_loading()
    with Bar("row") as bar:
        report = run_speed(SpeedOptions(**options), bar.start)
    for line in report.lines():
        print(line)
    for file in report.files:
        print(file)
