"""Edits learned side by side equal edits learned one by one."""

from dataclasses import replace

import pytest
import torch

from baft_easyedit import BaFTEditor
from baft_easyedit.method.gates import GATES
from baft_easyedit.training import learner
from tests.conftest import logits, make_model

REQUESTS = [
    {"prompt": "The capital of France is", "target_new": "Rome", "loc_prompt": "Ice is cold"},
    {"prompt": "Water freezes into", "target_new": "glass", "loc_prompt": "The sky is blue"},
    {"prompt": "Once upon a time there was a king in", "target_new": "Oslo", "loc_prompt": "a b"},
    {"prompt": "No irrelevant prompt is", "target_new": "here"},
]


def one_by_one(model, tokenizer, hparams, requests=REQUESTS, earlier=None):
    editor = BaFTEditor(model, tokenizer, hparams)
    if earlier is not None:
        editor.edit(earlier)
    found = []
    for request in requests:
        report = editor.edit(request)
        found.append((report, editor.model_edit.snapshot()))
        editor.undo()
    return found


def assert_same(apart, alone):
    for learned, (report, state) in zip(apart, alone, strict=True):
        assert learned.report.num_steps == report.num_steps
        for one, other in zip(learned.report.losses, report.losses, strict=True):
            assert one.answer == pytest.approx(other.answer, rel=1e-4, abs=1e-4)
            assert one.locality == pytest.approx(other.locality, abs=1e-4)
        assert set(learned.state) == set(state)
        for name in state:
            found, expected = (squared_root(name, s[name]) for s in (learned.state, state))
            assert torch.allclose(found, expected, rtol=1e-3, atol=1e-3), name


def squared_root(name, value):
    """F^T F / |F|^2 of a root, whose rows may have either sign and turn where they are as long."""
    return value.mT @ value / value.square().sum() if name.endswith(".root") else value


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("min_similarity", [None, 0.5])
def test_side_by_side_equals_one_by_one(gate, min_similarity, tokenizer, hparams):
    hparams = replace(hparams, gate=gate, num_steps=5, min_similarity=min_similarity)
    model = make_model()
    editor = BaFTEditor(model, tokenizer, hparams)
    # The largest weight, in R_loc, is that of any basis as long as only rounding tells them apart.
    earlier = {"prompt": "Snow is", "target_new": "red", "loc_prompt": "Tea is hot"}
    editor.edit(earlier)
    before = logits(model)
    apart = editor.learn_apart(REQUESTS)
    assert torch.equal(logits(model), before)
    assert_same(apart, one_by_one(make_model(), tokenizer, hparams, earlier=earlier))


@pytest.mark.parametrize("engine", ["cached", "full"])
def test_edits_stop_each_at_its_own_step(engine, model, tokenizer, hparams):
    hparams = replace(hparams, engine=engine, early_stop_loss=1.0)
    alone = one_by_one(model, tokenizer, hparams)
    assert len({report.num_steps for report, _ in alone}) > 1
    assert_same(BaFTEditor(model, tokenizer, hparams).learn_apart(REQUESTS), alone)


def test_what_is_learned_can_be_installed_and_undone(model, tokenizer, hparams):
    before = logits(model)
    editor = BaFTEditor(model, tokenizer, hparams)
    first, *_ = editor.learn_apart(REQUESTS)
    assert not editor.is_attached
    editor.install(first)
    installed = logits(model)
    editor.undo()
    assert torch.equal(logits(model), before)
    editor.edit(REQUESTS[0])
    assert torch.allclose(logits(model), installed, atol=1e-2)
    assert not torch.allclose(installed, before, atol=1e-2)


def test_what_does_not_fit_is_refused_and_changes_nothing(model, tokenizer, hparams):
    editor, before = BaFTEditor(model, tokenizer, hparams), logits(model)
    other = BaFTEditor(make_model(), tokenizer, replace(hparams, rank=2))
    (learned,) = other.learn_apart(REQUESTS[:1])
    with pytest.raises(ValueError, match=r"same layers, rank and gate; _interventions\.1\.basis"):
        editor.install(learned)
    assert torch.equal(logits(model), before)
    with pytest.raises(ValueError, match="there is no edit to undo"):
        editor.undo()


def test_a_result_that_starts_from_another_state_is_refused(model, tokenizer, hparams):
    """It would take back what was edited since, and a journal would have it still."""
    editor = BaFTEditor(model, tokenizer, hparams)
    first, second = editor.learn_apart(REQUESTS[:2])
    editor.install(first, REQUESTS[0])
    installed = logits(model)
    message = r"it starts after no edit, and the latest change is the install of .*: undo\(\)"
    with pytest.raises(ValueError, match=message):
        editor.install(second, REQUESTS[1])
    assert torch.equal(logits(model), installed)
    (third,) = editor.learn_apart(REQUESTS[1:2])
    editor.undo()
    editor.install(second)
    with pytest.raises(ValueError, match=r"it starts after the install of .*, and the latest"):
        editor.install(third)


def test_a_report_is_of_its_own_edit(model, tokenizer, hparams):
    reports = [
        learned.report for learned in BaFTEditor(model, tokenizer, hparams).learn_apart(REQUESTS)
    ]
    assert [report.num_requests for report in reports] == [1] * 4
    assert reports[3].losses[0].locality is None
    assert reports[0].gates.layers[1].irrelevant_weights is not None
    assert reports[3].gates.layers[1].irrelevant_weights is None


def test_short_memory_halves_the_batch(model, tokenizer, hparams, monkeypatch):
    sizes, original = [], learner.train

    def train(model, edits, *others):
        sizes.append(edits.num_edits)
        if edits.num_edits > 1:
            raise torch.cuda.OutOfMemoryError("full")
        return original(model, edits, *others)

    monkeypatch.setattr(learner, "train", train)
    apart = BaFTEditor(model, tokenizer, replace(hparams, num_steps=2)).learn_apart(REQUESTS[:3])
    assert sizes == [3, 1, 1, 1]
    assert len(apart) == 3

    def never(*args):
        raise torch.cuda.OutOfMemoryError("full")

    monkeypatch.setattr(learner, "train", never)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        BaFTEditor(model, tokenizer, hparams).learn_apart(REQUESTS[:1])
    assert not any(layer._forward_hooks for layer in model.model.layers)


def test_bad_numbers_are_refused(model, tokenizer, hparams):
    with pytest.raises(ValueError, match="batch_size must be at least 1; got 0"):
        BaFTEditor(model, tokenizer, hparams).learn_apart(REQUESTS, batch_size=0)
