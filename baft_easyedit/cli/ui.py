"""The command `ui`: a page on which a kept edit is asked, changed and looked at."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from baft_easyedit.cli.console import note
from baft_easyedit.cli.model import add_model_options, begun
from baft_easyedit.cli.options import check_address, new, whole


def add_commands(commands: Any) -> None:
    """Describe the command."""
    ui = commands.add_parser("ui", help="a page to ask and change a kept edit in a browser")
    where = "of the kept edit, begun if there is none; for this call only if absent"
    ui.add_argument("directory", nargs="?", type=new("directory"), metavar="DIR", help=where)
    add_model_options(ui)
    ui.add_argument("--host", default="127.0.0.1", help="address to listen at (%(default)s)")
    ui.add_argument("--port", type=whole(1), help="the first free one from 7860 on, if absent")
    ui.set_defaults(run=_ui)


def _ui(arguments: argparse.Namespace) -> None:
    """Serve the page until interrupted; a change that runs then is kept first."""
    check_address(arguments.host, arguments.port)
    try:
        from baft_easyedit.page.blocks import launch
        from baft_easyedit.page.desk import Desk
    except ImportError as error:
        raise ImportError(f"ui needs the extra 'ui' ({error}): install it by pip") from None
    with _place(arguments.directory) as directory:
        arguments.directory = directory
        with begun(arguments) as editor:
            desk = Desk(editor, directory)
            page = launch(desk, arguments.host, arguments.port)
            try:
                note(f"a page at {page.local_url} of {directory}; Ctrl-C ends it")
                page.block_thread()
            finally:
                desk.lock.acquire()


@contextmanager
def _place(directory: Path | None) -> Iterator[Path]:
    """Give the directory, or one that is removed at the end."""
    if directory is not None:
        yield directory
        return
    with TemporaryDirectory(prefix="baft-") as scratch:
        yield Path(scratch)
