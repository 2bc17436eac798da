"""Calls of EasyEdit's other methods, put right: batch size, tokenizer, and what undoes the edit.

`peer_fixes.prepare_method` wraps an editor's method in these.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from typing import Any

import torch

from baft_easyedit.easyedit.host import loaded_generation
from baft_easyedit.easyedit.peer_methods import NEED_TEXTS, batchable
from baft_easyedit.easyedit.peer_prompts import tokenizer_behind_templates

APPEND_ANSWERS = ("ROME", "R-ROME", "SimIE", *NEED_TEXTS)
"""Methods that read an answer behind its prompt as text."""

Apply = Callable[..., tuple[Any, Any]]
"""A method's entry point: returns the edited model, and what undoes the edit."""


def calls_put_right(name: str, apply: Apply) -> Apply:
    """Wrap a method's entry point: one mini-batch a call, and a tokenizer that suits the method.

    `BaseEditor.batch_edit` passes `batch_size` requests a call. Methods count on that: UltraEdit
    ignores further ones and asserts that there are not fewer, FT and LoRA split them up.

    Args:
        name: A name of `peers.PEERS`.
        apply: The method's function, as EasyEdit's `ALG_DICT` has it.
    """

    @functools.wraps(apply)
    def apply_to_model(
        model: Any, tok: Any, requests: Sequence[Any], hparams: Any, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        if batchable(name, loaded_generation()):
            hparams.batch_size = len(requests)
            if hasattr(hparams, "batch_size_once"):  # UltraEdit's part of it, a divisor
                hparams.batch_size_once = 1
        suited = tokenizer_for(name, tok, hparams)
        suited = tokenizer_behind_templates(suited, requests, hparams)
        return apply(model, suited, requests, hparams, *args, **kwargs)

    further: dict[str, Callable[[Apply], Apply]] = {
        "EMMET": _returning_weights,
        "UltraEdit": _returning_weights_of_modules,
        "KN": _undoing_all,
        "MELO": _counting_blocks,
    }
    return further[name](apply_to_model) if name in further else apply_to_model


def _returning_weights(apply: Apply) -> Apply:
    """Let EMMET return the weights that it saved, which it drops unless it is told not to."""

    def apply_to_model(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
        return apply(*args, **{**kwargs, "keep_original_weight": True})

    return apply_to_model


def _returning_weights_of_modules(apply: Apply) -> Apply:
    """Let UltraEdit return the weights that it changes.

    It looks for parameters by the names of modules, finds none, and returns nothing to restore.
    """

    def apply_to_model(
        model: Any, tok: Any, requests: Any, hparams: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        names = [f"{path.removesuffix('.weight')}.weight" for path in hparams.inner_params]
        kept = {name: model.get_parameter(name).detach().clone() for name in names}
        edited, _ = apply(model, tok, requests, hparams, **kwargs)
        return edited, kept

    return apply_to_model


def _undoing_all(apply: Apply) -> Apply:
    """Return what undoes all of KN's edits since the last time; each knows of its own only."""
    undo: list[Callable[[], None]] = []

    def undo_all() -> None:
        while undo:
            undo.pop()()

    def apply_to_model(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
        edited, undo_one = apply(*args, **kwargs)
        undo.append(undo_one)
        return edited, undo_all

    return apply_to_model


def _counting_blocks(apply: Apply) -> Apply:
    """Refuse an edit for which MELO has no LoRA block left; it would train none, and say nothing.

    Raises:
        ValueError: From the wrapped method, if there have been as many edits as blocks.
    """

    def apply_to_model(model: Any, tok: Any, requests: Any, hparams: Any, **kwargs: Any) -> Any:
        num_blocks = hparams.grace.num_block
        edited_before = hasattr(model, "grace_layer")
        if edited_before and model.model.get_submodule(model.grace_layer).block_id >= num_blocks:
            raise ValueError(
                f"MELO's grace.num_block must be at least the number of edits in a row; got "
                f"{num_blocks}: set more"
            )
        return apply(model, tok, requests, hparams, **kwargs)

    return apply_to_model


def tokenizer_for(name: str, tok: Any, hparams: Any) -> Any:
    """Return a tokenizer that does what a method counts on; the same one for most.

    Args:
        name: A name of `peers.PEERS`.
        tok: The editor's tokenizer, which stays as it is.
        hparams: The method's hyper-parameters.
    """
    if name not in APPEND_ANSWERS and name != "KN":
        return tok
    suited = copy(tok)
    if name == "KN":
        # It takes the tokens of answers with the one that begins a text, as GPT-2 has none.
        suited.encode = functools.partial(tok.encode, add_special_tokens=False)
    else:
        suited.decode = functools.partial(_decode_with_space, tok)
    return _EametTokenizer(suited, hparams.model_name) if name == "EAMET" else suited


def _decode_with_space(tok: Any, ids: Any, **kwargs: Any) -> str:
    """Decode with the space that a SentencePiece tokenizer drops before the first word.

    ROME and its kin append all but the last token of an answer to the prompt as text, and count on
    finding the same tokens there: `prompt?Taur` has others than `prompt? Taur`.
    """
    text: str = tok.decode(ids, **kwargs)
    tokens = tok.convert_ids_to_tokens(torch.as_tensor(ids).reshape(-1).tolist())
    return " " + text if tokens and tokens[0].startswith("▁") and text[:1] != " " else text


class _EametTokenizer:
    """A tokenizer that keeps the token that begins a text, but not in answers.

    EAMET sets `add_bos_token = False`, to have answers without it, and never takes that back: it
    edits, and all later texts are scored, without the token that Llamas always begin with. It does
    strip the token from answers itself for models with some names.
    """

    def __init__(self, tok: Any, model_name: str) -> None:
        strips_itself = any(part in model_name.lower() for part in ("llama-3.1", "gemma"))
        self.__dict__.update(_tok=tok, _bare_answers=not strips_itself)

    def __call__(self, text: Any, **kwargs: Any) -> Any:
        """Tokenise prompts, which come in lists, or an answer, which comes alone."""
        if isinstance(text, str) and self._bare_answers:
            kwargs["add_special_tokens"] = False
        return self._tok(text, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tok, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "add_bos_token":
            setattr(self._tok, name, value)


def space_is_part_of_token(request: Mapping[str, Any], tok: Any) -> bool:
    """Tell whether a target's tokens in a text are those of the target with its space.

    Args:
        request: A request, with its `prompt` and `target_new`.
        tok: The tokenizer.
    """
    text = tok.encode(request["prompt"] + " " + request["target_new"], add_special_tokens=False)
    bare = tok.encode(request["target_new"], add_special_tokens=False)
    spaced = tok.encode(" " + request["target_new"], add_special_tokens=False)
    return text[-len(bare) :] != bare and text[-len(spaced) :] == spaced
