"""Recordings of texts for the prefix cache, within a memory limit. Needs torch only.

Shapes: n computed columns, s columns before them, D hidden size, N heads, H head size.
"""

from collections import OrderedDict
from collections.abc import Hashable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from baft_easyedit.training.requests import TextRow

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


class Recording(NamedTuple):
    """The states of one text that no edit can change."""

    hidden: Tensor
    """Output of layer l1 in the computed columns, before the edit, [n, D]."""
    past: dict[int, tuple[Tensor, Tensor]]
    """Keys and values of the columns before them, by layer above l1, [N, s, H] each."""

    @property
    def tensors(self) -> Iterable[Tensor]:
        """All tensors of the recording."""
        yield self.hidden
        for states in self.past.values():
            yield from states

    @property
    def num_bytes(self) -> int:
        """Memory of all tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors)

    def is_close(self, other: "Recording", tolerance: float) -> bool:
        """Tell whether two recordings are equal up to rounding; see the function `is_close`."""
        if self.past.keys() != other.past.keys():
            return False
        pairs = zip(self.tensors, other.tensors, strict=True)
        return all(is_close(a, b, tolerance) for a, b in pairs)


class Recordings:
    """Recordings by text; beyond a memory limit, the least recently used ones are dropped.

    Args:
        limit_bytes: Memory limit of all recordings.
    """

    def __init__(self, limit_bytes: int = 2**28) -> None:
        self.layer_extras: tuple[Any, ...] | None = None
        """The values that layer l1 returned after its hidden states, without tensors; None if the
        layer returned a bare tensor."""
        self.limit_bytes = limit_bytes
        self.num_bytes = 0
        """Memory of all recordings."""
        self._by_row: OrderedDict[TextRow, Recording] = OrderedDict()
        self._made_with: Hashable = None

    def __len__(self) -> int:
        return len(self._by_row)

    def __iter__(self) -> Iterator[TextRow]:
        return iter(self._by_row)

    def __contains__(self, row: TextRow) -> bool:
        return row in self._by_row

    def __reduce__(self) -> Any:
        """Leave the recordings out of copies and files: another model makes its own."""
        return Recordings, (self.limit_bytes,)

    def make_valid_for(self, version: Hashable) -> None:
        """Forget all recordings that another version of the model made."""
        if version != self._made_with:
            self.clear()
            self._made_with = version

    def clear(self) -> None:
        """Forget all recordings."""
        self._by_row.clear()
        self.num_bytes = 0

    def get(self, row: TextRow) -> Recording | None:
        """Return the recording of a text; None if there is none, or no longer."""
        if row not in self._by_row:
            return None
        self._by_row.move_to_end(row)
        return self._by_row[row]

    def put(self, row: TextRow, recording: Recording) -> None:
        """Keep a recording; the least recently used ones make room for it."""
        self._by_row[row] = recording
        self.num_bytes += recording.num_bytes
        while self.num_bytes > self.limit_bytes:
            self.num_bytes -= self._by_row.popitem(last=False)[1].num_bytes


def model_version(model: nn.Module) -> Hashable:
    """Return a key that changes when a weight of the model is moved, replaced or written to.

    The key also changes with the choice of kernels, which round differently. It does not see writes
    through `Tensor.data`, hooks, or adapters that are switched. So whoever keeps results of a model
    must also compute one of them again (`PrefixCache._check_recordings`, `OwnStates`).
    """
    attention = getattr(getattr(model, "config", None), "_attn_implementation", None)
    weights = tuple((p.data_ptr(), p._version, p.dtype, p.device) for p in model.parameters())
    return torch.get_num_threads(), attention, weights
