"""Commands of a kept edit: ask the edited model, apply a file of edits, and take edits back."""

import argparse
import csv
import io
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from baft_easyedit.cli.console import UNLEARNED, Bar, note, silence_loading, told_what_is_kept
from baft_easyedit.cli.model import WITHOUT_FILE, add_model_options, default_device, hparams_of
from baft_easyedit.cli.options import DTYPES, device, existing, new, whole
from baft_easyedit.editor import BaFTEditor
from baft_easyedit.files.messages import short
from baft_easyedit.files.paths import read_text
from baft_easyedit.files.resources import BUNDLED_MODEL, REAL_MODEL, model_location, own_preset
from baft_easyedit.hparams import BaFTHyperParams
from baft_easyedit.model.prompt_format import PromptFormat
from baft_easyedit.storage.journal import Journal
from baft_easyedit.storage.loading import attach, kept_hparams
from baft_easyedit.storage.reading import holds_edit, read_history, read_latest
from baft_easyedit.training.requests import EditRequest, as_requests


def add_commands(commands: Any) -> None:
    """Describe the commands."""
    ask = _add(commands, "ask", _ask, "answer prompts with a kept edit, and without it")
    ask.add_argument(
        "--prompt", action="append", help="may be repeated; without it, each line of the input"
    )
    _add_model(ask)

    apply = commands.add_parser(
        "apply", help="make the edits of a file, and go on where an earlier call stopped"
    )
    apply.add_argument("directory", type=new("directory"), metavar="DIR", help="of the kept edit")
    formats = "requests: a JSON list, JSON lines, or CSV with the columns prompt and target_new"
    apply.add_argument("file", type=existing("file"), metavar="FILE", help=formats)
    add_model_options(apply)
    apply.add_argument("--dtype", choices=DTYPES, default="float32", help="(%(default)s)")
    apply.set_defaults(run=_apply)

    _add_model(_add(commands, "undo", _undo, "take the latest edit of a kept directory back"))
    rollback = _add(commands, "rollback", _rollback, "go to the state after an entry of `history`")
    rollback.add_argument("--to", type=whole(0), required=True, metavar="ID", help="of the entry")
    _add_model(rollback)

    forget = _add(commands, "forget", _forget, "take one fact back, and keep the later ones")
    forget.add_argument("--prompt", required=True, help="of the edit")
    _add_model(forget)

    history = _add(commands, "history", _history, "list what a kept edit went through")
    history.add_argument("--json", action="store_true", help="the journal's lines, for machines")


def _add(commands: Any, name: str, run: Any, help_text: str) -> argparse.ArgumentParser:
    """Add a command on a directory that holds a kept edit."""
    parser: argparse.ArgumentParser = commands.add_parser(name, help=help_text)
    parser.add_argument("directory", type=existing("directory"), metavar="DIR")
    parser.set_defaults(run=run)
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    """Add the options that load the model of a kept edit."""
    parser.add_argument("--model", help="Hugging Face name or directory of the edited model")
    parser.add_argument("--device", type=device, help="CUDA device number, or a name")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="(%(default)s)")


def _ask(arguments: argparse.Namespace) -> None:
    """Answer each prompt by the base model and by the edited one."""
    from baft_easyedit.generation import generate_answers

    if arguments.prompt and not all(map(str.strip, arguments.prompt)):
        raise ValueError("--prompt must not be empty; got a blank one")
    model, tokenizer = _load(arguments)
    edit = attach(model, arguments.directory)
    form = PromptFormat.of(kept_hparams(arguments.directory, model))
    for prompt in arguments.prompt or _typed():
        with edit.disabled():
            (before,) = generate_answers(model, tokenizer, [prompt], prompt_format=form)
        (after,) = generate_answers(model, tokenizer, [prompt], prompt_format=form)
        print(f"{prompt}\n  base:   {before}\n  edited: {after}", flush=True)


def _typed() -> Iterator[str]:
    """Yield the lines of the standard input that hold text; at a terminal, ask for them."""
    if sys.stdin.isatty():
        note("a prompt a line; end with Ctrl-D")
    for line in sys.stdin:
        if line.strip():
            yield line.strip()


def _apply(arguments: argparse.Namespace) -> int:
    """Make the edits of a file that are not made yet; say which were learned."""
    requests = read_requests(arguments.file)
    made = _made(arguments.directory) if holds_edit(arguments.directory) else {}
    rest = [request for request in requests if made.get(request.prompt) != request.to_dict()]
    unlearned = _edit_each(arguments, rest, len(requests)) if rest else []
    print(f"edits made: {len(rest)}; there before: {len(requests) - len(rest)}")
    for request in unlearned:
        print(f"not learned: {short(request.prompt)} -> {short(request.target_new)}")
    return UNLEARNED if unlearned else 0


def _edit_each(
    arguments: argparse.Namespace, rest: Sequence[EditRequest], total: int
) -> list[EditRequest]:
    """Make edits, the last ones of so many in all; return those that were not learned."""
    unlearned = []
    with told_what_is_kept(arguments.directory), _begun(arguments) as editor, Bar() as bar:
        move = bar.start(total, total - len(rest))
        for request in rest:
            report = editor.edit(request.to_dict())
            if not all(report.learned):
                unlearned.append(request)
            move(1)
    return unlearned


def read_requests(file: Path) -> list[EditRequest]:
    """Read edit requests: a JSON list, JSON lines (`.jsonl`), or CSV (`.csv`).

    Empty cells of a CSV file count as absent. A request that is there twice is read once.

    Raises:
        TypeError: If a request has a value of the wrong type.
        ValueError: If the file is none of these, a request is unusable, or one prompt has two
            requests; the message names them.
    """
    text = read_text(file).removeprefix("\ufeff")
    try:
        found = _parsed(text, file.suffix.lower())
    except (ValueError, csv.Error) as error:
        raise ValueError(
            f"{file} must be a JSON list, JSON lines (.jsonl) or CSV (.csv) of requests: {error}"
        ) from None
    if not isinstance(found, list) or not found:
        raise ValueError(f"{file} must hold a list of requests; got {short(found)}")
    by_prompt: dict[str, tuple[int, EditRequest]] = {}
    for number, one in enumerate(found, 1):
        try:
            (request,) = as_requests([one])
        except (TypeError, ValueError) as error:
            raise type(error)(f"request {number} of {file}: {error}") from None
        first, other = by_prompt.setdefault(request.prompt, (number, request))
        if other != request:
            raise ValueError(
                f"{file} must hold one request for a prompt; {short(request.prompt)} has requests "
                f"{first} and {number}: keep one"
            )
    return [request for _, request in by_prompt.values()]


def _parsed(text: str, suffix: str) -> Any:
    """Parse the text of a file by the end of its name."""
    if suffix == ".csv":
        rows = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        columns = rows.fieldnames or ()
        if len(set(columns)) < len(columns):
            raise ValueError("a column is there twice")
        found = [{key: value for key, value in row.items() if value} for row in rows]
        if any(None in row for row in found):
            raise ValueError("a line has more cells than there are columns")
        return found
    if suffix == ".jsonl":
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    return json.loads(text)


def _undo(arguments: argparse.Namespace) -> None:
    """Take the latest edit back."""
    with _opened(arguments) as editor:
        editor.undo()
    print(read_history(arguments.directory)[-1].summary())


def _rollback(arguments: argparse.Namespace) -> None:
    """Go to the state after an entry."""
    with _opened(arguments) as editor:
        editor.rollback(to=arguments.to)
    print(read_history(arguments.directory)[-1].summary())


def _forget(arguments: argparse.Namespace) -> int:
    """Take the edits of one prompt back; say which later ones are not learned any more."""
    before = read_history(arguments.directory)
    with told_what_is_kept(arguments.directory), _opened(arguments) as editor:
        reports = editor.forget(arguments.prompt)
    unlearned = sum(report.learned.count(False) for report in reports)
    print(f"later edits learned again: {len(reports)}; requests of them not learned: {unlearned}")
    back = f"rollback {arguments.directory} --to {before[-1].id}"
    print(f"`baft-easyedit {back}` brings it back")
    return UNLEARNED if unlearned else 0


def _history(arguments: argparse.Namespace) -> None:
    """Print the journal of a kept edit."""
    for entry in read_history(arguments.directory):
        print(entry.line if arguments.json else entry.summary())


def _made(directory: Path) -> dict[str, dict[str, Any]]:
    """Return the latest request of each prompt that led to the present state of a kept edit."""
    journal = Journal(read_history(directory))
    ids = reversed(list(journal.ancestors(journal.position)))
    return {request["prompt"]: request for i in ids for request in journal.entries[i].requests}


@contextmanager
def _opened(arguments: argparse.Namespace) -> Iterator[BaFTEditor]:
    """Open a kept edit with its model."""
    read_latest(arguments.directory)  # an error if nothing is kept there
    model, tokenizer = _load(arguments)
    with BaFTEditor.open(model, tokenizer, arguments.directory) as editor:
        yield editor


@contextmanager
def _begun(arguments: argparse.Namespace) -> Iterator[BaFTEditor]:
    """Open a kept edit with its model, or begin one, with the settings for edits in a row."""
    if arguments.hparams is None and holds_edit(arguments.directory):
        with _opened(arguments) as editor:
            yield editor
        return
    hparams = _settings(arguments)
    given = {"model": hparams.model_name, "device": hparams.device}
    model, tokenizer = _load(argparse.Namespace(**vars(arguments) | given))
    if arguments.hparams is None:
        from baft_easyedit.generation import with_usable_end

        hparams = with_usable_end(replace(hparams, **WITHOUT_FILE), tokenizer)
    with BaFTEditor.open(model, tokenizer, arguments.directory, hparams) as editor:
        yield editor


def _settings(arguments: argparse.Namespace) -> BaFTHyperParams:
    """Return the settings that the options ask for; without, those for edits in a row."""
    name = own_preset(arguments.model or BUNDLED_MODEL)
    if arguments.hparams is None and name is not None:
        place = default_device() if arguments.device is None else arguments.device
        chosen = {"hparams": f"BaFT/{name}-continual", "device": place}
        arguments = argparse.Namespace(**vars(arguments) | chosen)
    return hparams_of(arguments)


def _load(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """Load the model of a kept edit, and its tokenizer.

    Raises:
        ValueError: If the edit does not say where its model is, and no option does.
    """
    import torch

    from baft_easyedit.generation import load_model

    silence_loading()
    name = arguments.model or _known_model(arguments.directory)
    place = default_device() if arguments.device is None else arguments.device
    return load_model(name, place, getattr(torch, arguments.dtype))


def _known_model(directory: Path) -> str:
    """Return `bundled` or `smollm2` if the kept edit is of that; no other name is trusted."""
    base = read_latest(directory).config.base_model
    for name in (BUNDLED_MODEL, REAL_MODEL):
        if base == Path(model_location(name)).name:
            return name
    raise ValueError(f"--model must be given; the edit in {directory} is of {short(base)}")
