"""Captured steps that later edits replay, within limits of their number and memory."""

from collections import OrderedDict
from collections.abc import Hashable
from typing import Any, NamedTuple

import torch

from baft_easyedit.training.cuda_graph import Capture, GraphPool

_MOST_STEPS = 32

_MOST_BYTES = 2**30
"""Of the steps' inputs; the graphs' own memory is in the pool."""


class KnownStep(NamedTuple):
    """A captured step that later edits may replay; it holds no reference to a model or an edit."""

    contents: Any
    """The `forward.Contents` whose memory the graph reads."""
    state: Capture

    @property
    def num_bytes(self) -> int:
        """Memory of the contents."""
        return int(self.contents.num_bytes)


class KnownSteps:
    """The captured steps that were used last, by the sizes of their tensors.

    Beyond a limit, the least recently used ones are dropped. A copy or pickle is empty: another
    model makes its own steps.
    """

    def __init__(self) -> None:
        self.num_bytes = 0
        """Memory of all steps."""
        self._steps: OrderedDict[Hashable, KnownStep] = OrderedDict()
        self._made_with: Hashable = None
        self._pool: GraphPool | None = None

    def __len__(self) -> int:
        return len(self._steps)

    def __reduce__(self) -> Any:
        return KnownSteps, ()

    def make_valid_for(self, version: Hashable) -> None:
        """Forget all steps of another version (of the model, say), and the pool of their memory."""
        if version != self._made_with:
            self._steps.clear()
            self.num_bytes, self._pool, self._made_with = 0, None, version

    def get(self, sizes: Hashable) -> KnownStep | None:
        """Return the step of some sizes; None if there is none, or no longer."""
        if sizes in self._steps:
            self._steps.move_to_end(sizes)
        return self._steps.get(sizes)

    def put(self, sizes: Hashable, step: KnownStep) -> None:
        """Keep a step; the least recently used ones make room for it."""
        self._steps[sizes] = step
        self.num_bytes += step.num_bytes
        while self.num_bytes > _MOST_BYTES or len(self) > _MOST_STEPS:
            self.num_bytes -= self._steps.popitem(last=False)[1].num_bytes

    def pool_on(self, device: torch.device) -> GraphPool:
        """Return the pool of all graphs on a device."""
        if self._pool is None or self._pool.device != device:
            self._pool = GraphPool(device)
        return self._pool
