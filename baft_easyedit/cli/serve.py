"""The commands `serve`, for programs by OpenAI's API, and `ui`, for people in a browser."""

import argparse
import socket
from argparse import ArgumentTypeError
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from baft_easyedit.cli.console import note
from baft_easyedit.cli.model import add_model_options, add_other_model_option, begun, load
from baft_easyedit.cli.options import existing, new, whole
from baft_easyedit.files.messages import short
from baft_easyedit.model.named import check_names
from baft_easyedit.model.prompt_format import PromptFormat
from baft_easyedit.storage.loading import attach_named, kept_hparams
from baft_easyedit.storage.reading import read_latest


def add_commands(commands: Any) -> None:
    """Add the commands."""
    serve = commands.add_parser("serve", help="answer by OpenAI's API, with kept edits")
    serve.add_argument(
        "edits", nargs="+", type=_named, metavar="[NAME=]DIR", help="kept edits of one model"
    )
    add_model_options(serve, begins=False)
    add_other_model_option(serve)
    serve.add_argument("--host", default="127.0.0.1", help="address to listen at (%(default)s)")
    serve.add_argument("--port", type=whole(0), default=8000, help="(%(default)s); 0: any")
    serve.add_argument(
        "--queue", type=whole(1), default=16, help="requests that may run or wait (%(default)s)"
    )
    serve.add_argument(
        "--max-body", type=whole(1), default=2**20, help="bytes of a request (%(default)s)"
    )
    serve.set_defaults(run=_serve)

    ui = commands.add_parser("ui", help="a page to ask and change a kept edit in a browser")
    where = "of the kept edit, begun if there is none; for this call only if absent"
    ui.add_argument("directory", nargs="?", type=new("directory"), metavar="DIR", help=where)
    add_model_options(ui)
    ui.add_argument("--host", default="127.0.0.1", help="address to listen at (%(default)s)")
    ui.add_argument("--port", type=whole(1), help="the first free one from 7860 on, if absent")
    ui.set_defaults(run=_ui)


def _named(text: str) -> tuple[str, Path]:
    """Read `NAME=DIR`, or a directory whose own name is the edit's; return name and path."""
    name, sign, directory = text.partition("=")
    if not sign or not name or Path(text).is_dir():
        name, directory = "", text
    path = existing("directory")(directory)
    name = name or path.resolve().name
    try:
        check_names([name])
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from None
    return name, path


def _serve(arguments: argparse.Namespace) -> None:
    """Serve until interrupted."""
    directories = dict(arguments.edits)
    if len(directories) < len(arguments.edits):
        names = [name for name, _ in arguments.edits]
        raise ValueError(f"each edit must have a name of its own, as in NAME=DIR; got {names}")
    for directory in directories.values():
        read_latest(directory)  # an error if nothing is kept there
    _check_address(arguments.host, arguments.port)
    try:
        import uvicorn

        from baft_easyedit.serving.answering import Answerer, Queue
        from baft_easyedit.serving.app import make_app
    except ImportError as error:
        raise ImportError(f"serve needs the extra 'serve' ({error}): install it by pip") from None
    queue = Queue(arguments.queue)
    arguments.directory = arguments.edits[0][1]
    model, tokenizer = load(arguments)
    edits = attach_named(model, directories, arguments.allow_other_model)
    formats = {n: PromptFormat.of(kept_hparams(d, model)) for n, d in directories.items()}
    answerer = Answerer(model, tokenizer, edits)
    app = make_app(answerer, formats, queue, arguments.max_body)
    uvicorn.run(app, host=arguments.host, port=arguments.port)


def _ui(arguments: argparse.Namespace) -> None:
    """Serve the page until interrupted; a change that runs then is kept first."""
    _check_address(arguments.host, arguments.port)
    try:
        from baft_easyedit.page.blocks import launch
        from baft_easyedit.page.desk import Desk
    except ImportError as error:
        raise ImportError(f"ui needs the extra 'ui' ({error}): install it by pip") from None
    kept: Any = arguments.directory
    with nullcontext(kept) if kept else TemporaryDirectory(prefix="baft-") as place:
        arguments.directory = directory = Path(place)
        with begun(arguments) as editor:
            desk = Desk(editor, directory)
            page = launch(desk, arguments.host, arguments.port)
            try:
                note(f"a page at {page.local_url} of {directory}; Ctrl-C ends it")
                page.block_thread()
            finally:
                desk.lock.acquire()


def _check_address(host: str, port: int | None) -> None:
    """Raise ValueError if nothing can listen there: servers tell it late, or try for minutes."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        socket.create_server((host, port or 0), family=family).close()
    except (OSError, OverflowError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise ValueError(
            f"--host and --port must be an address of this machine that is free; got {short(host)} "
            f"and {port}: {why}"
        ) from None
