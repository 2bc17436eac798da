"""Tell an edit where the prompt ends while EasyEdit scores it.

EasyEdit scores with one teacher-forced forward of `prompt + " " + target`, in which the model
cannot see where the prompt ends. Its scoring functions are wrapped, not re-written: if the scored
model carries an edit, the original runs inside `ModelEdit.prompt_lengths`, and with our methods'
hyper-parameters, before an edit too, on the tokens that edits are learned on (`LearnedTokens`).
Other methods are scored by the original alone.
"""

import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn

from baft_easyedit.easyedit.learned_tokens import LearnedTokens
from baft_easyedit.hparams import BaFTHyperParams
from baft_easyedit.model.hooks import attached_edit
from baft_easyedit.model.prompt_format import PromptFormat

Scorer = Callable[..., Any]
TellEdit = Callable[[Sequence[int]], AbstractContextManager[Any]]
"""`ModelEdit.prompt_lengths` of the scored model; one that tells nobody before its first edit."""
Bridge = Callable[[Scorer, Mapping[str, Any], TellEdit], Any]
"""Called with EasyEdit's function, its arguments by name, `tok` among them a `LearnedTokens`, and
what tells prompt lengths."""


def wrap_scoring() -> None:
    """Wrap EasyEdit's scoring functions wherever they are held; a second call does nothing."""
    module = importlib.import_module("easyeditor.evaluate.evaluate_utils")
    bridges: dict[str, Bridge] = {
        "test_prediction_acc": _score_prediction,
        "F1": _score_prediction,
        "PPL": _score_perplexity,
        "OOD_PPL": _score_text,
        "test_generation_quality": _score_continuation,
        "generate_texts": _generate,
    }
    for name, bridge in bridges.items():
        original = getattr(module, name, None)  # the release lacks some of them
        if original is not None and not hasattr(original, "_baft_bridge"):
            _replace_everywhere(name, original, _bridged(original, bridge))


def _replace_everywhere(name: str, original: Scorer, replacement: Scorer) -> None:
    """Replace a function in every EasyEdit module that holds it under its name."""
    for path, module in list(sys.modules.items()):
        if path.split(".")[0] == "easyeditor" and module.__dict__.get(name) is original:
            setattr(module, name, replacement)


def _bridged(original: Scorer, bridge: Bridge) -> Scorer:
    """Wrap one scoring function."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def score(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs)
        call.apply_defaults()
        model = call.arguments["model"]
        edit = attached_edit(model) if isinstance(model, nn.Module) else None
        hparams = call.arguments.get("hparams")
        if edit is None and not isinstance(hparams, BaFTHyperParams):
            return original(*args, **kwargs)
        form = PromptFormat() if hparams is None else PromptFormat.of(hparams)
        if call.arguments.get("locality"):  # for which EasyEdit never uses the template
            form = form.without_template()
        learned = {**call.arguments, "tok": LearnedTokens(call.arguments["tok"], form)}
        return bridge(original, learned, nullcontext if edit is None else edit.prompt_lengths)

    score._baft_bridge = True  # type: ignore[attr-defined]
    return score


def _as_list(texts: str | Sequence[str]) -> list[str]:
    """Return one text, or several, as a list."""
    return [texts] if isinstance(texts, str) else list(texts)


def _score_prediction(original: Scorer, call: Mapping[str, Any], tell: TellEdit) -> Any:
    """Score tokens of the targets, teacher-forced or (`vanilla_generation`) generated."""
    if call.get("vanilla_generation"):
        return _generate(original, call, tell)
    prompts, targets = _as_list(call["prompts"]), _as_list(call["targets"])
    with tell(call["tok"].expect(prompts, targets)):
        return original(**call)


def _generate(original: Scorer, call: Mapping[str, Any], tell: TellEdit) -> Any:  # noqa: ARG001
    """Run a function that calls `model.generate`, which tells the prompts' lengths itself."""
    return original(**call)


def _score_perplexity(original: Scorer, call: Mapping[str, Any], tell: TellEdit) -> Any:
    """Score the perplexity of targets; EasyEdit passes no attention mask, so padding counts."""
    prompts, targets = _as_list(call["prompt"]), _as_list(call["target_new"])
    tok = call["tok"]
    lengths = tok.expect(prompts, targets)
    if tok.padding_side == "left":
        widths = [len(tok.ids(f"{p} {t}")) for p, t in zip(prompts, targets, strict=True)]
        lengths = [n + max(widths) - width for n, width in zip(lengths, widths, strict=True)]
    with tell(lengths):
        return original(**call)


def _score_text(original: Scorer, call: Mapping[str, Any], tell: TellEdit) -> Any:
    """Score how probable the prompts themselves are: there is no answer in the text."""
    with tell([max(len(call["tok"].ids(text)) for text in _as_list(call["prompt"]))]):
        return original(**call)


def _score_continuation(original: Scorer, call: Mapping[str, Any], tell: TellEdit) -> Any:
    """Score generated continuations; EasyEdit's own loop may feed a prompt in pieces."""
    if call.get("vanilla_generation"):
        return _generate(original, call, tell)
    with tell([len(call["tok"].ids(text)) for text in _as_list(call["prefixes"])]):
        return original(**call)
