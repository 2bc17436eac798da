"""The command `theorem`: measure Theorem 2.3 on one fact of a model."""

import argparse
import json
from dataclasses import asdict
from typing import Any

from baft_easyedit.cli.console import Bar, silence_loading
from baft_easyedit.cli.model import default_device
from baft_easyedit.cli.options import device, new, whole
from baft_easyedit.files.resources import BUNDLED_MODEL, own_preset
from baft_easyedit.files.writing import write_durably, written_whole


def add_commands(commands: Any) -> None:
    """Add the command."""
    theorem = commands.add_parser(
        "theorem", help="measure which states ReFT must move out of their stable ball, and BaFT not"
    )
    add = theorem.add_argument
    again = {"action": "append", "default": []}
    add("--model", default=BUNDLED_MODEL, help="Hugging Face name or directory; %(default)s")
    add("--layer", type=whole(0), help="the edited layer, 0-based; at three quarters if absent")
    add("--prompt", help="text that the answer completes; a fact of the package if absent")
    add("--target", help="the new answer")
    add("--rephrase", **again, help="the prompt in other words; may be repeated")
    add("--loc", **again, help="irrelevant prompt to measure; may be repeated")
    add("--loc-prompt", **again, help="irrelevant text that BaFT learns to keep; may be repeated")
    add(
        "--device",
        type=device,
        help="CUDA device number, or a name; the first, or the CPU, if absent",
    )
    add(
        "--out",
        type=new("directory"),
        metavar="DIR",
        help="for JSON, the table and (by matplotlib) the figure",
    )
    theorem.set_defaults(run=_theorem)


def _theorem(arguments: argparse.Namespace) -> None:
    """Measure, print the table and the counts, and write the files."""
    case = _case(arguments)
    if arguments.out is not None:
        try:
            import matplotlib.figure  # noqa: F401 - needed after minutes
        except ImportError as error:
            raise ImportError(f"--out needs matplotlib ({error}): install it by pip") from None
    silence_loading()
    from baft_easyedit.generation import load_model, model_depth
    from baft_easyedit.theorem import measure, show

    depth = model_depth(arguments.model)
    layer = 3 * depth // 4 if arguments.layer is None else arguments.layer
    if layer >= depth:
        raise ValueError(f"--layer must be below {depth}, the model's depth (0-based); got {layer}")
    place = default_device(arguments.device)
    hparams = measure.settings(arguments.model, layer, place)
    model, tokenizer = load_model(arguments.model, place)
    with Bar("state") as bar:
        tell = bar.start(len(case.prompts()), 0)
        sigmas, states = measure.measure(model, tokenizer, case, hparams, tell)
    table, told = show.table(states), list(show.counts(states))
    told.append(f"sigma_max(H) at layer {layer}: {sigmas['ReFT']:.2f} (ReFT)")
    print(table, *told, sep="\n")
    if arguments.out is not None:
        content = {"model": arguments.model, "layer": layer, "case": asdict(case)}
        content |= {"settings": [asdict(h) for h in hparams], "sigma_max": sigmas}
        content["states"] = [asdict(state) for state in states]
        write_durably(arguments.out / "theorem.json", json.dumps(content, indent=1).encode())
        write_durably(arguments.out / "theorem.md", "\n".join([table, *told, ""]).encode())
        with written_whole(arguments.out / "theorem.png") as stream:
            show.figure(states, sigmas).savefig(stream, format="png", dpi=150)


def _case(arguments: argparse.Namespace) -> Any:
    """Return the case of the options.

    Raises:
        ValueError: If a part of a case of one's own is missing.
    """
    from baft_easyedit.theorem.measure import Case
    from baft_easyedit.training.requests import as_requests

    given = (arguments.prompt, arguments.target)
    texts = (*arguments.rephrase, *arguments.loc, *arguments.loc_prompt)
    if given == (None, None) and not texts and own_preset(arguments.model):
        return Case.of_facts(arguments.model)
    if None in given:
        raise ValueError(
            "--prompt and --target must both be given with --rephrase, --loc or --loc-prompt, and "
            f"for a model other than bundled and smollm2; got {given}: give both"
        )
    if not all(map(str.strip, texts)):
        raise ValueError("--rephrase, --loc and --loc-prompt must not be blank; got a blank one")
    request = {"prompt": given[0], "target_new": given[1], "loc_prompt": arguments.loc_prompt}
    as_requests(request)
    return Case(*given, arguments.rephrase, arguments.loc, arguments.loc_prompt)
