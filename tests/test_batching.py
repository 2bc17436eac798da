"""Which edits are learned side by side, and how many; CUDA's memory is made up."""

import pytest
import torch

from baft_easyedit.model.batching import BatchSize, alike

CUDA = torch.device("cuda", 0)
GIB = 2**30


def test_long_texts_do_not_pad_the_others():
    assert alike([14, 240, 12, 6, 17, 7, 11]) == [[3, 5], [6, 2, 0], [4], [1]]
    assert alike([]) == []


def test_different_kinds_are_kept_apart():
    assert alike([5, 6, 5, 6], ["a", "b", "b", "a"]) == [[0, 3], [2, 1]]


def test_a_given_size_stays_until_memory_is_short():
    for given, device, expected in ((5, CUDA, 5), (None, torch.device("cpu"), 8)):
        size = BatchSize(given, device)
        size.start()
        size.finish(expected)
        assert size.value == expected
        size.fail(expected)
        assert size.value == expected // 2


def with_memory(monkeypatch, *, before, peak, reserved, free):
    values = {
        "reset_peak_memory_stats": None,
        "memory_allocated": before,
        "max_memory_allocated": peak,
        "memory_reserved": reserved,
        "mem_get_info": (free, 80 * GIB),
    }
    for name, value in values.items():
        monkeypatch.setattr(torch.cuda, name, lambda _device, value=value: value)


@pytest.mark.parametrize(
    ("peak", "free", "expected"),
    [
        (15 * GIB, 3 * GIB, 25),  # 8 took 1 GiB: (3 + 1) GiB of unused memory hold 32, .8 of that
        (14 * GIB + 1, 3 * GIB, 32),  # nothing to speak of: four times as many, to be sure
        (22 * GIB, 0, 1),  # just so
    ],
)
def test_free_memory_decides(peak, free, expected, monkeypatch):
    with_memory(monkeypatch, before=14 * GIB, peak=peak, reserved=15 * GIB, free=free)
    size = BatchSize(None, CUDA)
    assert size.value == 8
    size.start()
    size.finish(8)
    assert size.value == expected
    size.fail(expected)
    fewer = size.value
    size.start()
    size.finish(fewer)  # what has failed once is not tried again
    assert size.value == fewer


def test_a_gpu_is_full_at_some_point(monkeypatch):
    with_memory(monkeypatch, before=0, peak=1, reserved=GIB, free=GIB)
    size = BatchSize(None, CUDA)
    for _ in range(5):
        size.start()
        size.finish(size.value)
    assert size.value == 128
