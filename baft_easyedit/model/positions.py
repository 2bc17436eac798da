"""Which token positions are intervened on: the last P prompt tokens and every answer token.

The rule counts real tokens (not padding), so it does not depend on the padding side. The rank of a
token is the number of real tokens up to and including it. A real token is intervened on if
rank > n_prompt - P. The prompt length n_prompt of a row is the first of these that is known:

1. the length given by `prompt_lengths`;
2. the real tokens in the columns that `generate` was called with;
3. the real tokens before the first label;
4. the whole input, less k - 1 tokens if `logits_to_keep` is k (generation verifies guesses so).

On a key-value cache that is not empty, every new token counts as output, unless 1 is known, or 2
and the cache ends inside the prompts (`generate` reads them in chunks). A call whose prompt length
cannot be read is refused. Needs torch only.

Shapes: B batch, T tokens of this forward, S = past + T tokens in all.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from baft_easyedit.model.inspect import CACHE_NAMES

IGNORED_LABEL = -100

PromptLengths = Sequence[int] | Tensor


def first_edited(prompt_length: int, num_prompt_positions: int) -> int:
    """Return the index (from 0) of the first intervened token of a text.

    Args:
        prompt_length: n_prompt.
        num_prompt_positions: P.
    """
    return max(0, prompt_length - num_prompt_positions)


def edit_positions(
    real: Tensor,
    num_new: int,
    num_prompt_positions: int,
    *,
    labels: Tensor | None = None,
    prompt_lengths: PromptLengths | None = None,
    prompt_width: int | None = None,
    num_guessed: int = 0,
) -> Tensor:
    """Apply the rule of this module to the tokens of a forward.

    Args:
        real: True where a token is not padding, over past and new tokens, [B, S].
        num_new: T, the number of new tokens, the last T of S.
        num_prompt_positions: P, how many of the last prompt tokens are edited.
        labels: Training labels of a forward without a past, [B, S]; -100 is ignored.
        prompt_lengths: Real prompt tokens of each row. One value serves all rows; fewer values than
            rows are repeated (beams and `num_return_sequences` repeat rows).
        prompt_width: How many columns are prompts, padding included; more than S if later chunks of
            the prompts follow.
        num_guessed: How many of the last tokens of an input without a past are output.

    Returns:
        True where the intervention applies, [B, T].

    Raises:
        ValueError: If the number of `prompt_lengths` does not divide the number of rows.
    """
    num_past = real.shape[1] - num_new
    if prompt_lengths is None and num_past > 0 and num_past >= (prompt_width or 0):
        return real[:, num_past:]
    rank = real.long().cumsum(-1)  # [B, S]
    if prompt_lengths is not None:
        n_prompt = _per_row(prompt_lengths, real)
    elif prompt_width is not None:
        beyond = max(0, prompt_width - real.shape[1])  # columns of later chunks, all of them real
        n_prompt = real[:, :prompt_width].sum(-1, keepdim=True) + beyond
    elif labels is not None:
        n_prompt = _tokens_before_answer(labels, real)
    else:
        n_prompt = rank[:, -1:] - num_guessed
    return (real & (rank > n_prompt - num_prompt_positions))[:, num_past:]


def _per_row(prompt_lengths: PromptLengths, real: Tensor) -> Tensor:
    """Return the given prompt lengths, one a row, [B, 1]."""
    lengths = torch.as_tensor(prompt_lengths, device=real.device).reshape(-1)
    num_rows = real.shape[0]
    if lengths.numel() == 0 or num_rows % lengths.numel():
        raise ValueError(
            f"prompt_lengths has {lengths.numel()} values, which do not divide the {num_rows} rows "
            "of the forward pass: give one value for each prompt of the batch"
        )
    return lengths.repeat_interleave(num_rows // lengths.numel())[:, None]


def _tokens_before_answer(labels: Tensor, real: Tensor) -> Tensor:
    """Return the number of real tokens before the first label of each row, [B, 1]."""
    before_answer = ((labels != IGNORED_LABEL) & real).long().cumsum(-1) == 0  # [B, S]
    return (real & before_answer).sum(-1, keepdim=True)


def real_tokens(attention_mask: Any, batch: int, total: int, device: torch.device) -> Tensor:
    """Read from an attention mask of any form in transformers which past and new tokens are real.

    Args:
        attention_mask: None; [B, S]; [B, T] for the new tokens only; a prepared [B, 1, T, S] mask
            (boolean, or additive with 0 for "attend"); or a dict of those by layer type.
        batch: B.
        total: S.
        device: Device of the result.

    Returns:
        True where a token is real, [B, S].
    """
    if isinstance(attention_mask, Mapping):
        attention_mask = attention_mask.get(
            "full_attention", next(iter(attention_mask.values()), None)
        )
    if not isinstance(attention_mask, Tensor):
        return torch.ones(batch, total, dtype=torch.bool, device=device)
    if attention_mask.dim() == 4:
        if attention_mask.shape[2] == 1:  # after one new token, padding makes no difference
            return torch.ones(batch, total, dtype=torch.bool, device=device)
        attention_mask = _seen(attention_mask[:, 0], total)
    real = attention_mask[:, :total].to(device).bool().expand(batch, -1)
    missing = total - real.shape[1]
    return F.pad(real, (missing, 0), value=True) if missing else real


def _seen(mask: Tensor, total: int) -> Tensor:
    """Read which tokens are real from a prepared mask of causal attention.

    A padding token attends to nothing, or to everything, even to later tokens; real tokens do
    neither. A past token that no new token sees is padding, or has left a sliding window; it counts
    as real if the mask shows a window.

    Args:
        mask: Boolean, or additive with 0 for "attend", [B, T, columns], T above 1.
        total: S.

    Returns:
        True where a token is real, [B, S], or fewer if there are fewer columns.
    """
    sees = mask if mask.dtype == torch.bool else mask == 0
    num_past = (
        min(total, sees.shape[2]) - sees.shape[1]
    )  # a window's cache has its last columns only
    sees_itself = sees.diagonal(num_past, 1, 2)  # [B, T]
    sees_next = F.pad(sees, (0, 1), value=False).diagonal(num_past + 1, 1, 2)
    new = sees_itself & ~sees_next  # [B, T]
    past = (sees & new[..., None])[..., :num_past].any(1)  # [B, num_past]
    first = sees.int().argmax(-1)  # [B, T]  the first column that each new token sees
    slides = first[:, -1:] > first[:, :1]  # [B, 1]
    return torch.cat([past | slides, new], 1)


def positions_of_call(
    forward: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    num_prompt_positions: int,
    prompt_lengths: PromptLengths | None = None,
    prompt_width: int | None = None,
) -> Tensor | None:
    """Apply `edit_positions` to the arguments of a causal language model's forward.

    Args:
        forward: The model's forward method, whose signature names positional arguments.
        args: Positional arguments of the call.
        kwargs: Keyword arguments of the call.
        num_prompt_positions: P.
        prompt_lengths: See `edit_positions`.
        prompt_width: See `edit_positions`.

    Returns:
        True where the intervention applies, [B, T]; None if the call has no tokens.

    Raises:
        ValueError: If the number of `prompt_lengths` does not divide the number of rows, or there
            are none and the call does not tell where its prompts end.
    """
    given = _by_name(forward, args, kwargs)
    tokens = _tokens(given)
    if tokens is None:
        return None
    batch, num_new = tokens.shape[:2]
    num_past = _past_length(given["cache"])
    mask, total = given.get("attention_mask"), num_past + num_new
    if prompt_width is not None and given["cache"] is not None:
        total = _total_length(mask, given["cache"], num_past, num_new, prompt_width)
    real = real_tokens(mask, batch, total, tokens.device)
    kept = given.get("logits_to_keep")
    num_kept = kept if isinstance(kept, int) else 0
    if prompt_lengths is None and prompt_width is None:
        _check_readable(given, num_kept, num_past, real[:, num_past:], num_prompt_positions)
    return edit_positions(
        real,
        num_new,
        num_prompt_positions,
        labels=given.get("labels"),
        prompt_lengths=prompt_lengths,
        prompt_width=prompt_width,
        num_guessed=min(max(0, num_kept - 1), num_new),
    )


def says_nothing_of_prompts(
    forward: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    num_prompt_positions: int,
) -> bool:
    """Tell whether a forward may hold answers without saying so: more than P tokens and no labels.

    A forward that asks for a cache, or brings one, belongs to a generation and holds none. For the
    arguments see `positions_of_call`.
    """
    given = _by_name(forward, args, kwargs)
    tokens = _tokens(given)
    names = ("labels", "cache", "use_cache", "logits_to_keep", "num_logits_to_keep")
    told = any(isinstance(given.get(name), Tensor) or bool(given.get(name)) for name in names[2:])
    told = told or any(given.get(name) is not None for name in names[:2])
    return tokens is not None and tokens.shape[1] > num_prompt_positions and not told


def _by_name(
    forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Mapping[str, Any]:
    """Return a forward's arguments by name; the cache is named `cache`, whatever the version."""
    names = inspect.signature(forward).parameters if args else ()
    given = {**kwargs, **dict(zip(names, args, strict=False))}
    caches = [given[name] for name in CACHE_NAMES if given.get(name) is not None]
    return given | {"cache": caches[0] if caches else None}


def _tokens(given: Mapping[str, Any]) -> Tensor | None:
    """Return the tokens of a call [B, T], or their embeddings [B, T, D]; None if there are none."""
    ids = given.get("input_ids")
    return given.get("inputs_embeds") if ids is None else ids


def _check_readable(
    given: Mapping[str, Any],
    num_kept: int,
    num_past: int,
    real: Tensor,
    num_prompt_positions: int,
) -> None:
    """Raise ValueError if the arguments of a call do not tell where its prompts end.

    A call with `logits_to_keep` 1 belongs to a generation; k > 1 means that it verifies k - 1
    guessed tokens.

    Args:
        given: The arguments by name.
        num_kept: `logits_to_keep`, 0 for all.
        num_past: Tokens in the cache.
        real: True where a new token is not padding, [B, T].
        num_prompt_positions: P.
    """
    num_new = real.shape[1]
    if num_past and num_kept == 1 and num_new > num_prompt_positions:
        raise ValueError(
            f"prompt_lengths must be given to go on with a prompt on a cache: {num_new} new tokens "
            f"after {num_past} may be a later part of a prompt (prefill_chunk_size, another turn "
            "of a chat) or an answer; give the tokens of each whole prompt: "
            "`with model_edit.prompt_lengths([...])`"
        )
    if num_past == 0 and num_kept == 1 and given.get("use_cache") is False:
        raise ValueError(
            "prompt_lengths must be given to generate with use_cache=False: each forward repeats "
            "the prompt with what was generated; use the cache, or give the tokens of each prompt: "
            "`with model_edit.prompt_lengths([...])`"
        )
    if _is_packed(given, real):
        raise ValueError(
            "each row must hold one sequence, but position_ids start again inside a row (packed "
            "or continuously batched input): give each sequence its own row, with padding"
        )


def _is_packed(given: Mapping[str, Any], real: Tensor) -> bool:
    """Tell whether a row holds several sequences, one after another."""
    if given.get("cu_seq_lens_q") is not None:
        return True
    positions = given.get("position_ids")
    if not isinstance(positions, Tensor) or positions.dim() != 2 or positions.is_meta:
        return False
    if positions.shape[1] == 1 or positions.shape[1] != real.shape[1]:
        return False
    starts_again = positions[:, 1:] <= positions[:, :-1]  # [B or 1, T - 1]
    both_real = (real[:, 1:] & real[:, :-1]).to(positions.device)
    return bool((starts_again & both_real).any())


def _total_length(mask: Any, cache: Any, num_past: int, num_new: int, prompt_width: int) -> int:
    """Return S of a forward of a generation, as the mask has it: not every cache counts all tokens.

    Where the mask is not of tokens, and the cache may not count all, a single token is output.

    Args:
        mask: See `real_tokens`.
        cache: The key-value cache.
        num_past: Tokens in it, as it has them.
        num_new: T.
        prompt_width: See `edit_positions`.
    """
    total = num_past + num_new
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] >= total:
        return mask.shape[1]
    is_output = num_past > 0 and num_new == 1 and not _counts_all(cache)
    return max(total, prompt_width + 1) if is_output else total


def _counts_all(cache: Any) -> bool:
    """Tell whether a cache surely counts the tokens that have left its window, too."""
    first = next(iter(getattr(cache, "layers", ())), None)
    is_sliding = bool(getattr(first, "is_sliding", False))
    return first is not None and (not is_sliding or hasattr(first, "cumulative_length"))


def _past_length(cache: Any) -> int:
    """Return the number of tokens in a key-value cache, a `Cache` object or the older tuples."""
    if cache is None:
        return 0
    if hasattr(cache, "get_seq_length"):
        return int(cache.get_seq_length())
    return int(cache[0][0].shape[-2])
