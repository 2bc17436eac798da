"""When a computation is done as it is, when by its graph, and which graphs are kept."""

import logging
import warnings
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from baft_easyedit.training import cuda_graph
from baft_easyedit.training.cuda_graph import (
    Capture,
    CudaGraph,
    GraphPool,
    Repeated,
    check_equal,
)

X = torch.tensor([1.0, 2.0])
MIB = 2**20


def unchecked(result):
    raise AssertionError("nothing has new contents here")


class Counted:
    """Counts its calls."""

    def __init__(self, function):
        self.function = function
        self.count = 0
        self.result = None

    def __call__(self):
        self.count += 1
        return self.function()

    run = __call__


def test_the_first_calls_are_computed_then_one_graph_serves():
    compute, graph = Counted(lambda: {"x": X * 2}), Counted(lambda: {"x": X * 2})
    repeated = Repeated(compute, lambda: graph, unchecked)
    for _ in range(10):
        assert torch.equal(repeated()["x"], X * 2)
    assert repeated.is_captured
    assert (compute.count, graph.count) == (3, 8)  # in the third call both, to compare


def raising(error):
    def record():
        raise error

    return record


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (raising(RuntimeError("no such kernel")), "RuntimeError: no such kernel"),
        (lambda: Counted(lambda: X * 3), "it is off by 2, of values up to 4"),
        (lambda: Counted(lambda: X * float("nan")), "it is off by nan"),
    ],
)
def test_what_cannot_be_captured_rightly_is_computed(record, reason, caplog):
    repeated = Repeated(lambda: X * 2, record, unchecked)
    with caplog.at_level(logging.WARNING, logger="baft_easyedit"):
        results = [repeated() for _ in range(6)]
    assert not repeated.is_captured
    assert all(torch.equal(result, X * 2) for result in results)
    (line,) = caplog.messages
    assert line.startswith("steps are computed one by one: they cannot be repeated")
    assert reason in line


def called_twice(repeated):
    repeated()
    repeated()


@pytest.mark.parametrize("error", [TypeError("a bug"), AttributeError("a bug")])
def test_other_errors_are_no_reason_to_give_up(error):
    def check(_result):
        raise error

    for record in (raising(error), lambda: Counted(lambda: X)):
        state = Capture()
        repeated = Repeated(lambda: X, record, check, state)
        state.has_new_contents = True
        repeated()
        with pytest.raises(type(error), match="a bug"):
            called_twice(repeated)


def captured(graph, check):
    """A repeated computation that runs its graph by now."""
    compute, state = Counted(lambda: (X * 2, X)), Capture()
    repeated = Repeated(compute, lambda: graph, check, state)
    for _ in range(4):
        repeated()
    return repeated, compute, state


@pytest.mark.parametrize(
    ("check", "reason"),
    [
        (lambda result: check_equal(X * 3, result[0]), "it is off by 2, of values up to 6"),
        (lambda result: check_equal([X * 2, X], result[0]), "it has 1 values instead of 2"),
    ],
)
def test_a_graph_that_is_off_on_new_contents_is_not_used(check, reason, caplog):
    repeated, compute, state = captured(Counted(lambda: (X * 2, X)), check)
    state.renew()
    with caplog.at_level(logging.WARNING, logger="baft_easyedit"):
        assert torch.equal(repeated()[0], X * 2)
    assert reason in caplog.text
    assert compute.count == 4
    assert state.has_failed


def test_masks_are_compared_too(caplog):
    mask = torch.tensor([True, False])
    repeated = Repeated(lambda: (mask, X), lambda: Counted(lambda: (~mask, X)), unchecked)
    repeated()
    repeated()
    with caplog.at_level(logging.WARNING, logger="baft_easyedit"):
        repeated()
    assert "it has other torch.bool values" in caplog.text


def test_memory_that_the_computation_lacks_is_no_reason_to_give_up():
    def lack():
        raise torch.cuda.OutOfMemoryError("no more")

    repeated = Repeated(lambda: X, lambda: Counted(lack), unchecked)
    repeated()
    repeated()
    with pytest.raises(torch.cuda.OutOfMemoryError, match="no more"):
        repeated()
    assert repeated.is_captured
    state = Capture()
    repeated = Repeated(lambda: X, lack, unchecked, state)
    assert torch.equal(repeated(), X)
    assert torch.equal(repeated(), X)
    assert state.has_failed


def test_gradients_may_be_off_further_than_what_comes_before(caplog):
    for first, rest, is_right in ((1.0, 1.02, True), (1.02, 1.0, False), (1.0, 1.1, False)):
        graph = Counted(lambda first=first, rest=rest: (X * first, [X * rest]))
        repeated = Repeated(lambda: (X, [X]), lambda graph=graph: graph, unchecked)
        for _ in range(4):
            repeated()
        assert repeated.is_captured == is_right


@pytest.fixture
def pool(monkeypatch):
    monkeypatch.setattr(cuda_graph, "_capture_stream", lambda device: None)
    return GraphPool("a device")


@pytest.fixture
def modes(monkeypatch):
    """How torch is told to look for waits, without a device."""
    modes = []
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    return modes


def test_a_computation_that_waits_is_not_captured(pool, modes):
    def wait():
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)

    with pytest.raises(RuntimeError, match=r"it waits for the device \(.*test_cuda_graph.py:\d+\)"):
        CudaGraph(wait, pool)
    assert modes == ["warn", 0]


def test_after_a_capture_that_failed_no_other_is_tried(pool, modes, monkeypatch):
    class Graph:
        def capture_begin(self, **_):
            raise RuntimeError("no capture")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "memory")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    pool.stream = SimpleNamespace(wait_stream=lambda stream: None)
    with pytest.raises(RuntimeError, match="no capture"):
        CudaGraph(lambda: X, pool)
    with pytest.raises(RuntimeError, match="another could not be captured"):
        CudaGraph(lambda: X, pool)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_graph_equals_the_computation():
    x = torch.randn(8, 8, device="cuda", requires_grad=True)

    def compute():
        loss = (x @ x).sin().sum()
        return loss.detach(), torch.autograd.grad(loss, x)[0]

    compute()
    graph = CudaGraph(compute, GraphPool(x.device))
    for _ in range(3):
        with torch.no_grad():
            x.add_(1)
        for a, b in zip(compute(), graph.run(), strict=True):
            assert torch.allclose(a, b)
