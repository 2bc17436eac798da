"""The command `serve`: a server with OpenAI's API for a model and its kept edits."""

import argparse
from argparse import ArgumentTypeError
from pathlib import Path
from typing import Any

from baft_easyedit.cli.model import add_model_options, load
from baft_easyedit.cli.options import check_address, existing, whole
from baft_easyedit.model.named import check_names
from baft_easyedit.model.prompt_format import PromptFormat
from baft_easyedit.storage.loading import attach_named, kept_hparams
from baft_easyedit.storage.reading import read_latest


def add_commands(commands: Any) -> None:
    """Add the command."""
    serve = commands.add_parser("serve", help="answer by OpenAI's API, with kept edits")
    serve.add_argument(
        "edits", nargs="+", type=_named, metavar="[NAME=]DIR", help="kept edits of one model"
    )
    add_model_options(serve, begins=False)
    serve.add_argument("--host", default="127.0.0.1", help="address to listen at (%(default)s)")
    serve.add_argument("--port", type=whole(0), default=8000, help="(%(default)s); 0: any")
    serve.add_argument(
        "--queue", type=whole(1), default=16, help="requests that may run or wait (%(default)s)"
    )
    serve.add_argument(
        "--max-body", type=whole(1), default=2**20, help="bytes of a request (%(default)s)"
    )
    serve.set_defaults(run=_serve)


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
    check_address(arguments.host, arguments.port)
    try:
        import uvicorn

        from baft_easyedit.serving.answering import Answerer, Queue
        from baft_easyedit.serving.app import make_app
    except ImportError as error:
        raise ImportError(f"serve needs the extra 'serve' ({error}): install it by pip") from None
    queue = Queue(arguments.queue)
    arguments.directory = arguments.edits[0][1]
    model, tokenizer = load(arguments)
    edits = attach_named(model, directories)
    formats = {n: PromptFormat.of(kept_hparams(d, model)) for n, d in directories.items()}
    answerer = Answerer(model, tokenizer, edits)
    app = make_app(answerer, formats, queue, arguments.max_body)
    uvicorn.run(app, host=arguments.host, port=arguments.port)
