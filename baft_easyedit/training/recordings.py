"""What the prefix cache keeps of texts, within bounds of memory. Needs torch only.

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
    """Return how far what is computed again may be off, as a share of its size."""
    tolerance = _TOLERANCE.get(values.dtype, 0.0)
    if values.is_cuda:  # which may multiply matrices in TF32
        tolerance = max(tolerance, _TOLERANCE_TF32)
    return tolerance


def is_close(values: Tensor, others: Tensor, tolerance: float) -> bool:
    """Tell whether values are others of the same shape, but for this share of their mean size.

    Not of their largest value: some hidden states have a few that exceed all others.
    """
    a, b = values.float(), others.float()
    return a.shape == b.shape and float((a - b).abs().sum()) <= tolerance * float(b.abs().sum())


class Recording(NamedTuple):
    """What of a text no edit can change."""

    hidden: Tensor
    """Output of layer l1 in the columns that are computed, [n, D]."""
    past: dict[int, tuple[Tensor, Tensor]]
    """Keys and values of the columns before them in each later layer, [N, s, H]."""

    @property
    def tensors(self) -> Iterable[Tensor]:
        """All of them."""
        yield self.hidden
        for states in self.past.values():
            yield from states

    @property
    def num_bytes(self) -> int:
        """Memory that it takes."""
        return sum(t.numel() * t.element_size() for t in self.tensors)

    def is_close(self, other: "Recording", tolerance: float) -> bool:
        """Tell whether each tensor is the other's; see the function `is_close`."""
        if self.past.keys() != other.past.keys():
            return False
        pairs = zip(self.tensors, other.tensors, strict=True)
        return all(is_close(a, b, tolerance) for a, b in pairs)


class Recordings:
    """Recordings of texts, those used last, up to a number of bytes.

    Args:
        limit_bytes: Of all recordings.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.layer_extras: tuple[Any, ...] | None = None
        """What the last recorded layer returned after its hidden states, without tensors; None if
        it returned a bare tensor."""
        self.limit_bytes = limit_bytes
        self.num_bytes = 0
        """Memory that all of them take."""
        self._by_row: OrderedDict[TextRow, Recording] = OrderedDict()
        self._made_with: Hashable = None

    def __len__(self) -> int:
        return len(self._by_row)

    def __iter__(self) -> Iterator[TextRow]:
        return iter(self._by_row)

    def __contains__(self, row: TextRow) -> bool:
        return row in self._by_row

    def __reduce__(self) -> Any:
        """Copy, and write to a file, an empty one: another model makes its own."""
        return Recordings, (self.limit_bytes,)

    def make_valid_for(self, version: Hashable) -> None:
        """Forget everything unless it was made with this version of the model."""
        if version != self._made_with:
            self.clear()
            self._made_with = version

    def clear(self) -> None:
        """Forget everything."""
        self._by_row.clear()
        self.num_bytes = 0

    def get(self, row: TextRow) -> Recording | None:
        """Return the recording of a text; None if there is none (any more)."""
        if row not in self._by_row:
            return None
        self._by_row.move_to_end(row)
        return self._by_row[row]

    def put(self, row: TextRow, recording: Recording) -> None:
        """Keep a recording; what was not used for the longest time makes room."""
        self._by_row[row] = recording
        self.num_bytes += recording.num_bytes
        while self.num_bytes > self.limit_bytes:
            self.num_bytes -= self._by_row.popitem(last=False)[1].num_bytes


def model_version(model: nn.Module) -> Hashable:
    """Return what changes when a weight of the model is moved, replaced or written to.

    And when it computes by other kernels, which round otherwise. Writes through `Tensor.data` are
    not seen, nor adapters that are switched on or off: who keeps what a model computed looks
    whether it still computes that.
    """
    attention = getattr(getattr(model, "config", None), "_attn_implementation", None)
    weights = tuple((p.data_ptr(), p._version, p.dtype, p.device) for p in model.parameters())
    return torch.get_num_threads(), attention, weights
