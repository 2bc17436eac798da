"""Captured steps are bounded, the latest used stay, and a changed model has none."""

from typing import NamedTuple

import torch

from baft_easyedit.training import known_steps
from baft_easyedit.training.cuda_graph import Capture
from baft_easyedit.training.known_steps import KnownStep, KnownSteps
from baft_easyedit.training.observing import model_version


class Contents(NamedTuple):
    num_bytes: int


def step(num_bytes=8):
    return KnownStep(Contents(num_bytes), Capture())


def test_what_was_not_used_for_the_longest_time_goes_first(monkeypatch):
    monkeypatch.setattr(known_steps, "_MOST_BYTES", 16)
    known, first = KnownSteps(), step()
    known.put("a", first)
    known.put("b", step())
    known.get("a")
    known.put("c", step())
    assert known.get("b") is None
    assert known.get("a") is first
    assert known.get("c") is not None
    assert known.num_bytes == 16
    known.put("d", step(100))
    assert len(known) == known.num_bytes == 0  # not even that one is kept


def test_so_many_are_kept(monkeypatch):
    monkeypatch.setattr(known_steps, "_MOST_STEPS", 2)
    known = KnownSteps()
    for sizes in range(5):
        known.put(sizes, step())
    assert [known.get(sizes) is not None for sizes in range(5)] == [False] * 3 + [True] * 2


def test_another_version_of_the_model_starts_anew(model):
    known = KnownSteps()
    known.make_valid_for(model_version(model))
    known.put("a", step())
    known.make_valid_for(model_version(model))
    assert len(known) == 1
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    known.make_valid_for(model_version(model))
    assert len(known) == known.num_bytes == 0


def test_other_kernels_are_another_version_of_the_model(model):
    """They round otherwise, and an edit that is learned again has to come out bit for bit."""
    versions, threads = [model_version(model)], torch.get_num_threads()
    model.set_attn_implementation("eager")
    versions.append(model_version(model))
    try:
        torch.set_num_threads(threads + 1)
        versions.append(model_version(model))
    finally:
        torch.set_num_threads(threads)
    assert len(set(versions)) == 3
    assert versions[1] == model_version(model)
