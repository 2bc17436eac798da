"""Tell an edit where the prompt ends while EasyEdit scores the edited model.

EasyEdit scores by one teacher-forced forward of `prompt + " " + target`. An edit acts on the last
prompt tokens and on the answer, but cannot see in this text where the prompt ends. So `register`
wraps EasyEdit's scoring functions: on a model that carries an edit, the original function runs
inside `ModelEdit.prompt_lengths`, and on the tokens that edits are learned on (`LearnedTokens`).
With BaFT's or ReFT's hyper-parameters it gets these tokens before an edit too. For other methods
the original is called as it is.
"""

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from baft_easyedit.easyedit.compat import replace_everywhere
from baft_easyedit.easyedit.learned_tokens import LearnedTokens, as_list
from baft_easyedit.hparams import BaFTHyperParams
from baft_easyedit.model.hooks import attached_edit, with_prompt_lengths
from baft_easyedit.model.prompt_format import PromptFormat

Call = Mapping[str, Any]
"""The arguments of a scoring function by name, `tok` among them a `LearnedTokens`."""


def wrap_scoring() -> None:
    """Wrap EasyEdit's scoring functions wherever they are held."""
    module = importlib.import_module("easyeditor.evaluate.evaluate_utils")
    for name, prompt_lengths in _PROMPT_LENGTHS.items():
        original = getattr(module, name, None)  # the release lacks some of them
        if original is not None:
            replace_everywhere(original, _bridged(original, prompt_lengths))


def _bridged(
    original: Callable[..., Any], prompt_lengths: Callable[[Call], list[int]] | None
) -> Callable[..., Any]:
    """Wrap one scoring function."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def score(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        call = bound.arguments
        edit = attached_edit(call["model"])
        hparams = call.get("hparams")
        if edit is None and not isinstance(hparams, BaFTHyperParams):
            return original(*args, **kwargs)
        prompt_format = PromptFormat() if hparams is None else PromptFormat.of(hparams)
        if call.get("locality"):  # for which EasyEdit never uses the template
            prompt_format = prompt_format.without_template()
        call["tok"] = LearnedTokens(call["tok"], prompt_format)
        # `generate` tells the edit its prompts' lengths itself.
        if prompt_lengths is None or call.get("vanilla_generation"):
            return original(**call)
        with with_prompt_lengths(call["model"], prompt_lengths(call)):
            return original(**call)

    return score


def _of_prediction(call: Call) -> list[int]:
    """Return the prompts' lengths in tokens, for functions that score targets."""
    return call["tok"].expect(as_list(call["prompts"]), as_list(call["targets"]))


def _of_perplexity(call: Call) -> list[int]:
    """Return them for perplexity; EasyEdit passes no attention mask, so left padding counts."""
    tok, prompts, targets = call["tok"], as_list(call["prompt"]), as_list(call["target_new"])
    lengths: list[int] = tok.expect(prompts, targets)
    if tok.padding_side == "left":
        widths = [len(tok.ids(f"{p} {t}")) for p, t in zip(prompts, targets, strict=True)]
        lengths = [n + max(widths) - width for n, width in zip(lengths, widths, strict=True)]
    return lengths


def _of_text(call: Call) -> list[int]:
    """Return the length of a text that is scored by itself: the prompt is the whole text."""
    return [max(len(call["tok"].ids(text)) for text in as_list(call["prompt"]))]


def _of_continuation(call: Call) -> list[int]:
    """Return the lengths of prefixes; EasyEdit's own decoding may feed a prompt in pieces."""
    return [len(call["tok"].ids(text)) for text in as_list(call["prefixes"])]


_PROMPT_LENGTHS: Mapping[str, Callable[[Call], list[int]] | None] = {
    "test_prediction_acc": _of_prediction,
    "F1": _of_prediction,
    "PPL": _of_perplexity,
    "OOD_PPL": _of_text,
    "test_generation_quality": _of_continuation,
    "generate_texts": None,
}
"""How the prompts' lengths are found in the arguments of each of EasyEdit's scoring functions."""
