"""Do one computation many times: first as it is, then by a recording of its kernels.

On the CPU the recording is a `Tape`, on a CUDA device a `CudaGraph`. What a recording gives the
first time, and the first time after it was renewed, is compared with the computation; if they
differ, or it cannot be recorded, the computation goes on as it is, and a line in the log says why.
"""

import logging
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from baft_easyedit.tape import Result, uncollected

Given = TypeVar("Given", covariant=True)

logger = logging.getLogger(__name__)

_TOLERANCE = 1e-3
"""How far a recording may be off, relative to the largest value; a tape is not off at all."""


class Repeatable(Protocol[Given]):
    """A recording of a computation."""

    @property
    def result(self) -> Given | None:
        """What was computed last; None if nothing was yet, as a recording need not compute."""
        ...

    @property
    def can_renew(self) -> bool:
        """Whether it can be renewed."""
        ...

    @property
    def num_bytes(self) -> int:
        """Memory that it takes by itself."""
        ...

    def run(self) -> Given:
        """Compute again on what the inputs hold now; in the memory of the last time."""
        ...

    def renew(self) -> None:
        """Take note of what else the computation reads: that may have changed, in place."""
        ...


class GraphPool:
    """What CUDA graphs of a device share, none of which runs at the same time as another.

    Args:
        device: Where they run.
    """

    def __init__(self, device: torch.device) -> None:
        self.handle: Any = torch.cuda.graph_pool_handle()
        """Memory."""
        # cuBLAS keeps tens of MiB for each stream that it has been used on.
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        """Where they are captured."""


class CudaGraph(Generic[Result]):
    """The kernels of a computation on a CUDA device, launched as one.

    Args:
        compute: Runs the same kernels on the same memory each time, without waiting for the device;
            it has run on this device before.
        pool: What it shares with other graphs. What one gave is kept until that one runs again.

    Raises:
        RuntimeError: If CUDA cannot capture it.
    """

    def __init__(self, compute: Callable[[], Result], pool: GraphPool) -> None:
        self.result: Result | None = None
        self._graph = torch.cuda.CUDAGraph()
        # Not by torch.cuda.graph, which collects garbage and empties the cache: that takes longer
        # than a step. Nothing is computed yet. No graph may be freed meanwhile.
        current = torch.cuda.current_stream(pool.stream.device)
        pool.stream.wait_stream(current)
        with uncollected(), torch.cuda.stream(pool.stream):
            self._graph.capture_begin(pool=pool.handle)
            try:
                self._memory = compute()
            finally:
                self._graph.capture_end()
        current.wait_stream(pool.stream)

    def run(self) -> Result:
        """Compute again."""
        self._graph.replay()
        self.result = self._memory
        return self._memory


class Repeated(Generic[Result]):
    """Calls a computation, or its recording once there is one.

    Args:
        compute: The computation.
        record: Makes a recording of it; None if that is not wanted.
        glance: Computes again what the results begin with, the first of a tuple, for less; with it
            a renewed recording is compared. All is computed if None.
        num_computed: Times that it is done before it is recorded: CUDA captures what has run once.
    """

    def __init__(
        self,
        compute: Callable[[], Result],
        record: Callable[[], Repeatable[Result]] | None,
        glance: Callable[[], Any] | None = None,
        num_computed: int = 1,
    ) -> None:
        self._compute = compute
        self._record = record
        self._glance = glance
        self._num_to_compute = num_computed
        self._recording: Repeatable[Result] | None = None
        self._is_checked = False
        self._is_renewed = False

    @property
    def is_recorded(self) -> bool:
        """Whether the next call runs a recording."""
        return self._recording is not None

    @property
    def num_bytes(self) -> int:
        """Memory of the recording."""
        return 0 if self._recording is None else self._recording.num_bytes

    def renew(self) -> bool:
        """Take note that what the computation reads may have changed, in place.

        Returns:
            Whether it can go on with that: not if it could not be recorded.
        """
        if self._record is None:
            return False
        if self._recording is not None:
            if not self._recording.can_renew:
                return False
            self._recording.renew()
            self._is_renewed, self._is_checked = self._is_checked, False
        return True

    def __call__(self) -> Result:
        """Compute, one way or the other."""
        if self._recording is not None and self._is_checked:
            return self._recording.run()
        if self._num_to_compute or self._record is None:
            self._num_to_compute = max(0, self._num_to_compute - 1)
            return self._compute()
        try:
            return self._checked() if self._recording is not None else self._recorded(self._record)
        # Whatever a model's code does that cannot be recorded.
        except Exception as error:  # noqa: BLE001
            reason = f"{type(error).__name__}: {error}"
            logger.info("steps are computed one by one: they cannot be repeated (%s)", reason)
            self._recording = self._record = None
            return self._compute()

    def _recorded(self, record: Callable[[], Repeatable[Result]]) -> Result:
        """Make the recording, which is not relied on yet."""
        self._recording = record()
        return self._compute() if self._recording.result is None else self._recording.result

    def _checked(self) -> Result:
        """Compare the recording with the computation, on what the inputs hold by now."""
        assert self._recording is not None
        if self._is_renewed and self._glance is not None:
            result: Any = self._recording.run()
            _check_equal(self._glance(), result[0])
        else:
            result = self._compute()
            _check_equal(result, self._recording.run())
        self._is_checked = True
        return result


def _check_equal(computed: Any, repeated: Any) -> None:
    """Raise ValueError unless all tensors in two results are equal, numbers up to rounding."""
    for a, b in zip(tree_leaves(computed), tree_leaves(repeated), strict=True):
        if isinstance(a, Tensor) and a.is_floating_point():
            _check_close(a, b)
        elif isinstance(a, Tensor) and not torch.equal(a, b):
            raise ValueError(f"it has other {a.dtype} values")


def _check_close(computed: Tensor, repeated: Tensor) -> None:
    """Raise ValueError unless two results are equal up to rounding."""
    largest = float(computed.abs().max()) if computed.numel() else 0.0
    difference = float((computed - repeated).abs().max()) if computed.numel() else 0.0
    if not difference <= _TOLERANCE * largest:
        raise ValueError(f"it is off by {difference:.2g}, of values up to {largest:.2g}")
