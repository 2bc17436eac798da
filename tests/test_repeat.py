"""When a computation is done as it is, and when by its recording."""

import gc
import logging
import warnings
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from baft_easyedit import repeat
from baft_easyedit.repeat import CudaGraph, GraphPool, Repeated, check_equal

X = torch.tensor([1.0, 2.0])


class Counted:
    """Counts its calls."""

    def __init__(self, function):
        self.function = function
        self.count = 0
        self.num_renewed = 0
        self.result = None
        self.can_renew = True
        self.num_bytes = 7

    def renew(self):
        self.num_renewed += 1

    def __call__(self):
        self.count += 1
        return self.function()

    run = __call__


def test_the_first_calls_are_computed_then_one_recording_serves():
    compute, recording = Counted(lambda: {"x": X * 2}), Counted(lambda: {"x": X * 2})
    repeated = Repeated(compute, lambda: recording)
    for _ in range(10):
        assert torch.equal(repeated()["x"], X * 2)
    assert repeated.is_recorded
    assert (compute.count, recording.count) == (3, 8)  # in the third call both, to compare


def test_what_was_computed_for_the_recording_is_not_computed_again():
    compute, recording = Counted(lambda: X), Counted(lambda: X)
    recording.result = X * 1
    repeated = Repeated(compute, lambda: recording)
    assert [repeated() is recording.result for _ in range(4)] == [False, True, False, False]
    assert (compute.count, recording.count) == (2, 2)


def test_without_a_recorder_all_is_computed():
    compute = Counted(lambda: X)
    repeated = Repeated(compute, None)
    for _ in range(10):
        repeated()
    assert compute.count == 10
    assert not repeated.is_recorded


def raising(error):
    def record():
        raise error

    return record


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (raising(RuntimeError("no such kernel")), "RuntimeError: no such kernel"),
        (raising(TypeError("no such type")), "TypeError: no such type"),
        (lambda: Counted(lambda: X * 3), "ValueError: it is off by 2, of values up to 4"),
        (lambda: Counted(lambda: X * float("nan")), "ValueError: it is off by nan"),
    ],
)
def test_what_cannot_be_recorded_rightly_is_computed(record, reason, caplog):
    repeated = Repeated(lambda: X * 2, record)
    with caplog.at_level(logging.INFO, logger="baft_easyedit"):
        results = [repeated() for _ in range(6)]
    assert not repeated.is_recorded
    assert all(torch.equal(result, X * 2) for result in results)
    (line,) = caplog.messages
    assert line.startswith("steps are computed one by one: they cannot be repeated")
    assert reason in line


def test_integers_and_empty_tensors_are_compared_too(caplog):
    results = (torch.tensor([1]), torch.empty(0), None)
    repeated = Repeated(lambda: results, lambda: Counted(lambda: results))
    for _ in range(5):
        repeated()
    assert repeated.is_recorded
    assert not caplog.messages


def recorded(recording, **options):
    """A repeated computation that runs its recording by now."""
    compute = Counted(lambda: (X * 2, X))
    repeated = Repeated(compute, lambda: recording, **options)
    for _ in range(4):
        repeated()
    return repeated, compute


def test_a_renewed_recording_is_checked_for_less():
    checked, recording = [], Counted(lambda: (X * 2, X))
    repeated, compute = recorded(recording, check=checked.append)
    assert repeated.num_bytes == 7
    for n in (1, 2):
        assert repeated.renew()
        for _ in range(3):
            repeated()
        assert recording.num_renewed == len(checked) == n
    assert torch.equal(checked[1][0], X * 2)
    assert compute.count == 3
    assert recording.count == 2 + 6


def test_a_renewed_recording_is_compared_if_there_is_no_check():
    recording = Counted(lambda: (X * 2, X))
    repeated, compute = recorded(recording)
    assert repeated.renew()
    repeated()
    repeated()
    assert compute.count == 4


@pytest.mark.parametrize(
    ("check", "reason"),
    [
        (lambda result: check_equal(X * 3, result[0]), "it is off by 2, of values up to 6"),
        (lambda result: check_equal([X * 2, X], result[0]), "ValueError: zip"),
        (lambda _: torch.cuda.no_such_thing, "AttributeError"),
    ],
)
def test_a_renewed_recording_that_is_off_is_not_used(check, reason, caplog):
    repeated, compute = recorded(Counted(lambda: (X * 2, X)), check=check)
    assert repeated.renew()
    with caplog.at_level(logging.INFO, logger="baft_easyedit"):
        assert torch.equal(repeated()[0], X * 2)
    assert reason in caplog.text
    assert compute.count == 4
    assert not repeated.is_recorded
    assert repeated.num_bytes == 0
    assert not repeated.renew()  # once more from the beginning


def test_masks_are_compared_too(caplog):
    mask = torch.tensor([True, False])
    repeated = Repeated(lambda: (mask, X), lambda: Counted(lambda: (~mask, X)))
    repeated()
    repeated()
    with caplog.at_level(logging.INFO, logger="baft_easyedit"):
        repeated()
    assert "it has other torch.bool values" in caplog.text


def test_what_cannot_be_renewed_says_so():
    recording = Counted(lambda: (X * 2, X))
    recording.can_renew = False
    repeated, _ = recorded(recording)
    assert not repeated.renew()
    assert recording.num_renewed == 0


def test_recordings_may_be_made_at_once():
    compute, recording = Counted(lambda: X), Counted(lambda: X)
    repeated = Repeated(compute, lambda: recording, num_computed=0)
    for _ in range(3):
        repeated()
    assert (compute.count, recording.count) == (2, 2)


def test_memory_that_the_computation_lacks_is_no_reason_to_give_up():
    def lack():
        raise torch.cuda.OutOfMemoryError("no more")

    repeated = Repeated(lambda: X, lambda: Counted(lack))
    repeated()
    repeated()
    with pytest.raises(torch.cuda.OutOfMemoryError, match="no more"):
        repeated()
    assert repeated.is_recorded
    repeated = Repeated(lambda: X, lack)
    assert torch.equal(repeated(), X)
    assert torch.equal(repeated(), X)
    assert repeated.has_given_up


def test_gradients_may_be_off_further_than_what_comes_before(caplog):
    for first, rest, is_right in ((1.0, 1.02, True), (1.02, 1.0, False), (1.0, 1.1, False)):
        recording = Counted(lambda first=first, rest=rest: (X * first, [X * rest]))
        repeated = Repeated(lambda: (X, [X]), lambda recording=recording: recording)
        for _ in range(4):
            repeated()
        assert repeated.is_recorded == is_right


@pytest.fixture
def pool(monkeypatch):
    monkeypatch.setattr(repeat, "_capture_stream", lambda device: None)
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

    with pytest.raises(RuntimeError, match=r"it waits for the device \(.*test_repeat.py:\d+\)"):
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


def test_memory_goes_with_the_last_graph(pool, monkeypatch):
    handles = iter("ab")
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(handles))
    graphs = [Counted(None), Counted(None)]
    assert [pool.handle_for(graph) for graph in graphs] == ["a", "a"]
    del graphs[0]
    assert pool.handle_for(graphs[0]) == "a"
    graphs.clear()
    gc.collect()
    assert pool.handle_for(Counted(None)) == "b"


def test_what_is_not_recorded_yet_goes_on():
    compute, recording = Counted(lambda: X), Counted(lambda: X)
    repeated = Repeated(compute, lambda: recording)
    repeated()
    assert repeated.renew()
    for _ in range(3):
        repeated()
    assert (compute.count, recording.count) == (3, 2)


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
