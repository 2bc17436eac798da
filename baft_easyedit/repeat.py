"""Do one computation many times: first as it is, then by a recording of its kernels.

On the CPU the recording is a `Tape`, on a CUDA device a `CudaGraph`. What a recording gives the
first time, and the first time after it was renewed, is compared with the computation; if they
differ, or it cannot be recorded, the computation goes on as it is, and a line in the log says why.
"""

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any, Generic, Protocol, TypeVar
from weakref import WeakSet

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from baft_easyedit.tape import Result, uncollected

Given = TypeVar("Given", covariant=True)

logger = logging.getLogger(__name__)

_TOLERANCE = 1e-3
"""How far a recording may be off, relative to the largest value; a tape is hardly off at all."""

_TOLERANCE_BEYOND = 5e-2
"""The same for what comes behind the first of a tuple of results: gradients, which kernels on a GPU
add up in any order."""


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
        self.device = device
        self.stream = _capture_stream(device)
        """Where they are captured."""
        self.has_failed = False
        """Whether a capture failed, after which torch may not be fit for another."""
        self._handle: Any = None
        self._graphs: WeakSet[CudaGraph[Any]] = WeakSet()

    def handle_for(self, graph: "CudaGraph[Any]") -> Any:
        """Return the memory that a graph is captured into; it goes with the last graph in it."""
        if not self._graphs:
            self._handle = torch.cuda.graph_pool_handle()
        self._graphs.add(graph)
        return self._handle


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream on which graphs are captured; for each one used, cuBLAS keeps memory."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


class CudaGraph(Generic[Result]):
    """The kernels of a computation on a CUDA device, launched as one.

    Args:
        compute: Runs the same kernels on the same memory each time, without waiting for the device;
            it has run on this device before.
        pool: What it shares with other graphs. What one gave may be overwritten when another runs.

    Raises:
        RuntimeError: If CUDA cannot capture it.
    """

    def __init__(self, compute: Callable[[], Result], pool: GraphPool) -> None:
        if pool.has_failed:
            raise RuntimeError("another could not be captured")
        with _never_waiting():
            self.result: Result | None = compute()
            """What was computed last."""
        self._graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream(pool.device)
        pool.stream.wait_stream(current)
        # Not by torch.cuda.graph, which collects garbage and empties the cache: that takes longer
        # than a step. No graph may be freed meanwhile.
        with uncollected(), torch.cuda.stream(pool.stream):
            try:
                self._memory = self._captured(compute, pool)
            except BaseException:
                pool.has_failed = True
                raise
        current.wait_stream(pool.stream)

    def _captured(self, compute: Callable[[], Result], pool: GraphPool) -> Result:
        """Capture a computation, and return where its results will lie."""
        handle = pool.handle_for(self)
        self._graph.capture_begin(pool=handle, capture_error_mode="thread_local")
        try:
            memory = compute()
        except BaseException:
            with suppress(RuntimeError):  # it would hide what went wrong
                self._graph.capture_end()
            raise
        self._graph.capture_end()
        return memory

    def run(self) -> Result:
        """Compute again."""
        self._graph.replay()
        self.result = self._memory
        return self._memory


@contextmanager
def _never_waiting() -> Iterator[None]:
    """Raise RuntimeError if the device was waited for in this context, as far as torch sees it.

    In a capture it is too late: torch does not get over it.
    """
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)
    for warning in seen:
        if "called a synchronizing CUDA operation" in str(warning.message):
            raise RuntimeError(f"it waits for the device ({warning.filename}:{warning.lineno})")


class Repeated(Generic[Result]):
    """Calls a computation, or its recording once there is one.

    Args:
        compute: The computation.
        record: Makes a recording of it; None if that is not wanted.
        check: Raises ValueError if a result is not what is computed now, which it finds out for
            less than that takes; a renewed recording is tried so. It is compared if None.
        num_computed: Times that it is done before it is recorded: CUDA captures what has run once.
    """

    def __init__(
        self,
        compute: Callable[[], Result],
        record: Callable[[], Repeatable[Result]] | None,
        check: Callable[[Result], None] | None = None,
        num_computed: int = 1,
    ) -> None:
        self._compute = compute
        self._record = record
        self._check = check
        self._num_to_compute = num_computed
        self._recording: Repeatable[Result] | None = None
        self._is_checked = False
        self._is_renewed = False

    @property
    def is_recorded(self) -> bool:
        """Whether the next call runs a recording."""
        return self._recording is not None

    @property
    def has_given_up(self) -> bool:
        """Whether it could not be recorded."""
        return self._record is None

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
        except Exception as error:
            if self._recording is not None and isinstance(error, torch.cuda.OutOfMemoryError):
                raise  # the computation needs more than there is
            reason = f"{type(error).__name__}: {error}"
        # Not above, where the error holds on to what had been computed until then.
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
        if self._is_renewed and self._check is not None:
            result = self._recording.run()
            self._check(result)
        else:
            result = self._compute()
            _check_same(result, self._recording.run())
        self._is_checked = True
        return result


def _check_same(computed: Any, repeated: Any) -> None:
    """Raise ValueError unless two results are equal up to rounding."""
    if isinstance(computed, tuple):
        check_equal(computed[0], repeated[0])
        check_equal(computed[1:], repeated[1:], _TOLERANCE_BEYOND)
    else:
        check_equal(computed, repeated)


def check_equal(computed: Any, repeated: Any, tolerance: float = _TOLERANCE) -> None:
    """Raise ValueError unless all tensors in two results are equal, numbers up to rounding."""
    for a, b in zip(tree_leaves(computed), tree_leaves(repeated), strict=True):
        if isinstance(a, Tensor) and a.is_floating_point():
            _check_close(a, b, tolerance)
        elif isinstance(a, Tensor) and not torch.equal(a, b):
            raise ValueError(f"it has other {a.dtype} values")


def _check_close(computed: Tensor, repeated: Tensor, tolerance: float) -> None:
    """Raise ValueError unless two results are equal up to rounding."""
    largest = float(computed.abs().max()) if computed.numel() else 0.0
    difference = float((computed - repeated).abs().max()) if computed.numel() else 0.0
    if not difference <= tolerance * largest:
        raise ValueError(f"it is off by {difference:.2g}, of values up to {largest:.2g}")
