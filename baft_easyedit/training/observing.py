"""Observe what a model computes, and tell whether it still computes the same. Needs torch only."""

from collections.abc import Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from baft_easyedit.model.locks import of_this_thread

_TOLERANCE = {
    torch.float64: 1e-6,
    torch.float32: 1e-4,
    torch.bfloat16: 5e-2,
    torch.float16: 1e-2,
}

_TOLERANCE_TF32 = 5e-3


def tolerance_of(values: Tensor) -> float:
    """Return the relative difference that rounding may make when values are computed again."""
    tolerance = _TOLERANCE.get(values.dtype, 0.0)
    if values.is_cuda:  # CUDA may multiply matrices in TF32
        tolerance = max(tolerance, _TOLERANCE_TF32)
    return tolerance


def is_close(values: Tensor, others: Tensor, tolerance: float) -> bool:
    """Tell whether two tensors differ by at most a share of their mean absolute value.

    The largest value would be a poor scale, as a few values of hidden states dwarf all others.
    """
    a, b = values.float(), others.float()
    return a.shape == b.shape and float((a - b).abs().sum()) <= tolerance * float(b.abs().sum())


def model_version(model: nn.Module) -> Hashable:
    """Return a key that changes when a weight of the model is moved, replaced or written to.

    The key also changes with the choice of kernels, which round differently. It does not see writes
    through `Tensor.data`, hooks, or adapters that are switched. So whoever keeps results of a model
    must also compute one of them again (`own_texts`).
    """
    attention = getattr(getattr(model, "config", None), "_attn_implementation", None)
    weights = tuple((p.data_ptr(), p._version, p.dtype, p.device) for p in model.parameters())
    return torch.get_num_threads(), attention, weights


@contextmanager
def watching(layers: Sequence[nn.Module]) -> Iterator[list[list[Any]]]:
    """Collect the outputs of layers in this context and thread, before an edit acts on them.

    Yields:
        A list for each layer, of what its forwards return.
    """
    seen: list[list[Any]] = [[] for _ in layers]
    with ExitStack() as hooks:
        for layer, outputs in zip(layers, seen, strict=True):

            def note(_module: nn.Module, _args: Any, output: Any, to: list[Any] = outputs) -> None:
                to.append(output)

            handle = layer.register_forward_hook(of_this_thread(note), prepend=True)
            hooks.callback(handle.remove)
        yield seen
