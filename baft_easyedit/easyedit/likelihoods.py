"""How likely a model finds given answers, teacher forced, several prompts and answers at a time."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from baft_easyedit.method.objective import token_losses
from baft_easyedit.model.batching import alike, padded
from baft_easyedit.model.hooks import with_prompt_lengths

Text = tuple[Sequence[int], int]
"""The tokens of a prompt with its answer, and how many of them are the prompt's."""


class Likelihood(NamedTuple):
    """How a model finds one answer."""

    nll: float
    """Mean negative log-likelihood of the answer's tokens, in nats; inf from a broken model."""
    accuracy: float
    """Share of its tokens that the model finds likeliest."""


def likelihoods(
    model: Any, tokenizer: Any, texts: Sequence[Text], batch_size: int, device: torch.device
) -> list[Likelihood]:
    """Return how likely the answer of each text is; texts of about one length share a batch.

    An edit of ours, and GRACE, which needs a batch size of 1, are told where the prompts end.
    """
    found: dict[int, Likelihood] = {}
    for group in alike([len(ids) for ids, _ in texts]):
        for start in range(0, len(group), batch_size):
            part = group[start : start + batch_size]
            scored = _of_batch(model, tokenizer, [texts[i] for i in part], device)
            found |= zip(part, scored, strict=True)
    return [found[i] for i in range(len(texts))]


@torch.no_grad()
def _of_batch(
    model: Any, tokenizer: Any, texts: Sequence[Text], device: torch.device
) -> list[Likelihood]:
    """Score the answers of one forward pass; padding behind a text changes nothing before it."""
    batch = padded([ids for ids, _ in texts], tokenizer, "right")
    inputs = {name: tensor.to(device) for name, tensor in batch.items()}
    lengths = [length for _, length in texts]
    for module in model.modules() if isinstance(model, nn.Module) else ():
        if type(module).__name__ == "GRACEAdapter":  # else it asks the answer's last token
            module.key_id = lengths[0] - 1  # type: ignore[assignment]
    with with_prompt_lengths(model, lengths):
        output = model(**inputs)
    logits = output if isinstance(output, Tensor) else output.logits
    scored = []
    for row, (ids, length) in zip(logits, texts, strict=True):
        predicted = row[length - 1 : len(ids) - 1]  # [A, V]
        answer = torch.tensor(ids[length:], device=row.device)
        hits = (predicted.argmax(-1) == answer).float()
        nll = token_losses(predicted, answer).mean().nan_to_num(torch.inf, torch.inf)
        scored.append(Likelihood(nll.item(), hits.mean().item()))
    return scored
