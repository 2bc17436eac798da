"""Commands on a kept edit: ask and evaluate its model, apply a file of edits, take edits back."""

import argparse
import json
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

from baft_easyedit.cli.console import UNLEARNED, Bar, note, on_interrupt
from baft_easyedit.cli.edits_file import read_benchmark, read_requests
from baft_easyedit.cli.model import add_model_options, add_other_model_option, begun, load
from baft_easyedit.cli.options import existing, names, new, whole
from baft_easyedit.editor import BaFTEditor
from baft_easyedit.files.messages import printable, short
from baft_easyedit.model.prompt_format import PromptFormat
from baft_easyedit.storage.directory import KeptDirectory
from baft_easyedit.storage.journal import Journal
from baft_easyedit.storage.loading import attach, kept_hparams
from baft_easyedit.storage.reading import holds_edit, read_history, read_latest


def add_commands(commands: Any) -> None:
    """Add the commands."""
    ask = _add(commands, "ask", _ask, "answer prompts with a kept edit, and without it")
    ask.add_argument(
        "--prompt", action="append", help="may be repeated; without it, each line of the input"
    )
    chat = "put prompts into the model's chat template; as the edit was learned if absent"
    ask.add_argument("--chat", action=argparse.BooleanOptionalAction, help=chat)
    longest = "most tokens of an answer (%(default)s)"
    ask.add_argument("--max-new-tokens", type=whole(1), default=32, help=longest)

    score = _add(commands, "eval", _eval, "ask tasks of a kept edit, and without it")
    tasks = "of lm-evaluation-harness, such as piqa,mmlu,gsm8k"
    score.add_argument("--tasks", type=names, required=True, help=tasks)
    further = "directory of further task files"
    score.add_argument("--include-path", type=existing("directory"), help=further)
    score.add_argument("--limit", type=whole(1), help="questions of each task; all if absent")
    score.add_argument("--num-fewshot", type=whole(0), help="examples before a question")
    score.add_argument("--batch-size", type=whole(1), default=8, help="(%(default)s)")
    score.add_argument("--json", action="store_true", help="the scores, for machines")

    add_other_model_option(ask)
    add_other_model_option(score)

    apply = commands.add_parser(
        "apply", help="make the edits of a file, and go on where an earlier call stopped"
    )
    apply.add_argument("directory", type=new("directory"), metavar="DIR", help="of the kept edit")
    formats = "requests: a JSON list, JSON lines, or CSV with the columns prompt and target_new"
    apply.add_argument("file", type=existing(), metavar="FILE", help=formats)
    kind = "FILE is a benchmark's, or its directory; `baft-easyedit ls kinds` lists them"
    apply.add_argument("--kind", help=kind)
    apply.add_argument("--limit", type=whole(1), help="number of edits, from the first on")
    add_model_options(apply)
    apply.set_defaults(run=_apply)

    _add(commands, "undo", _go_back, "take the latest edit of a kept directory back")
    rollback = _add(commands, "rollback", _go_back, "go to the state after an entry of `history`")
    rollback.add_argument("--to", type=whole(0), required=True, metavar="ID", help="of the entry")

    forget = _add(commands, "forget", _forget, "take one fact back, and keep the later ones")
    forget.add_argument("--prompt", required=True, help="of the edit")

    damaged = "go on from the newest intact state of a damaged directory"
    _add(commands, "repair", _repair, damaged, needs_model=False)

    history = _add(commands, "history", _history, "list what a kept edit went through", False)
    history.add_argument("--json", action="store_true", help="the journal's lines, for machines")

    diff = _add(commands, "diff", _diff, "compare the edits at two entries of `history`", False)
    diff.add_argument("a", type=whole(0), metavar="A", help="id of an entry")
    diff.add_argument(
        "b", type=whole(0), metavar="B", help="of another; the present if absent", nargs="?"
    )


def _add(
    commands: Any, name: str, run: Any, help_text: str, needs_model: bool = True
) -> argparse.ArgumentParser:
    """Add a command on a directory that holds a kept edit."""
    parser: argparse.ArgumentParser = commands.add_parser(name, help=help_text)
    parser.add_argument("directory", type=existing("directory"), metavar="DIR")
    if needs_model:
        add_model_options(parser, begins=False)
    parser.set_defaults(run=run)
    return parser


def _ask(arguments: argparse.Namespace) -> None:
    """Answer each prompt with the base model and with the edited model."""
    from baft_easyedit.generation import generate_answers

    if arguments.prompt and not all(map(str.strip, arguments.prompt)):
        raise ValueError("--prompt must not be empty; got a blank one")
    _check_utf8(*arguments.prompt or ())
    model, tokenizer = load(arguments)
    edit = attach(model, arguments.directory, arguments.allow_other_model)
    answer = partial(
        generate_answers,
        model,
        tokenizer,
        max_new_tokens=arguments.max_new_tokens,
        prompt_format=_asked_format(arguments, model, tokenizer),
    )
    for prompt in arguments.prompt or _typed():
        with edit.disabled():
            (before,) = answer([prompt])
        (after,) = answer([prompt])
        print(f"{prompt}\n  base:   {before}\n  edited: {after}", flush=True)


def _asked_format(arguments: argparse.Namespace, model: Any, tokenizer: Any) -> PromptFormat:
    """Return the format of prompts: that of `--chat`, or the one that the edit was learned with."""
    if arguments.chat and not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "--chat needs a tokenizer with a chat template; that of the model has none: leave it "
            "away"
        )
    return PromptFormat.of(kept_hparams(arguments.directory, model)).with_template(arguments.chat)


def _eval(arguments: argparse.Namespace) -> None:
    """Print the scores of the base model and of the edited model in each task."""
    read_latest(arguments.directory)  # an error if nothing is kept there
    from baft_easyedit.harness import EditedLM, Tasks

    given = (arguments.tasks, arguments.include_path, arguments.limit, arguments.num_fewshot)
    tasks = Tasks(*given)
    model, tokenizer = load(arguments)
    edit = attach(model, arguments.directory, arguments.allow_other_model)
    form = PromptFormat.of(kept_hparams(arguments.directory, model))
    template = form.chat_template_kwargs
    lm = EditedLM(model, tokenizer, arguments.batch_size, chat_template_kwargs=template)
    with edit.disabled():
        base = tasks.scores(lm, form.use_chat_template)
    edited = tasks.scores(lm, form.use_chat_template)
    if arguments.json:
        print(json.dumps({"base": base, "edited": edited}))
        return
    width = max(map(len, base), default=0)
    print(f"{'':{width}}  {'base':15}  edited")
    for name in base:
        print(f"{name:{width}}  {base[name]!s:15}  {edited[name]}")


def _typed() -> Iterator[str]:
    """Yield the lines of standard input that are not blank; at a terminal, ask for them."""
    if sys.stdin.isatty():
        note("a prompt a line; end with Ctrl-D")
    for line in sys.stdin:
        text = line.removeprefix("\ufeff").strip()
        if text:
            _check_utf8(text)
            yield text


def _check_utf8(*prompts: str) -> None:
    """Raise ValueError for bytes that were no UTF-8, which Python reads as half surrogate pairs."""
    for prompt in prompts:
        if any("\ud800" <= character <= "\udfff" for character in prompt):
            raise ValueError(f"a prompt must be UTF-8 text; got {short(prompt)}")


def _apply(arguments: argparse.Namespace) -> int:
    """Make the edits of a file that the directory lacks; print which do not hold."""
    kind = arguments.kind
    found = read_benchmark(kind, arguments.file) if kind else read_requests(arguments.file)
    asked = [request.to_dict() for request in found[: arguments.limit]]
    made = {}
    if holds_edit(arguments.directory):
        journal = Journal(read_history(arguments.directory))
        made = _edits_at(journal, journal.position)
    rest = [request for request in asked if made.get(request["prompt"]) != request]
    with on_interrupt(arguments.directory), begun(arguments, asked) as editor, Bar() as bar:
        move = bar.start(len(asked), len(asked) - len(rest))
        for request in rest:
            editor.edit(request)
            move(1)
        held = editor.holds(asked)
    print(f"edits made: {len(rest)}; there before: {len(asked) - len(rest)}")
    for request, holds in zip(asked, held, strict=True):
        if not holds:
            print(f"does not hold: {short(request['prompt'])} -> {short(request['target_new'])}")
    return 0 if all(held) else UNLEARNED


def _go_back(arguments: argparse.Namespace) -> None:
    """Take the latest edit back, or go to the state after the entry that is given."""
    with _opened(arguments) as editor:
        if "to" in arguments:
            editor.rollback(to=arguments.to)
        else:
            editor.undo()
    print(read_history(arguments.directory)[-1].summary())


def _forget(arguments: argparse.Namespace) -> int:
    """Take the edits of one prompt back; print how many later requests are no longer learned."""
    before = read_history(arguments.directory)
    with on_interrupt(arguments.directory), _opened(arguments) as editor:
        reports = editor.forget(arguments.prompt)
    unlearned = sum(report.learned.count(False) for report in reports)
    print(f"later edits learned again: {len(reports)}; requests of them not learned: {unlearned}")
    model = "" if arguments.model is None else f" --model {arguments.model}"
    back = f"rollback {arguments.directory} --to {before[-1].id}{model}"
    print(f"`baft-easyedit {back}` brings it back")
    return UNLEARNED if unlearned else 0


def _repair(arguments: argparse.Namespace) -> None:
    """Repair what is damaged; print which state the directory has then."""
    directory = arguments.directory
    if not holds_edit(directory):
        read_latest(directory)
    aside = {*directory.glob("before-repair-*")}
    KeptDirectory(directory, repair=True).close()
    kept = [folder.name for folder in {*directory.glob("before-repair-*")} - aside]
    print(f"what was there is in {kept[0]}; now:" if kept else "nothing is damaged:")
    *before, last = read_history(directory)
    print(last.summary())
    if kept and last.to is not None and before[-1].id > last.to:
        print(
            f"`baft-easyedit rollback {directory} --to {before[-1].id}` brings back what followed"
        )


def _history(arguments: argparse.Namespace) -> None:
    """Print the journal of a kept edit."""
    for entry in read_history(arguments.directory):
        print(entry.line if arguments.json else entry.summary())


def _diff(arguments: argparse.Namespace) -> None:
    """Print the requests in effect after entry A but not B (-), and after B but not A (+)."""
    journal = Journal(read_history(arguments.directory))
    a, b = arguments.a, journal.position if arguments.b is None else arguments.b
    for place in (a, b):
        if place >= len(journal):
            raise ValueError(
                f"A and B must be ids of entries, at most {len(journal) - 1}; got {place}: see "
                "`baft-easyedit history`"
            )
    before, after = _edits_at(journal, a), _edits_at(journal, b)
    for sign, own, other in (("-", before, after), ("+", after, before)):
        for prompt, request in own.items():
            if other.get(prompt) != request:
                print(printable(f"{sign} {prompt} -> {request['target_new']}"))


def _edits_at(journal: Journal, entry: int) -> dict[str, dict[str, Any]]:
    """Return the requests in effect after an entry, by prompt: the latest one of each prompt."""
    ids = reversed(list(journal.ancestors(entry)))
    return {request["prompt"]: request for i in ids for request in journal.entries[i].requests}


def _opened(arguments: argparse.Namespace) -> BaFTEditor:
    """Open a kept edit with its model."""
    model, tokenizer = load(arguments)
    return BaFTEditor.open(model, tokenizer, arguments.directory)
