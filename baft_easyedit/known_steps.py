"""Steps of learning that are recorded already, for later edit calls. Needs torch only."""

from collections import OrderedDict
from collections.abc import Hashable
from typing import Any, NamedTuple

import torch

from baft_easyedit.repeat import GraphPool, Repeated

_MOST = 32
"""Steps that are kept."""
_MOST_BYTES = 2**30
"""Most memory of their contents and recordings."""


class KnownStep(NamedTuple):
    """A step that later edits may repeat."""

    forward: Any
    """The `forward.Forward` whose memory it reads."""
    repeated: Repeated[Any]
    """Computes it."""


class KnownSteps:
    """The steps used last, by their sizes.

    What is recorded knows where in memory a model and an edit lie: a copy of it, or one that was
    written to a file, knows nothing.
    """

    def __init__(self) -> None:
        self._steps: OrderedDict[Hashable, KnownStep] = OrderedDict()
        self._made_with: Hashable = None
        self._pool: GraphPool | None = None

    def __len__(self) -> int:
        return len(self._steps)

    def __reduce__(self) -> Any:
        return KnownSteps, ()

    def pool_on(self, device: torch.device) -> GraphPool:
        """Return what all CUDA graphs share, which run one after another on this device."""
        if self._pool is None or self._pool.device != device:
            self._pool = GraphPool(device)
        return self._pool

    def make_valid_for(self, version: Hashable) -> None:
        """Forget everything unless it was made with this version of model, edit and settings."""
        if version != self._made_with:
            self._steps.clear()
            self._pool = None  # a capture may have failed in it
            self._made_with = version

    def get(self, sizes: Hashable) -> KnownStep | None:
        """Return the step of some sizes; None if there is none (any more)."""
        if sizes in self._steps:
            self._steps.move_to_end(sizes)
        return self._steps.get(sizes)

    def put(self, sizes: Hashable, step: KnownStep) -> None:
        """Keep a step; those that were not used for the longest time make room."""
        self._steps[sizes] = step
        self._steps.move_to_end(sizes)
        while len(self._steps) > _MOST or self._num_bytes > _MOST_BYTES:
            self._steps.popitem(last=False)

    @property
    def _num_bytes(self) -> int:
        """Memory of all contents and recordings; that of CUDA graphs is in the pool."""
        steps = self._steps.values()
        return sum(step.forward.num_bytes + step.repeated.num_bytes for step in steps)
