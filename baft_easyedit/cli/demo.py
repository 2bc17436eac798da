"""The command `demo`: example edits of two models, then tables of BaFT beside other methods."""

import argparse
from typing import Any

from baft_easyedit.cli.console import Bar, silence_loading, status_of
from baft_easyedit.cli.model import default_device
from baft_easyedit.cli.options import device, names, whole


def add_commands(commands: Any) -> None:
    """Add the command."""
    demo = commands.add_parser(
        "demo", help="edits shown as text, then BaFT beside other methods through EasyEdit"
    )
    add = demo.add_argument
    add("--methods", type=names, default=[], help="comma-separated list; all it knows if absent")
    add("--cases", type=whole(1), default=30, help="single edits per method (%(default)s)")
    add("--jobs", type=whole(1), default=2, help="methods run at once (%(default)s)")
    add("--device", type=device, help="CUDA device number, or a name; the first, or the CPU")
    demo.set_defaults(run=_demo)


def _demo(arguments: argparse.Namespace) -> int:
    """Show a few edits, then the tables."""
    from baft_easyedit import demo
    from baft_easyedit.easyedit import find_host

    place = default_device(arguments.device)
    config = demo.demo_config(arguments.methods, arguments.cases, arguments.jobs, place)
    silence_loading()
    host = find_host()
    _show_real_edits(place)
    print("\nThe bundled model, of 3 million parameters:")
    for line in demo.show_edits(place):
        print(line)
    print(f"\nThrough EasyEdit ({host.generation}, {host.version}) and its own evaluators:")
    with Bar() as bar:
        rows = demo.compare(config, bar.start)
    for line in demo.tables(config, rows):
        print(line)
    return status_of(rows)


def _show_real_edits(place: int | str) -> None:
    """Show edits of SmolLM2, or say why it cannot be used."""
    from baft_easyedit import demo

    try:
        settings = demo.real_settings(place)
    except (ImportError, ValueError, OSError) as error:  # the rest of the demo does not need it
        print(f"No real model, only the bundled one: {error}")
        return
    for line in demo.show_real_edits(settings):
        print(line)
