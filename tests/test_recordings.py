"""Recordings are bounded, the latest used stay, and a changed model has none."""

import torch

from baft_easyedit.training.recordings import Recording, Recordings, model_version
from baft_easyedit.training.requests import TextRow


def text(i):
    return TextRow((i,), 1, is_edit=True)


def recording(value=0.0):
    return Recording(
        torch.full((4, 8), float(value)), {1: (torch.zeros(2, 3, 4), torch.ones(2, 3, 4))}
    )


SIZE = 4 * (32 + 24 + 24)


def test_what_was_not_used_for_the_longest_time_goes_first():
    recordings = Recordings(2 * SIZE)
    for i in (0, 1):
        recordings.put(text(i), recording(i))
    recordings.get(text(0))
    recordings.put(text(2), recording())
    assert recordings.get(text(1)) is None
    assert recordings.get(text(0)).hidden.max() == 0
    assert recordings.get(text(2)) is not None
    assert recordings.num_bytes == 2 * SIZE
    recordings.put(text(3), Recording(torch.zeros(100, 8), {}))
    assert len(recordings) == 0  # not even that one is kept


def test_another_version_of_the_model_starts_anew(model):
    recordings = Recordings(10 * SIZE)
    recordings.make_valid_for(model_version(model))
    recordings.put(text(0), recording())
    recordings.make_valid_for(model_version(model))
    assert len(recordings) == 1
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    recordings.make_valid_for(model_version(model))
    assert len(recordings) == recordings.num_bytes == 0


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
