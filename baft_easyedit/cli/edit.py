"""The command `edit`: make one edit, and show the answers before and after."""

import argparse
from dataclasses import replace
from typing import Any

from baft_easyedit.cli.console import UNLEARNED, note, on_interrupt, silence_loading
from baft_easyedit.cli.model import WITHOUT_FILE, add_model_options, hparams_of
from baft_easyedit.cli.options import existing, new, positive, whole
from baft_easyedit.editor import BaFTEditor
from baft_easyedit.files.messages import short
from baft_easyedit.hparams import BaFTHyperParams
from baft_easyedit.model.prompt_format import PromptFormat
from baft_easyedit.storage.reading import check_target, holds_edit
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
    add("--loc-prompt", **again, help="irrelevant text to keep; may be repeated")
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
    silence_loading()
    hparams = hparams_of(arguments)

    import torch

    from baft_easyedit.generation import generate_answers, load_model, with_usable_end

    dtype = getattr(torch, hparams.dtype)
    model, tokenizer = load_model(hparams.model_name, hparams.device, dtype)
    if arguments.hparams is None:
        hparams = with_usable_end(replace(hparams, **WITHOUT_FILE), tokenizer)
    prompts = [arguments.prompt, *arguments.ask]
    if arguments.save is not None and not holds_edit(arguments.save):
        BaFTEditor(model, tokenizer, hparams).check([request])  # before a directory is begun
    with on_interrupt(arguments.save), _editor(arguments, model, tokenizer, hparams) as editor:
        prompt_format = PromptFormat.of(editor.hparams)
        before = generate_answers(model, tokenizer, prompts, prompt_format=prompt_format)
        report = editor.edit(request)
        after = generate_answers(model, tokenizer, prompts, prompt_format=prompt_format)
        if arguments.save is not None:
            editor.save(arguments.save, arguments.overwrite)
        settings, num_parameters = editor.hparams, editor.model_edit.num_parameters
    for prompt, old, new_answer in zip(prompts, before, after, strict=True):
        print(f"{prompt}\n  before: {old}\n  after:  {new_answer}")
    _print_report(report, settings.alg_name, num_parameters)
    return _status(arguments, report, settings)


def _editor(
    arguments: argparse.Namespace, model: Any, tokenizer: Any, hparams: BaFTHyperParams
) -> BaFTEditor:
    """Make the editor that `--save` and `--from` ask for; a kept edit has its own settings."""
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
