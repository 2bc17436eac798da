"""`edit` and `history`: one edit from the command line, and what a kept edit went through."""

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from baft_easyedit.cli.console import note, silence_loading, without_warnings_of
from baft_easyedit.cli.model import add_model_options, hparams_of
from baft_easyedit.cli.options import (
    DTYPES,
    existing_directory,
    new_directory,
    positive,
    whole,
)
from baft_easyedit.editor import BaFTEditor, EditReport
from baft_easyedit.files.messages import short
from baft_easyedit.hparams import BaFTHyperParams
from baft_easyedit.model.prompt_format import PromptFormat
from baft_easyedit.storage.directory import check_target, holds_edit, read_history
from baft_easyedit.training.requests import as_requests

UNLEARNED = 3
"""Exit status if an edit was made, but not learned."""


def add_commands(commands: Any) -> None:
    """Describe the commands."""
    edit = commands.add_parser("edit", help="edit one fact and show the answers before and after")
    add_model_options(edit)
    edit.add_argument("--prompt", required=True, help="text that the answer completes")
    edit.add_argument("--target", required=True, help="the new answer")
    edit.add_argument("--subject", help="what the fact is about, a part of the prompt")
    edit.add_argument(
        "--loc-prompt", action="append", default=[], help="irrelevant text to keep; may be repeated"
    )
    edit.add_argument(
        "--ask", action="append", default=[], help="another prompt to answer; may be repeated"
    )
    edit.add_argument("--dtype", choices=DTYPES, default="float32", help="(%(default)s)")
    edit.add_argument("--num-steps", type=whole(1), help="most steps, in place of the settings'")
    edit.add_argument("--lr", type=positive, help="learning rate, in place of the settings'")
    edit.add_argument(
        "--allow-unlearned",
        action="store_true",
        help=f"end with status 0, not {UNLEARNED}, if the target was not learned",
    )
    edit.add_argument(
        "--save",
        type=new_directory,
        metavar="DIR",
        help="keep the edit in a directory, and go on with the one that is there",
    )
    edit.add_argument(
        "--from",
        dest="source",
        type=existing_directory,
        metavar="DIR",
        help="begin with a kept edit, unchanged",
    )
    edit.add_argument(
        "--overwrite",
        action="store_true",
        help="with --from and --save: replace a snapshot of another edit in that directory",
    )
    edit.set_defaults(run=_edit)

    history = commands.add_parser("history", help="list what a kept edit went through")
    history.add_argument("directory", type=existing_directory, metavar="DIR")
    history.add_argument("--json", action="store_true", help="the journal's lines, for machines")
    history.set_defaults(run=_history)


def _edit(arguments: argparse.Namespace) -> int:
    """Edit one fact; print the answers before and after."""
    request: dict[str, Any] = {
        "prompt": arguments.prompt,
        "target_new": arguments.target,
        "subject": arguments.subject,
        "loc_prompt": arguments.loc_prompt,
    }
    as_requests(request)
    if _is_copied(arguments):
        check_target(arguments.save, arguments.source, arguments.overwrite)
    elif arguments.overwrite:
        raise ValueError("--overwrite needs --from, and another directory as --save")
    silence_loading()
    hparams = hparams_of(arguments)

    import torch

    from baft_easyedit.generation import generate_answers, load_model, with_usable_end

    model, tokenizer = load_model(
        hparams.model_name, hparams.device, getattr(torch, arguments.dtype)
    )
    if arguments.hparams is None:
        hparams = with_usable_end(replace(hparams, learn_end=True), tokenizer)
    prompts = [arguments.prompt, *arguments.ask]
    with _told_what_is_kept(arguments), _editor(arguments, model, tokenizer, hparams) as editor:
        form = PromptFormat.of(editor.hparams)
        before = generate_answers(model, tokenizer, prompts, prompt_format=form)
        with without_warnings_of(
            "baft_easyedit.training.learner"
        ):  # `_status` tells what was not learned
            report = editor.edit(request)
        after = generate_answers(model, tokenizer, prompts, prompt_format=form)
        if arguments.save is not None:
            editor.save(arguments.save, arguments.overwrite)
        settings, num_parameters = editor.hparams, editor.model_edit.num_parameters
    _print_answers(prompts, before, after)
    _print_report(report, settings.alg_name, num_parameters)
    return _status(arguments, report, settings, [request])


def _is_copied(arguments: argparse.Namespace) -> bool:
    """Tell whether one kept edit is begun with, and another directory written."""
    return None not in (arguments.source, arguments.save) and arguments.source != arguments.save


@contextmanager
def _told_what_is_kept(arguments: argparse.Namespace) -> Iterator[None]:
    """Let an interrupt say where to see what is kept."""
    try:
        yield
    except KeyboardInterrupt:
        if arguments.save is None or not holds_edit(arguments.save):
            raise KeyboardInterrupt("nothing is kept") from None
        raise KeyboardInterrupt(
            f"`baft-easyedit history {arguments.save}` lists what is kept"
        ) from None


def _editor(
    arguments: argparse.Namespace, model: Any, tokenizer: Any, hparams: BaFTHyperParams
) -> BaFTEditor:
    """Make the editor that `--save` and `--from` ask for; a kept edit brings its own settings."""
    asked = {
        name: value
        for name in ("num_steps", "lr")
        if (value := getattr(arguments, name)) is not None
    }
    hparams = replace(hparams, **asked)
    if arguments.source is not None and arguments.source != arguments.save:
        editor = BaFTEditor.load(model, tokenizer, arguments.source)
    elif arguments.save is None:
        return BaFTEditor(model, tokenizer, hparams)
    else:
        is_new = not holds_edit(arguments.save)
        given = hparams if is_new or arguments.hparams else None
        editor = BaFTEditor.open(model, tokenizer, arguments.save, given)
    editor.hparams = replace(editor.hparams, **asked)
    return editor


def _print_answers(prompts: Sequence[str], before: Sequence[str], after: Sequence[str]) -> None:
    """Show what the model says to each prompt."""
    for prompt, old, new in zip(prompts, before, after, strict=True):
        print(f"{prompt}\n  before: {old}\n  after:  {new}")


def _print_report(report: EditReport, method: str, num_parameters: int) -> None:
    """Show what the edit cost."""
    stop = "stopped early" if report.stopped_early else "all steps"
    print(
        f"{method}: {report.num_steps} steps ({stop}), {report.time_s:.2f} s, "
        f"answer loss {report.losses[0].answer:.3f} -> {report.final_loss:.3f}, "
        f"{num_parameters:,} parameters"
    )
    for warning in report.gates.warnings() if report.gates is not None else ():
        print(f"warning: {warning}")


def _status(
    arguments: argparse.Namespace,
    report: EditReport,
    settings: BaFTHyperParams,
    requests: Sequence[dict[str, Any]],
) -> int:
    """Say which requests were not learned, and what to try; return the exit status."""
    kept = "" if arguments.save is None else f"; it is kept in {arguments.save} all the same"
    # No telling without an entry for each.
    for request, is_learned in zip(requests, report.learned, strict=False):
        if not is_learned:
            told = f"{short(request['prompt'])} -> {short(request['target_new'])}"
            note(
                f"not learned: {told}{kept}. Try more steps (--num-steps {2 * settings.num_steps}) "
                f"or a higher learning rate (--lr {2 * settings.lr:g})"
            )
    return UNLEARNED if False in report.learned and not arguments.allow_unlearned else 0


def _history(arguments: argparse.Namespace) -> None:
    """Print the journal of a kept edit."""
    for entry in read_history(arguments.directory):
        print(entry.line if arguments.json else entry.summary())
