"""Recorded steps that outlive an edit call: which are kept, and for whom."""

import pickle
from copy import deepcopy
from types import SimpleNamespace

from baft_easyedit import repeat
from baft_easyedit.known_steps import KnownStep, KnownSteps

MIB = 2**20


def step(mib=0):
    return KnownStep(SimpleNamespace(num_bytes=0), SimpleNamespace(num_bytes=mib * MIB))


def test_steps_are_known_by_their_sizes():
    known, kept = KnownSteps(), step()
    assert known.get(3) is None
    known.put(3, kept)
    assert known.get(3) is kept
    other = step()
    known.put(3, other)
    assert known.get(3) is other
    assert len(known) == 1


def test_another_model_or_edit_makes_forget():
    known = KnownSteps()
    known.make_valid_for("model 1")
    known.put(3, step())
    known.make_valid_for("model 1")
    assert len(known) == 1
    known.make_valid_for("model 2")
    assert len(known) == 0


def test_what_was_not_used_for_the_longest_time_makes_room():
    known = KnownSteps()
    for sizes in range(32):
        known.put(sizes, step())
    known.get(0)
    known.put(32, step())
    assert known.get(0) is not None
    assert known.get(1) is None
    assert len(known) == 32


def test_memory_is_bounded():
    known = KnownSteps()
    for sizes in range(3):
        known.put(sizes, step(400))
    assert [known.get(sizes) is None for sizes in range(3)] == [True, False, False]
    known.put(4, step(2000))
    assert len(known) == 0
    known.put(5, KnownStep(SimpleNamespace(num_bytes=2000 * MIB), SimpleNamespace(num_bytes=0)))
    assert len(known) == 0


def test_copies_and_files_know_nothing():
    known = KnownSteps()
    known.make_valid_for("model")
    known.put(3, step())
    for other in (deepcopy(known), pickle.loads(pickle.dumps(known))):
        assert isinstance(other, KnownSteps)
        assert len(other) == 0


def test_graphs_of_a_device_share_one_pool(monkeypatch):
    monkeypatch.setattr(repeat, "_capture_stream", str)
    known = KnownSteps()
    pool = known.pool_on(0)
    assert known.pool_on(0) is pool
    assert known.pool_on(1) is not pool
    assert known.pool_on(1).stream == "1"
    pool = known.pool_on(1)
    known.make_valid_for("other weights")
    assert known.pool_on(1) is not pool
