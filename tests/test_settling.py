from dataclasses import replace

import pytest
import torch

from baft_easyedit import BaFTEditor, attach
from baft_easyedit.method.objective import displacement_error
from baft_easyedit.method.past_states import PastStates, are_among
from baft_easyedit.model.independent import IndependentEdits
from baft_easyedit.training.settling import settle
from tests.conftest import HIDDEN, logits, make_model

SETTLED = {
    "parametrisation": "whitened",
    "gate": "basis-subspace-bias",
    "past_states": 64,
    "settle_steps": 20,
    "num_steps": 6,
}


def request(k):
    return {"prompt": f"Fact {k} is", "target_new": "no", "loc_prompt": f"Ice {k} is cold"}


def same(state, other):
    return all(torch.equal(state[name], other[name]) for name in state)


def past_error(editor):
    """How far off what the edit does at past states is now."""
    edit = editor.model_edit
    return sum(
        displacement_error(edit.displacement(layer, states), moves, moves.norm(), 0.0).item()
        for layer in edit.layers
        for states, moves in [edit.past(layer).kept()]
    )


def test_past_states_are_kept_as_they_came():
    past = PastStates(3, 4)
    for first in (1.0, 3.0):
        new = torch.tensor([[first] * 3, [first + 1] * 3])
        past.load_state_dict(past.with_edit(new, -new))
    assert past.num_kept == 4
    states, moves = past.kept()
    assert states[:, 0].tolist() == [1, 2, 3, 4]
    assert torch.equal(moves, -states)


def test_past_states_take_the_memory_of_those_that_are_there():
    past, new = PastStates(3, 4), torch.eye(3)
    with torch.inference_mode():
        past.load_state_dict(past.with_edit(new, -new))
    assert past.states.shape == past.moves.shape == (3, 3)
    assert not past.states.is_inference()
    grown = past.with_edit(2 * new, -new)
    assert grown["states"].shape == (4, 3)
    assert past.states.shape == (3, 3)
    wide = {"states": torch.eye(4)[:, :3], "moves": torch.zeros(4, 3), "count": torch.tensor(3.0)}
    past.load_state_dict(wide)  # with room, as states were kept until now
    assert torch.equal(past.kept()[0], torch.eye(3))
    assert torch.equal(
        past.with_edit(new[:1], new[:1])["states"], torch.cat([torch.eye(3), new[:1]])
    )
    with pytest.raises(RuntimeError, match="size mismatch for states"):
        past.load_state_dict(wide | {"states": torch.zeros(5, 3)})


def test_irrelevant_states_can_want_what_they_have_and_no_others():
    past, states = PastStates(3, 4), torch.eye(3)
    past.load_state_dict(past.with_edit(states, torch.diag(torch.tensor([1.0, 0.0, 0.0]))))
    past.accept(torch.stack([states[2], states[0], states[1] + 1e-7]), torch.full((3, 3), 5.0))
    assert past.kept()[1].tolist() == [[1, 0, 0], [0, 0, 0], [5, 5, 5]]
    past.accept(torch.zeros(0, 3), torch.zeros(0, 3))
    assert past.num_kept == 3


def test_of_more_than_fit_the_newest_stay_and_older_ones_go_at_random():
    ages = []
    for seed in range(20):
        past, stream = PastStates(2, 50), torch.randn(400, 2) * 100
        stream[:, 1] = torch.arange(400.0) + 1000 * seed
        for new in stream.split(5):
            past.load_state_dict(past.with_edit(new, new))
            assert torch.equal(past.kept()[0][-5:], new)
            assert past.num_kept == min(50, int(past.count))
        assert past.has_dropped
        ages += (stream[-1, 1] - past.kept()[0][:, 1]).tolist()
    # Each of 50 has its turn of 45 in 50 to stay at each edit: the mean age is near 5 * 10 / 1.
    assert sum(ages) / len(ages) == pytest.approx(47, abs=6)


def test_fewer_past_states_than_an_edit_has_hold_its_first_ones():
    past, new = PastStates(3, 4), torch.arange(7.0)[:, None].expand(7, 3) + 1
    for _ in range(2):
        past.load_state_dict(past.with_edit(new, new))
        assert past.kept()[0][:, 0].tolist() == [1, 2, 3, 4]


def test_where_no_displacement_is_wanted_nothing_settles(model, tokenizer, hparams):
    editor = BaFTEditor(model, tokenizer, replace(hparams, **SETTLED))
    editor.edit(request(0))
    for layer in editor.model_edit.layers:
        editor.model_edit.past(layer).moves.zero_()
    before = editor.model_edit.snapshot()
    settle(editor.model_edit, editor.hparams)
    assert same(editor.model_edit.snapshot(), before)


def test_states_are_told_that_come_again_and_can_go():
    past, states = PastStates(3, 4), 10 * torch.eye(3)
    past.load_state_dict(past.with_edit(states, states))
    gone = are_among(past.kept()[0], states[1:2] * (1 + 1e-6))
    assert gone.tolist() == [False, True, False]
    for other in (states[1:2] * 1.001, states[1:2].bfloat16() * 1.05):
        assert are_among(past.kept()[0], other).tolist() == [False] * 3
    assert are_among(past.kept()[0], states[1:2].bfloat16() * 1.006).tolist() == gone.tolist()
    kept = past.with_edit(states[:2], -states[:2], gone)
    assert torch.equal(kept["states"], states[[0, 2, 0, 1]])
    assert torch.equal(kept["moves"], states[[0, 2, 0, 1]] * torch.tensor([[1], [1], [-1], [-1]]))
    assert kept["count"] == 4


def test_a_prompt_can_be_edited_again_and_again(tokenizer, hparams):
    """What an earlier edit of it wanted at the same states is no longer wanted."""
    changed = {"num_steps": 60, "settle_steps": 100, "gate": "rms-sigmoid", "past_states": 96}
    hparams = replace(hparams, **SETTLED | changed | {"min_similarity": 0.5, "rank": 8})
    editor = BaFTEditor(make_model(), tokenizer, hparams)
    editor.edit(request(0))
    for target in ("yes", "ice", "no", "red", "hat", "a"):
        new = {"prompt": "The capital of France is", "target_new": target}
        assert editor.edit(new).learned == (True,), target
    first, last = (editor.model_edit.past(layer).num_kept for layer in hparams.layers)
    assert first == last


def test_displacement_is_what_the_intervention_adds(model, tokenizer, hparams):
    editor = BaFTEditor(model, tokenizer, replace(hparams, **SETTLED))
    editor.edit(request(0))
    edit = editor.model_edit
    layer, states = edit.layers[0], torch.randn(5, HIDDEN)
    edited = edit.intervention(layer)(states)[0]
    assert torch.equal(edit.displacement(layer, states), edited - states)
    copies = IndependentEdits(edit, 2)
    values = copies._values_of(1)
    assert torch.allclose(copies.displacement(layer, states, values), edited - states)


def test_an_edit_keeps_its_states_and_what_it_does_there(model, tokenizer, hparams):
    editor = BaFTEditor(model, tokenizer, replace(hparams, **SETTLED, num_prompt_positions=2))
    editor.edit(request(0))
    edit = editor.model_edit
    past = edit.past(edit.layers[0])
    _, moves = past.kept()
    used = 2 + len(" no")
    assert past.num_kept == used + 4  # and irrelevant ones
    assert (moves[:used].norm(dim=-1) > 0).all()
    assert (moves[used:] == 0).all()
    assert torch.equal(moves[:used], edit.displacement(edit.layers[0], past.kept()[0][:used]))


def test_what_an_irrelevant_prompt_shares_with_the_edited_one_is_not_irrelevant(
    model, tokenizer, hparams
):
    hparams = replace(hparams, **SETTLED, num_prompt_positions=3, loc_positions="last")
    editor = BaFTEditor(model, tokenizer, hparams)
    editor.edit({"prompt": "Ice is", "target_new": "no", "loc_prompt": "Ice is"})
    for layer in hparams.layers:
        assert editor.model_edit.past(layer).kept()[1].any(-1).all()


def test_settling_brings_past_edits_back(tokenizer, hparams):
    errors = []
    for steps in (1, 160):
        editor = BaFTEditor(make_model(), tokenizer, replace(hparams, **SETTLED))
        editor.hparams = replace(editor.hparams, settle_steps=steps)
        for k in range(4):
            editor.edit(request(k))
        errors.append(past_error(editor))
    assert errors[1] < 0.3 * errors[0]


def test_what_is_off_within_the_tolerance_is_not_off():
    wanted = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, 0.0]])
    moves = torch.tensor([[3.0, 4.0], [0.5, 0.0], [0.0, -2.5]])
    assert displacement_error(moves, wanted, torch.tensor(5.0), 0.2).item() == pytest.approx(0.03)
    assert displacement_error(moves, wanted, torch.tensor(5.0), 0.5).item() == 0


def test_edits_that_leave_past_ones_alone_stay_as_they_were_learned(
    tokenizer, hparams, monkeypatch
):
    monkeypatch.setattr("baft_easyedit.training.settling._TOLERANCE", 1e9)
    outputs = []
    for most in (0, 64):
        model = make_model()
        editor = BaFTEditor(model, tokenizer, replace(hparams, **SETTLED | {"past_states": most}))
        editor.edit(request(0))
        editor.edit(request(1))
        outputs.append(logits(model))
    assert torch.equal(*outputs)


def test_of_an_edit_without_displacement_nothing_settles(model, tokenizer, hparams):
    editor = BaFTEditor(model, tokenizer, replace(hparams, **SETTLED | {"early_stop_loss": 1e9}))
    for k in range(2):
        assert editor.edit(request(k) | {"target_new": "e"}).num_steps <= 6
    assert all(torch.isfinite(value).all() for value in editor.model_edit.snapshot().values())


def test_settled_edits_are_undone_bit_for_bit(model, tokenizer, hparams):
    hparams = replace(hparams, **SETTLED)
    editor, seen = BaFTEditor(model, tokenizer, hparams), []
    for k in range(4):
        seen.append((logits(model), editor.model_edit.snapshot()))
        editor.edit(request(k))
    for before, state in reversed(seen):
        editor.undo()
        assert torch.equal(logits(model), before)
        assert same(editor.model_edit.snapshot(), state)


def test_settled_edits_that_are_kept_are_learned_again_bit_for_bit(tokenizer, hparams, tmp_path):
    hparams = replace(hparams, **SETTLED | {"past_states": 20})  # fewer than there are
    with BaFTEditor.open(
        make_model(), tokenizer, tmp_path / "edit", hparams, checkpoint_every=100
    ) as editor:
        for k in range(4):
            editor.edit(request(k))
            if k == 2:
                expected = editor.model_edit.snapshot()
    model = make_model()
    with BaFTEditor.open(model, tokenizer, tmp_path / "edit", undo_depth=1) as editor:
        editor.rollback(to=3)
        assert same(editor.model_edit.snapshot(), expected)
        editor.edit(request(9))
    other = make_model()
    attach(other, tmp_path / "edit")
    assert torch.equal(logits(other), logits(model))


def test_a_kept_edit_goes_on_without_texts_of_the_model(tokenizer, hparams, tmp_path, monkeypatch):
    hparams = replace(hparams, **SETTLED, min_similarity=0.5)
    with BaFTEditor.open(make_model(), tokenizer, tmp_path / "edit", hparams) as editor:
        editor.edit(request(0))
    monkeypatch.setattr("baft_easyedit.training.own_texts.own_texts", None)
    with BaFTEditor.open(make_model(), tokenizer, tmp_path / "edit") as editor:
        editor.edit(request(1))
        editor.learn_apart([request(2)])


def test_an_edit_learned_apart_is_the_one_learned_in_a_row(tokenizer, hparams):
    hparams, models = replace(hparams, **SETTLED), [make_model(), make_model()]
    editors = [BaFTEditor(model, tokenizer, hparams) for model in models]
    for editor in editors:
        editor.edit(request(0))
    editors[0].edit(request(1))
    before = editors[1].model_edit.snapshot()
    (learned,) = editors[1].learn_apart([request(1)])
    assert same(editors[1].model_edit.snapshot(), before)
    editors[1].install(learned, request(1))
    assert torch.allclose(*map(logits, models), rtol=1e-3, atol=1e-3)
    assert past_error(editors[1]) == pytest.approx(past_error(editors[0]), rel=0.1)


def test_a_report_says_what_is_answered_after_settling(tokenizer, hparams, monkeypatch):
    learned = []
    for wrecks in (False, True):
        model = make_model()
        h = replace(hparams, **SETTLED | {"num_steps": 40, "settle_steps": 1})
        editor = BaFTEditor(model, tokenizer, h)
        editor.edit(request(0))

        def wreck(edit, *_args):
            with torch.no_grad():
                for p in edit.parameters():
                    p.zero_()

        if wrecks:
            monkeypatch.setattr("baft_easyedit.training.learner.settle", wreck)
        report = editor.edit(request(1))
        learned.append(report.learned)
        ids = tokenizer("Fact 1 is no")["input_ids"]
        target = len(ids) - len(tokenizer("Fact 1 is")["input_ids"])
        given = torch.tensor([ids])
        with editor.model_edit.prompt_lengths([len(ids) - target]), torch.no_grad():
            answer = model(given).logits[0, -target - 1 : -1].float()
        loss = torch.nn.functional.cross_entropy(answer, given[0, -target:])
        assert report.request_losses[0] == pytest.approx(loss.item(), rel=1e-3, abs=1e-4)
    assert learned == [(True,), (False,)]


def test_more_edits_than_past_states_hold_are_told_once(model, tokenizer, hparams, caplog):
    editor = BaFTEditor(model, tokenizer, replace(hparams, **{**SETTLED, "past_states": 20}))
    told = []
    for k in range(5):
        editor.edit(request(k))
        told.append(sum("all 20 past_states are taken" in r.getMessage() for r in caplog.records))
    assert told[0] == 0
    assert told[-1] == 1
    assert editor.model_edit.has_dropped_states
    editor.undo()
    editor.edit(request(4))
    assert sum("past_states are taken" in r.getMessage() for r in caplog.records) == 1


def test_an_edit_of_other_past_states_is_refused(model, tokenizer, hparams):
    editor = BaFTEditor(model, tokenizer, replace(hparams, **SETTLED))
    other = replace(editor.hparams, past_states=0)
    with pytest.raises(ValueError, match="past_states must be 64, as in the given edit; got 0"):
        BaFTEditor(model, tokenizer, other, edit=editor.model_edit)


def test_what_settling_unlearns_is_settled_again_with_its_irrelevant_states_as_they_are(
    tokenizer, hparams, monkeypatch
):
    editor = BaFTEditor(make_model(), tokenizer, replace(hparams, **SETTLED | {"num_steps": 40}))
    editor.edit(request(0))
    before = [editor.model_edit.past(layer).kept()[1] for layer in hparams.layers]
    given = []

    def wreck(edit, *_):
        moves = [edit.past(layer).kept()[1] for layer in edit.layers]
        given.append([m[len(b) :].clone() for m, b in zip(moves, before, strict=True)])
        with torch.no_grad():
            for p in edit.parameters() if len(given) == 1 else ():
                p.zero_()

    monkeypatch.setattr("baft_easyedit.training.learner.settle", wreck)
    assert editor.edit(request(1)).learned == (True,)
    for at_first, again in zip(*given, strict=True):
        still = ~at_first.any(-1)
        assert still.sum() == 4  # the irrelevant states
        assert again[still].any(-1).all()
        assert torch.equal(again[~still], at_first[~still])


def test_of_two_settlings_the_better_is_kept(tokenizer, hparams, monkeypatch):
    answered = iter([((1.0, 1.0), (True, False)), ((2.0, 2.0), (False, False))])
    editor = BaFTEditor(make_model(), tokenizer, replace(hparams, **SETTLED | {"num_steps": 40}))
    editor.edit(request(0))
    monkeypatch.setattr("baft_easyedit.training.learner.answered_now", lambda *_: next(answered))
    report = editor.edit([request(1), request(2)])
    assert (report.learned, report.request_losses) == ((True, False), (1.0, 1.0))
