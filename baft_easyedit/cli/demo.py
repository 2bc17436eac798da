"""The command `demo`: example edits of two models, then tables of BaFT beside other methods."""

import argparse
from dataclasses import replace
from typing import Any

from baft_easyedit.cli.console import Bar, silence_loading, status_of
from baft_easyedit.cli.model import add_model_options, hparams_of
from baft_easyedit.cli.options import names, whole


def add_commands(commands: Any) -> None:
    """Add the command."""
    demo = commands.add_parser(
        "demo", help="edits shown as text, then BaFT beside other methods through EasyEdit"
    )
    add_model_options(demo)
    add = demo.add_argument
    add("--methods", type=names, default=[], help="comma-separated list; all it knows if absent")
    add("--cases", type=whole(1), default=30, help="single edits per method (%(default)s)")
    add("--jobs", type=whole(1), default=2, help="methods run at once (%(default)s)")
    demo.set_defaults(run=_demo)


def _demo(arguments: argparse.Namespace) -> int:
    """Show a few edits, then the tables."""
    from baft_easyedit.demo import bundled
    from baft_easyedit.easyedit import find_host

    methods = bundled.check_methods(arguments.methods)
    silence_loading()
    hparams, host = hparams_of(arguments), find_host()
    if (arguments.model, arguments.hparams) == (None, None):
        _show_real_edits(hparams.device)
        print("\nThe bundled model, of 3 million parameters:")
    # The tables use the paper's settings; these answers are generated, so their end is learned.
    shown = hparams if arguments.hparams else replace(hparams, learn_end=True)
    for line in bundled.show_edits(shown):
        print(line)
    print(f"\nThrough EasyEdit ({host.generation}, {host.version}) and its own evaluators:")
    with Bar() as bar:
        rows = bundled.compare(hparams, methods, arguments.cases, arguments.jobs, bar.start)
    for line in bundled.tables(rows, arguments.cases):
        print(line)
    return status_of(rows)


def _show_real_edits(device: int | str) -> None:
    """Show edits of SmolLM2, or say why it cannot be used."""
    from baft_easyedit.demo.real import real_settings, show_real_edits

    try:
        settings = real_settings(device)
    except (ImportError, ValueError, OSError) as error:  # the rest of the demo does not need it
        print(f"No real model, only the bundled one: {error}")
        return
    for line in show_real_edits(settings):
        print(line)
