"""Tell an edit where the prompt ends while EasyEdit scores it.

EasyEdit scores with one teacher-forced forward of `prompt + " " + target`, in which the model
cannot see where the prompt ends. Its scoring functions are wrapped, not re-written: if the scored
model carries an edit, the original runs inside `ModelEdit.prompt_lengths`, with the prompt's tokens
counted by the same tokenizer and settings. Other models are scored by the original alone.
"""

import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from baft_easyedit.hooks import ModelEdit, attached_edit

Scorer = Callable[..., Any]
Bridge = Callable[[Scorer, Mapping[str, Any], ModelEdit], Any]
"""Called with EasyEdit's function, its arguments by name, and the edit of the scored model."""


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
        if edit is None:
            return original(*args, **kwargs)
        return bridge(original, call.arguments, edit)

    score._baft_bridge = True  # type: ignore[attr-defined]
    return score


def prompt_token_counts(
    tok: Any,
    hparams: Any,
    prompts: Sequence[str],
    targets: Sequence[str],
    *,
    locality: bool = False,
) -> list[int]:
    """Count prompt tokens as EasyEdit's `test_prediction_acc` does.

    Args:
        tok: The tokenizer it is called with.
        hparams: The hyper-parameters it is called with: `max_length`, `use_chat_template`.
        prompts: The prompts.
        targets: Their targets; only for the limit of length, which depends on the longest text.
        locality: Whether it scores locality, for which it never uses the chat template.

    Returns:
        The number of tokens of each prompt, special tokens included.
    """
    if getattr(hparams, "use_chat_template", False) and not locality:
        messages = [[{"role": "user", "content": prompt}] for prompt in prompts]
        prompts = tok.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    longest = max(len(tok.encode(f"{p} {t}")) for p, t in zip(prompts, targets, strict=True))
    encoded = tok(list(prompts), truncation=True, max_length=max(hparams.max_length, longest + 1))
    return [len(ids) for ids in encoded["input_ids"]]


def _as_list(texts: str | Sequence[str]) -> list[str]:
    """Return one text, or several, as a list."""
    return [texts] if isinstance(texts, str) else list(texts)


@contextmanager
def _lengths_given_by_generate(model: Any, edit: ModelEdit) -> Iterator[None]:
    """Take the prompt lengths from each call of `model.generate` inside this context.

    Without a cache, every step of a generation is a forward of prompt and output together.
    """
    generate, patched = model.generate, "generate" in vars(model)

    def generate_with_lengths(*args: Any, **kwargs: Any) -> Any:
        mask = kwargs.get("attention_mask")
        if mask is None:
            mask = torch.ones_like(kwargs["input_ids"] if "input_ids" in kwargs else args[0])
        with edit.prompt_lengths(mask.sum(-1)):
            return generate(*args, **kwargs)

    model.generate = generate_with_lengths
    try:
        yield
    finally:
        if patched:
            model.generate = generate
        else:
            del model.generate  # the method of the class shows again


def _score_prediction(original: Scorer, call: Mapping[str, Any], edit: ModelEdit) -> Any:
    """Score tokens of the targets, teacher-forced or (`vanilla_generation`) generated."""
    if call.get("vanilla_generation"):
        return _generate(original, call, edit)
    prompts, targets = _as_list(call["prompts"]), _as_list(call["targets"])
    lengths = prompt_token_counts(
        call["tok"], call["hparams"], prompts, targets, locality=call["locality"]
    )
    with edit.prompt_lengths(lengths):
        return original(**call)


def _generate(original: Scorer, call: Mapping[str, Any], edit: ModelEdit) -> Any:
    """Run a function that calls `model.generate`."""
    with _lengths_given_by_generate(call["model"], edit):
        return original(**call)


def _score_perplexity(original: Scorer, call: Mapping[str, Any], edit: ModelEdit) -> Any:
    """Score the perplexity of targets; EasyEdit passes no attention mask, so padding counts."""
    prompts, targets = _as_list(call["prompt"]), _as_list(call["target_new"])
    tok = call["tok"]
    texts = [f"{prompt} {target}" for prompt, target in zip(prompts, targets, strict=True)]
    lengths = [len(ids) for ids in tok(prompts, truncation=True)["input_ids"]]
    if tok.padding_side == "left":
        widths = [len(ids) for ids in tok(texts, truncation=True)["input_ids"]]
        lengths = [n + max(widths) - width for n, width in zip(lengths, widths, strict=True)]
    with edit.prompt_lengths(lengths):
        return original(**call)


def _score_text(original: Scorer, call: Mapping[str, Any], edit: ModelEdit) -> Any:
    """Score how probable the prompts themselves are: there is no answer in the text."""
    encoded = call["tok"](_as_list(call["prompt"]), truncation=True)
    with edit.prompt_lengths([max(len(ids) for ids in encoded["input_ids"])]):
        return original(**call)


def _score_continuation(original: Scorer, call: Mapping[str, Any], edit: ModelEdit) -> Any:
    """Score generated continuations; EasyEdit's own loop may feed a prompt in pieces."""
    if call.get("vanilla_generation"):
        return _generate(original, call, edit)
    lengths = [len(ids) for ids in call["tok"](_as_list(call["prefixes"]))["input_ids"]]
    with edit.prompt_lengths(lengths):
        return original(**call)
