"""Attention of few tokens by matrix products. Needs torch only.

torch's fused kernel for the CPU is made for long texts: in a step of learning on few columns it
takes up to twice as long, and it computes the gradients of keys and values of the past, which are
given.

Shapes: B bins, N heads, W columns, S columns of the past, H head size.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

_MOST_COLUMNS = 128
"""W that gains: the memory goes with its square."""

_LEAST_PAST = 64
"""S from which on it gains to treat the past apart."""


class AttentionByProducts(TorchFunctionMode):
    """Lets `scaled_dot_product_attention` do so in this context, where it gains; in this thread.

    Args:
        num_past: S; keys of another number are left to torch.
    """

    def __init__(self, num_past: int) -> None:
        super().__init__()
        self._num_past = num_past

    def __torch_function__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Call a function of torch."""
        kwargs = kwargs or {}
        is_attention = function is F.scaled_dot_product_attention
        if is_attention and self._gains(*args, **kwargs):
            return attend(*args, **kwargs)
        return function(*args, **kwargs)

    def _gains(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **options: Any,
    ) -> bool:
        """Tell whether attention, called as torch's, is what `attend` does, and that is sooner."""
        return (
            query.device.type == "cpu"
            and query.dtype == torch.float32
            and query.shape[:-2] == key.shape[:-2] == value.shape[:-2]  # no fewer heads of keys
            and query.shape[-2] == key.shape[-2] - self._num_past
            and query.shape[-2] <= _MOST_COLUMNS
            and attn_mask is not None
            and attn_mask.dtype == query.dtype
            and not dropout_p
            and not is_causal
            and not options.keys() - {"scale", "enable_gqa"}
        )


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor,
    *_off: Any,
    scale: float | None = None,
    **_also_off: Any,
) -> Tensor:
    """Return what `scaled_dot_product_attention` does.

    Args:
        query: [B, N, W, H].
        key: Of the past, which gets no gradient, and of these columns, [B, N, S + W, H].
        value: The same.
        attn_mask: What is added to the scores, [B, 1, W, S + W].
        scale: Of the scores; None for 1 / sqrt(H).
    """
    query = query * (query.shape[-1] ** -0.5 if scale is None else scale)
    num_past = key.shape[-2] - query.shape[-2]
    if num_past < _LEAST_PAST:
        return (query @ key.mT + attn_mask).softmax(-1) @ value
    past_key, new_key = key[..., :num_past, :].detach(), key[..., num_past:, :]
    past_value, new_value = value[..., :num_past, :].detach(), value[..., num_past:, :]
    scores = torch.cat([query @ past_key.mT, query @ new_key.mT], -1)
    sizes = [num_past, query.shape[-2]]
    of_past, of_new = (scores + attn_mask).softmax(-1).split_with_sizes(sizes, -1)
    return of_past @ past_value + of_new @ new_value
