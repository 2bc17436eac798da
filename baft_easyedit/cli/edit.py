"""The command `edit`: make one edit, and show the answers before and after."""

import argparse
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from baft_easyedit.cli.console import UNLEARNED, note, on_interrupt
from baft_easyedit.cli.model import add_model_options, begun, given, load_to_edit
from baft_easyedit.cli.options import existing, new, positive, whole
from baft_easyedit.editor import BaFTEditor
from baft_easyedit.files.messages import short
from baft_easyedit.hparams import BaFTHyperParams
from baft_easyedit.model.prompt_format import PromptFormat
from baft_easyedit.storage.reading import check_target
from baft_easyedit.training.loop import EditReport
from baft_easyedit.training.requests import as_requests


def add_commands(commands: Any) -> None:
    """Add the command."""
    edit = commands.add_parser("edit", help="edit one fact and show the answers before and after")
    add_model_options(edit)
    add = edit.add_argument
    again = {"action": "append", "default": []}
    add("--prompt", required=True, help="text that the answer completes")
    add("--target", required=True, help="the new answer")
    add("--subject", help="what the fact is about, a part of the prompt")
    add(
        "--loc-prompt",
        **again,
        help="irrelevant text for the locality term of --hparams; may be repeated",
    )
    add("--ask", **again, help="another prompt to answer; may be repeated")
    add("--num-steps", type=whole(1), help="most steps, in place of the settings'")
    add("--lr", type=positive, help="learning rate, in place of the settings'")
    unlearned = f"end with status 0, not {UNLEARNED}, if the target was not learned"
    add("--allow-unlearned", action="store_true", help=unlearned)
    kept = "keep the edit in a directory, and go on with the one that is there"
    add("--save", type=new("directory"), metavar="DIR", help=kept)
    begin = {"type": existing("directory"), "metavar": "DIR", "dest": "source"}
    add("--from", **begin, help="begin with a kept edit, unchanged")
    over = "with --from and --save: replace a snapshot of another edit in that directory"
    add("--overwrite", action="store_true", help=over)
    edit.set_defaults(run=_edit)


def _edit(arguments: argparse.Namespace) -> int:
    """Edit one fact; print the answers before and after."""
    request: dict[str, Any] = {
        "prompt": arguments.prompt,
        "target_new": arguments.target,
        "subject": arguments.subject,
        "loc_prompt": arguments.loc_prompt,
    }
    as_requests(request)
    if None not in (arguments.source, arguments.save) and arguments.source != arguments.save:
        check_target(arguments.save, arguments.source, arguments.overwrite)
    elif arguments.overwrite:
        raise ValueError("--overwrite needs --from, and another directory as --save")
    from baft_easyedit.generation import generate_answers

    prompts = [arguments.prompt, *arguments.ask]
    with on_interrupt(arguments.save), _editor(arguments, request) as editor:
        prompt_format = PromptFormat.of(editor.hparams)
        answers = partial(
            generate_answers, editor.model, editor.tokenizer, prompts, prompt_format=prompt_format
        )
        settings = replace(editor.hparams, **given(arguments, "num_steps", "lr"))
        before = answers()
        report = _made(editor, request, settings, arguments)
        after = answers()
        if arguments.save is not None:
            editor.save(arguments.save, arguments.overwrite)
        num_parameters = editor.model_edit.num_parameters
    for prompt, old, new_answer in zip(prompts, before, after, strict=True):
        print(f"{prompt}\n  before: {old}\n  after:  {new_answer}")
    _print_report(report, settings.alg_name, num_parameters)
    return _status(arguments, report, settings)


def _editor(arguments: argparse.Namespace, request: Mapping[str, Any]) -> BaFTEditor:
    """Make the editor that `--save` and `--from` ask for; a kept edit has its own settings."""
    arguments.directory = arguments.source or arguments.save
    if _is_open(arguments):
        return begun(arguments, [request])
    model, tokenizer, hparams = load_to_edit(arguments)
    if arguments.source is None:
        return BaFTEditor(model, tokenizer, hparams)
    editor = BaFTEditor.load(model, tokenizer, arguments.source)
    editor.hparams = hparams
    return editor


def _is_open(arguments: argparse.Namespace) -> bool:
    """Tell whether the edit is made in the directory where it is kept."""
    return arguments.save is not None and arguments.directory == arguments.save


def _made(
    editor: BaFTEditor,
    request: Mapping[str, Any],
    settings: BaFTHyperParams,
    arguments: argparse.Namespace,
) -> EditReport:
    """Make one edit with settings of its own; later ones have those of before, if it fails, too."""
    own, editor.hparams = editor.hparams, settings
    try:
        return editor.edit(request)
    finally:
        editor.hparams = own
        if _is_open(arguments):
            editor.save(arguments.save)


def _print_report(report: EditReport, method: str, num_parameters: int) -> None:
    """Print the steps, time and loss of the edit, and warnings about its gates."""
    stop = "stopped early" if report.stopped_early else "all steps"
    print(
        f"{method}: {report.num_steps} steps ({stop}), {report.time_s:.2f} s, "
        f"answer loss {report.losses[0].answer:.3f} -> {report.final_loss:.3f}, "
        f"{num_parameters:,} parameters"
    )
    for warning in report.gates.warnings() if report.gates is not None else ():
        print(f"warning: {warning}")


def _status(arguments: argparse.Namespace, report: EditReport, settings: BaFTHyperParams) -> int:
    """Return the exit status; if the request was not learned, say what to try."""
    if False not in report.learned:
        return 0
    kept = "" if arguments.save is None else f"; it is kept in {arguments.save} all the same"
    note(
        f"not learned: {short(arguments.prompt)} -> {short(arguments.target)}{kept}. Try more "
        f"steps (--num-steps {2 * settings.num_steps}) or a higher learning rate (--lr "
        f"{2 * settings.lr:g})"
    )
    return 0 if arguments.allow_unlearned else UNLEARNED
