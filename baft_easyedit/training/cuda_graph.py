"""Replay a training step on a CUDA device as a graph of its kernels.

Why: a short step spends most of its time on launching small kernels. Steps on the same forward
launch the same kernels on the same memory. So the second step is captured as a CUDA graph
(`CudaGraph`), which later steps replay by one launch. A later edit of the same sizes copies its
inputs into the memory that the graph reads, and replays it too (`known_steps`). The first result of
a graph, and its first result on new inputs, is compared with an ordinary computation. If they
differ, or the step cannot be captured, all steps are computed in the ordinary way, and the log says
why. Needs torch only.
"""

import gc
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any, Generic, TypeVar
from weakref import WeakSet

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

Result = TypeVar("Result")
"""Tensors in NamedTuples, tuples, lists and dicts."""

logger = logging.getLogger(__name__)

_TOLERANCE = 1e-3
"""Allowed difference of a graph's result, relative to the largest value."""

_TOLERANCE_BEYOND = 5e-2
"""Allowed difference of all but the first of a tuple of results: of a step's gradients, which
kernels sum in any order."""


class GraphPool:
    """A stream and memory that the CUDA graphs of a device share, as they run one after another."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = _capture_stream(device)
        """The stream on which graphs are captured."""
        self.has_failed = False
        """Whether a capture failed; torch may not manage another one then."""
        self._handle: Any = None
        self._graphs: WeakSet[CudaGraph[Any]] = WeakSet()

    def handle_for(self, graph: "CudaGraph[Any]") -> Any:
        """Return the memory pool for a graph; it is freed with the last graph in it."""
        if not self._graphs:
            self._handle = torch.cuda.graph_pool_handle()
        self._graphs.add(graph)
        return self._handle


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the one capture stream of a device: cuBLAS keeps memory for each stream in use."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


class CudaGraph(Generic[Result]):
    """The kernels of a computation on a CUDA device, launched as one.

    Args:
        compute: The computation, which has run on this device before. It must run the same kernels
            on the same memory each time, without waiting for the device.
        pool: Memory shared with other graphs; a run of one may overwrite the results of another.

    Raises:
        RuntimeError: If CUDA cannot capture the computation.
    """

    def __init__(self, compute: Callable[[], Result], pool: GraphPool) -> None:
        if pool.has_failed:
            raise RuntimeError("another could not be captured")
        with _never_waiting():
            self.result: Result | None = compute()
            """The latest result."""
        self._graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream(pool.device)
        pool.stream.wait_stream(current)
        # torch.cuda.graph would collect garbage and empty the cache, which takes longer than a
        # step. Python's collector must not free another graph during the capture.
        with _uncollected(), torch.cuda.stream(pool.stream):
            try:
                self._memory = self._captured(compute, pool)
            except BaseException:
                pool.has_failed = True
                raise
        current.wait_stream(pool.stream)

    def _captured(self, compute: Callable[[], Result], pool: GraphPool) -> Result:
        """Capture a computation; return the tensors that will hold its results."""
        handle = pool.handle_for(self)
        self._graph.capture_begin(pool=handle, capture_error_mode="thread_local")
        try:
            memory = compute()
        except BaseException:
            with suppress(RuntimeError):  # a second error would hide the first
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
    """Raise RuntimeError if the code in this context waited for the device, as far as torch knows.

    This is found out before the capture, because torch does not recover from a wait inside one.
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


class CannotRepeatError(ValueError):
    """A computation cannot be captured, or its graph gives another result."""


class Capture:
    """The state of a computation's capture; it holds no reference to the computation."""

    def __init__(self) -> None:
        self.graph: CudaGraph[Any] | None = None
        self.has_run = False
        self.has_failed = False
        """Whether the capture failed, or the graph gave other results."""
        self.is_checked = False
        """Whether the graph was compared with the computation on the present contents."""
        self.has_new_contents = False

    def renew(self) -> None:
        """Note that the inputs have new contents, on which a known graph must be checked again."""
        self.has_new_contents, self.is_checked = self.is_checked, False


class Repeated(Generic[Result]):
    """Computes at the first call, captures a graph at the second, checks it and then replays it.

    Args:
        compute: The computation.
        capture: Captures the computation, or raises RuntimeError; None to compute at each call.
        check: Raises CannotRepeatError if a result is wrong, at less cost than the computation. It
            checks a graph on new contents; a new graph is compared with the whole computation.
        state: The state of an earlier object for the same computation in the same memory, if any.
    """

    def __init__(
        self,
        compute: Callable[[], Result],
        capture: Callable[[], CudaGraph[Result]] | None,
        check: Callable[[Result], None],
        state: Capture | None = None,
    ) -> None:
        self._compute = compute
        self._capture = capture
        self._check = check
        self._state = Capture() if state is None else state

    @property
    def is_captured(self) -> bool:
        """Whether the next call runs a graph."""
        return self._state.graph is not None

    def __call__(self) -> Result:
        """Return the result, from the graph or from the computation."""
        state = self._state
        if state.graph is not None and state.is_checked:
            return state.graph.run()
        if not state.has_run or state.has_failed or self._capture is None:
            state.has_run = True
            return self._compute()
        try:
            return self._checked(state.graph) if state.graph else self._captured(self._capture)
        except CannotRepeatError as error:
            reason = str(error)
        # Outside of the except block, as the error would keep the failed computation's memory.
        logger.warning("steps are computed one by one: they cannot be repeated (%s)", reason)
        state.graph, state.has_failed = None, True
        return self._compute()

    def _captured(self, capture: Callable[[], CudaGraph[Result]]) -> Result:
        """Capture the graph, and return the result of the computation that preceded the capture."""
        try:
            graph = self._state.graph = capture()
        except RuntimeError as error:  # torch's error for what CUDA cannot capture
            raise CannotRepeatError(f"{type(error).__name__}: {error}") from error
        return self._compute() if graph.result is None else graph.result

    def _checked(self, graph: CudaGraph[Result]) -> Result:
        """Check the graph on the present inputs, and return the result."""
        if self._state.has_new_contents:
            result = graph.run()
            self._check(result)
        else:
            result = self._compute()
            _check_same(result, graph.run())
        self._state.is_checked = True
        return result


@contextmanager
def _uncollected() -> Iterator[None]:
    """Keep Python's garbage collector out of this context."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _check_same(computed: Any, repeated: Any) -> None:
    """Raise CannotRepeatError unless two results are equal up to rounding."""
    if isinstance(computed, tuple):
        check_equal(computed[0], repeated[0])
        check_equal(computed[1:], repeated[1:], _TOLERANCE_BEYOND)
    else:
        check_equal(computed, repeated)


def check_equal(computed: Any, repeated: Any, tolerance: float = _TOLERANCE) -> None:
    """Raise CannotRepeatError unless all tensors of two results are equal, up to rounding."""
    values, others = tree_leaves(computed), tree_leaves(repeated)
    if len(values) != len(others):
        raise CannotRepeatError(f"it has {len(others)} values instead of {len(values)}")
    for a, b in zip(values, others, strict=True):
        if isinstance(a, Tensor) and a.is_floating_point():
            _check_close(a, b, tolerance)
        elif isinstance(a, Tensor) and not torch.equal(a, b):
            raise CannotRepeatError(f"it has other {a.dtype} values")


def _check_close(computed: Tensor, repeated: Tensor, tolerance: float) -> None:
    """Raise CannotRepeatError unless two results are equal up to rounding."""
    largest = float(computed.abs().max()) if computed.numel() else 0.0
    difference = float((computed - repeated).abs().max()) if computed.numel() else 0.0
    if not difference <= tolerance * largest:
        raise CannotRepeatError(f"it is off by {difference:.2g}, of values up to {largest:.2g}")
