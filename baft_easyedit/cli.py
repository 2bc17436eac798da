"""The command line: `baft-easyedit demo | edit | doctor`."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from typing import Any

from baft_easyedit.hparams import BaFTHyperParams, read_hparams, scaled_layers
from baft_easyedit.requests import as_requests
from baft_easyedit.resources import BUNDLED_MODEL, model_location

_DTYPES = ("float32", "float16", "bfloat16")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status, 2 for bad input."""
    arguments = _parser().parse_args(argv)
    try:
        status = arguments.run(arguments)
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"baft-easyedit: {error}", file=sys.stderr)
        return 2
    return status or 0


def _parser() -> argparse.ArgumentParser:
    """Describe the commands."""
    parser = argparse.ArgumentParser(
        prog="baft-easyedit", description="BaFT, knowledge editing by basis-level fine-tuning."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    edit = commands.add_parser("edit", help="edit one fact and show the answers before and after")
    _add_model_options(edit)
    edit.add_argument("--prompt", required=True, help="text that the answer completes")
    edit.add_argument("--target", required=True, help="the new answer")
    edit.add_argument("--subject", help="what the fact is about, a part of the prompt")
    edit.add_argument(
        "--loc-prompt", action="append", default=[], help="irrelevant text to keep; may be repeated"
    )
    edit.add_argument(
        "--ask", action="append", default=[], help="another prompt to answer; may be repeated"
    )
    edit.add_argument("--dtype", choices=_DTYPES, default="float32", help="(%(default)s)")
    edit.set_defaults(run=_edit)

    demo = commands.add_parser(
        "demo", help="edits shown as text, then BaFT beside other methods through EasyEdit"
    )
    _add_model_options(demo)
    demo.add_argument("--methods", help="comma-separated list; all that the demo knows if absent")
    demo.add_argument("--cases", type=int, default=30, help="single edits per method (%(default)s)")
    demo.add_argument("--jobs", type=int, default=2, help="methods run at once (%(default)s)")
    demo.set_defaults(run=_demo)

    doctor = commands.add_parser("doctor", help="say which EasyEdit was found and what works")
    doctor.set_defaults(run=_doctor)
    return parser


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose a model and its hyper-parameters."""
    parser.add_argument(
        "--model", default=BUNDLED_MODEL, help="Hugging Face name or directory (%(default)s)"
    )
    parser.add_argument("--hparams", help="YAML file; scaled to the model's depth if absent")
    parser.add_argument(
        "--device", help="CUDA device number, or a name; that of the YAML if absent"
    )


def _hparams(arguments: argparse.Namespace) -> BaFTHyperParams:
    """Read or make the hyper-parameters that the options ask for."""
    import torch

    device = arguments.device
    if device is None:
        device = 0 if torch.cuda.is_available() else "cpu"
    elif device.isdigit():
        device = int(device)
    if arguments.hparams:
        hparams = read_hparams(arguments.hparams)
        if arguments.model == BUNDLED_MODEL:
            arguments.model = hparams.model_name
    elif arguments.model == BUNDLED_MODEL:
        hparams = BaFTHyperParams.from_hparams("BaFT/facts-llama")
    else:
        hparams = BaFTHyperParams(arguments.model, scaled_layers(_depth(arguments.model)))
    return replace(hparams, model_name=arguments.model, device=device)


def _depth(model: str) -> int:
    """Return how many decoder layers a model has, without loading it."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model_location(model))
    return int(config.get_text_config().num_hidden_layers)


def _edit(arguments: argparse.Namespace) -> None:
    """Edit one fact; print the answers before and after."""
    request: dict[str, Any] = {
        "prompt": arguments.prompt,
        "target_new": arguments.target,
        "subject": arguments.subject,
        "loc_prompt": arguments.loc_prompt,
    }
    as_requests(request)
    hparams = _hparams(arguments)

    import torch

    from baft_easyedit.editor import BaFTEditor
    from baft_easyedit.generation import generate_answers, load_model

    _silence_loading()
    model, tokenizer = load_model(arguments.model, hparams.device, getattr(torch, arguments.dtype))
    editor = BaFTEditor(model, tokenizer, hparams)
    prompts = [arguments.prompt, *arguments.ask]
    before = generate_answers(model, tokenizer, prompts)
    report = editor.edit(request)
    after = generate_answers(model, tokenizer, prompts)
    for prompt, old, new in zip(prompts, before, after, strict=True):
        print(f"{prompt}\n  before: {old}\n  after:  {new}")
    stop = "stopped early" if report.stopped_early else "all steps"
    print(
        f"{hparams.alg_name}: {report.num_steps} steps ({stop}), {report.time_s:.2f} s, "
        f"answer loss {report.losses[0].answer:.3f} -> {report.final_loss:.3f}, "
        f"{editor.model_edit.num_parameters:,} parameters"
    )


def _silence_loading() -> None:
    """Keep transformers' progress bars out of what the command prints."""
    import_module("transformers.utils.logging").disable_progress_bar()


def _demo(arguments: argparse.Namespace) -> None:
    """Show a few edits, then the tables."""
    from baft_easyedit.demo import check_methods, compare, show_edits
    from baft_easyedit.easyedit import find_host

    methods = check_methods(arguments.methods.split(",") if arguments.methods else ())
    _silence_loading()
    hparams, host = _hparams(arguments), find_host()
    for line in show_edits(hparams):
        print(line)
    print(f"\nThrough EasyEdit ({host.generation}, {host.version}) and its own evaluators:")
    for line in compare(hparams, methods, arguments.cases, arguments.jobs):
        print(line)


def _doctor(_arguments: argparse.Namespace) -> int:
    """Print what `doctor` finds; the status is 1 if EasyEdit cannot be used."""
    from baft_easyedit.easyedit.doctor import doctor

    report = doctor()
    print(report)
    return 0 if report.is_usable else 1
