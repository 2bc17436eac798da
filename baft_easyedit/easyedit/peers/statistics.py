"""Statistics of a model's keys on local texts, for MEMIT and its kin.

EasyEdit would download Wikipedia to compute these; `repairs` puts them where it keeps its own. A
key k is the input of a rewritten module, such as a layer's `mlp.down_proj`, at one token; I is its
width.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from baft_easyedit.model.batching import padded

_BATCH = 16
_MAX_LENGTH = 256
"""Longest text in tokens; the rest is cut."""
_SHARE = 0.7
"""Share of all directions that AlphaEdit edits in, if it has no threshold."""


def key_moments(
    model: nn.Module, tok: Any, texts: Sequence[str], modules: Sequence[str]
) -> dict[str, Tensor]:
    """Return the mean of k kᵀ over all tokens of some texts for each module, [I, I], fp32, CPU."""
    sums: dict[str, Tensor] = {}
    real = torch.empty(0)

    def adder(name: str) -> Any:
        def add(module: nn.Module, args: tuple[Tensor, ...]) -> None:  # noqa: ARG001
            keys = args[0][real].float()  # [N, I]
            product = keys.mT @ keys
            sums[name] = product if name not in sums else sums[name].add_(product)

        return add

    handles = [model.get_submodule(name).register_forward_pre_hook(adder(name)) for name in modules]
    device = next(model.parameters()).device
    ids = sorted((tok.encode(t, truncation=True, max_length=_MAX_LENGTH) for t in texts), key=len)
    try:
        with torch.no_grad():
            for start in range(0, len(ids), _BATCH):
                batch = padded(ids[start : start + _BATCH], tok, "right")
                inputs = {name: tensor.to(device) for name, tensor in batch.items()}
                real = inputs["attention_mask"].bool()  # [B, T]
                model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return {name: total.cpu() / sum(map(len, ids)) for name, total in sums.items()}


def null_space(moment: Tensor, threshold: float | None = None) -> Tensor:
    """Return AlphaEdit's projector on the directions that keys hardly use, [I, I], on the CPU.

    Args:
        moment: Mean of k kᵀ for an edited layer, [I, I].
        threshold: Take the eigenvectors with eigenvalues below this, as EasyEdit does; its 2e-2 is
            for 7B models and Wikipedia. If None, take a fixed share of those with the smallest.

    Raises:
        ValueError: If no direction is below the threshold.
    """
    values, vectors = torch.linalg.eigh(moment)  # [I], [I, I]  ascending
    count = round(_SHARE * len(values)) if threshold is None else int((values < threshold).sum())
    if count == 0:
        raise ValueError(
            f"nullspace_threshold must leave a direction; {threshold} is below all eigenvalues "
            f"(the least is {values[0]:.2g}): raise it, or set null to take a share"
        )
    unused = vectors[:, :count]
    return (unused @ unused.mT).cpu()
