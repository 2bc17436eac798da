"""The command `speed`: measure time and memory of an edit."""

import argparse
from typing import Any

from baft_easyedit.cli.console import Bar, silence_loading
from baft_easyedit.cli.model import default_device
from baft_easyedit.cli.options import DTYPES, device, names, new, whole


def add_commands(commands: Any) -> None:
    """Add the command; absent options get the defaults of `SpeedOptions`."""
    speed = commands.add_parser(
        "speed",
        help="measure time, memory and generation of an edit",
        argument_default=argparse.SUPPRESS,
    )
    source = speed.add_mutually_exclusive_group()
    source.add_argument("--model", help="Hugging Face name or directory, or bundled")
    source.add_argument(
        "--shape", help="random weights: llama-2-7b, llama-3-8b, gemma-7b, llama-LAYERSxWIDTH"
    )
    add = speed.add_argument
    add("--methods", type=names, help="comma-separated list; BaFT,ReFT if absent")
    add("--data", help="records to edit, such as zsre=DIR; random words if absent")
    add("--start", type=whole(0), help="first of the records; 0 if absent")
    add("--prompt-length", type=whole(4), help="tokens of a prompt of random words; 32 if absent")
    add("--batch-size", type=whole(1), help="requests of an edit call; 1 if absent")
    add("--rank", type=whole(1), help="bases per layer; 12 if absent")
    add("--steps", type=whole(1), help="steps of BaFT and ReFT; 40 if absent")
    add("--repeats", type=whole(1), help="measurements of each row; 5 if absent")
    add("--new-tokens", type=whole(0), help="tokens generated per measurement; 32 if absent")
    add("--threads", type=whole(1), help="CPU threads; torch's choice if absent")
    add("--dtype", choices=DTYPES, help="float32 if absent")
    add("--device", type=device, help="CUDA device number, or a name")
    add("--profile", action="store_true", help="with --out: also write where an edit's time goes")
    add("--out", type=new("file"), help="JSON file")
    speed.set_defaults(run=_speed)


def _speed(arguments: argparse.Namespace) -> None:
    """Measure, and print the table."""
    from baft_easyedit.speed import SpeedOptions, run_speed

    given = {name: value for name, value in vars(arguments).items() if name != "run"}
    given.setdefault("device", default_device())
    if "methods" in given:
        given["methods"] = tuple(given["methods"])
    options = SpeedOptions(**given)
    silence_loading()
    with Bar("row") as bar:
        report = run_speed(options, bar.start)
    for line in (*report.lines(), *report.files):
        print(line)
