"""What layer replay keeps of texts, within bounds of memory. Needs torch only.

Shapes: n computed columns, s columns before them, D hidden size, N heads, H head size.
"""

from collections import OrderedDict
from collections.abc import Hashable, Iterable, Iterator
from itertools import chain
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

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """Where its tensors are."""
        return tuple(t.device for t in self.tensors)

    def is_close(self, other: "Recording", tolerance: float) -> bool:
        """Tell whether each tensor is the other's; see the function `is_close`."""
        if self.past.keys() != other.past.keys():
            return False
        pairs = zip(self.tensors, other.tensors, strict=True)
        return all(is_close(a, b, tolerance) for a, b in pairs)

    def to(self, devices: Iterable[torch.device]) -> "Recording":
        """Bring each of its tensors to a device."""
        hidden, *states = (t.to(device) for t, device in zip(self.tensors, devices, strict=True))
        pairs = zip(states[::2], states[1::2], strict=True)
        return Recording(hidden, dict(zip(self.past, pairs, strict=True)))


class Recordings:
    """Recordings of texts, those used last, up to a number of bytes.

    A recording that has to go is spilled to CPU memory while there is room, and serves from there.

    Args:
        limit_bytes: Of all recordings where they are made.
        spill_bytes: Of those spilled; for models on the CPU leave it at 0.
    """

    def __init__(self, limit_bytes: int, spill_bytes: int = 0) -> None:
        self.layer_extras: tuple[Any, ...] | None = None
        """What the last recorded layer returned after its hidden states, without tensors; None if
        it returned a bare tensor."""
        self.limits = (limit_bytes, spill_bytes)
        self._limits = {"near": limit_bytes, "spilled": spill_bytes}
        self._tiers: dict[str, OrderedDict[TextRow, Recording]] = {
            tier: OrderedDict() for tier in self._limits
        }
        self._sizes = dict.fromkeys(self._limits, 0)
        self._devices: tuple[torch.device, ...] = ()
        self._made_with: Hashable = None

    def __len__(self) -> int:
        return sum(map(len, self._tiers.values()))

    def __iter__(self) -> Iterator[TextRow]:
        return chain.from_iterable(self._tiers.values())

    def __reduce__(self) -> Any:
        """Copy, and write to a file, an empty one: another model makes its own."""
        return Recordings, self.limits

    @property
    def num_bytes(self) -> int:
        """Memory that all of them take."""
        return sum(self._sizes.values())

    def make_valid_for(self, version: Hashable) -> None:
        """Forget everything unless it was made with this version of the model."""
        if version != self._made_with:
            self.clear()
            self._made_with = version

    def clear(self) -> None:
        """Forget everything."""
        for tier, recordings in self._tiers.items():
            recordings.clear()
            self._sizes[tier] = 0

    def __contains__(self, row: TextRow) -> bool:
        return any(row in recordings for recordings in self._tiers.values())

    def get(self, row: TextRow) -> Recording | None:
        """Return the recording of a text; None if there is none (any more)."""
        for recordings in self._tiers.values():
            if row in recordings:
                recordings.move_to_end(row)
                return recordings[row].to(self._devices)
        return None

    def put(self, row: TextRow, recording: Recording) -> None:
        """Keep a recording; what was not used for the longest time makes room."""
        self._devices = recording.devices
        on_cpu = [torch.device("cpu")] * len(self._devices)
        for gone, old in self._store("near", row, recording):
            if old.num_bytes <= self._limits["spilled"]:
                self._store("spilled", gone, old.to(on_cpu))

    def _store(
        self, tier: str, row: TextRow, recording: Recording
    ) -> list[tuple[TextRow, Recording]]:
        """Put a recording into a tier; return those that had to go."""
        recordings, gone = self._tiers[tier], []
        recordings[row] = recording
        self._sizes[tier] += recording.num_bytes
        while self._sizes[tier] > self._limits[tier]:
            gone.append(recordings.popitem(last=False))
            self._sizes[tier] -= gone[-1][1].num_bytes
        return gone


def model_version(model: nn.Module) -> Hashable:
    """Return what changes when a weight of the model is moved, replaced or written to.

    And when it computes by other kernels, which round otherwise. Writes through `Tensor.data` are
    not seen, nor adapters that are switched on or off: who keeps what a model computed looks
    whether it still computes that.
    """
    attention = getattr(getattr(model, "config", None), "_attn_implementation", None)
    weights = tuple((p.data_ptr(), p._version, p.dtype, p.device) for p in model.parameters())
    return torch.get_num_threads(), attention, weights
