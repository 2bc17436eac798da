"""A downstream task before and after editing: PIQA, the choice with the lower perplexity.

(Liu et al. 2025, Table 8.) Shapes: B texts, T tokens, V vocabulary.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from baft_easyedit.bench.datasets import PiqaItem
from baft_easyedit.model.batching import padded
from baft_easyedit.model.hooks import attached_edit
from baft_easyedit.model.prompt_format import PromptFormat

_BATCH = 32


@torch.no_grad()
def piqa_accuracy(model: Any, tok: Any, items: Sequence[PiqaItem]) -> float:
    """Return how often a model finds the right solution of a goal the less surprising one.

    Args:
        model: A causal language model, edited or not, that takes token ids and a mask.
        tok: Its tokenizer.
        items: Questions with two solutions each.

    Raises:
        ValueError: If there are no items.
    """
    if not items:
        raise ValueError("items must hold at least one question; got none")
    pairs = [(item.goal, solution) for item in items for solution in (item.sol1, item.sol2)]
    losses = torch.cat(
        [_nats_per_token(model, tok, pairs[i : i + _BATCH]) for i in range(0, len(pairs), _BATCH)]
    )
    chosen = losses.reshape(-1, 2).argmin(-1)  # [number of items]
    right = torch.tensor([item.label for item in items])
    return float((chosen == right).float().mean())


def _nats_per_token(model: Any, tok: Any, pairs: Sequence[tuple[str, str]]) -> Tensor:
    """Return the mean loss [B] of each solution after its goal; log perplexity."""
    form = PromptFormat()
    batch = padded([form.whole_ids(goal, solution, tok) for goal, solution in pairs], tok, "right")
    lengths = torch.tensor([len(form.prompt_ids(goal, tok)) for goal, _ in pairs])  # [B]
    edit = attached_edit(model) if isinstance(model, torch.nn.Module) else None
    device = next(model.parameters()).device
    ids, mask = batch["input_ids"].to(device), batch["attention_mask"].to(device)
    with edit.prompt_lengths(lengths) if edit is not None else nullcontext():
        output = model(input_ids=ids, attention_mask=mask)
    logits = output if isinstance(output, Tensor) else output.logits
    loss = F.cross_entropy(logits[:, :-1].float().mT, ids[:, 1:], reduction="none")  # [B, T - 1]
    columns = torch.arange(1, ids.shape[1], device=device)
    scored = mask[:, 1:].bool() & (columns >= lengths.to(device)[:, None])
    return ((loss * scored).sum(-1) / scored.sum(-1).clamp_min(1)).cpu()
