import copy
import pickle
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from baft_easyedit import BaFTEditor, attach
from baft_easyedit.method.guard import Guard
from baft_easyedit.method.past_states import PastStates
from baft_easyedit.method.whitening import Whitening
from tests.conftest import HIDDEN, logits, make_model

GUARDED = {
    "parametrisation": "whitened",
    "past_states": 64,
    "settle_steps": 100,
    "min_similarity": 0.9,
}
OTHER = "Water boils at"


PROMPTS = "Fact 0 is", "My own name", "The end of"


def request(k):
    return {"prompt": PROMPTS[k], "target_new": "no", "loc_prompt": f"Ice {k} is cold"}


@pytest.fixture
def guarded(hparams):
    return replace(hparams, **GUARDED, rank=16, num_steps=40, early_stop_loss=0.001)


@pytest.fixture
def of(tokenizer):
    """Returns a model's logits for a text."""
    return lambda model, text: logits(model, tokenizer(text, return_tensors="pt").input_ids)


def whitening(size=6):
    """The statistics of random states."""
    measured = Whitening(size)
    measured.measure(torch.randn(50, size, generator=torch.Generator().manual_seed(0)) * 3 + 1)
    return measured


def guard(least, states, moves):
    past = PastStates(states.shape[1], 8)
    past.load_state_dict(past.with_edit(states, moves))
    return Guard(past, whitening(states.shape[1]), least)


def test_similarity_is_the_largest_cosine_in_whitened_coordinates():
    states, moves = torch.randn(4, 6), torch.tensor([[1.0], [0.0], [2.0], [0.0]]).expand(4, 6)
    own = guard(0.5, states, moves)
    hidden = torch.randn(2, 3, 6)
    z, keys = (own.whitening.whitened(h) for h in (hidden, states[[0, 2]]))
    expected = F.cosine_similarity(z[..., None, :], keys, dim=-1).amax(-1)
    torch.testing.assert_close(own.similarity(hidden), expected)
    assert torch.equal(own.admits(hidden), expected >= 0.5)
    assert own.admits(states).tolist()[::2] == [True, True]


def test_an_edit_without_past_states_acts_nowhere():
    own = guard(-1.0, torch.zeros(0, 6), torch.zeros(0, 6))
    assert not own.admits(torch.randn(2, 3, 6)).any()


def test_the_states_are_whitened_again_when_they_change():
    states, moves = torch.eye(6)[:2] * 5, torch.ones(2, 6)
    own = guard(0.99, states, moves)
    new = torch.eye(6)[3:4] * 5
    assert own.admits(states).all()
    assert not own.admits(new)
    own.past.load_state_dict(own.past.with_edit(new, torch.ones(1, 6)))
    assert own.admits(new)
    own.past.accept(states, torch.zeros(2, 6))  # they want one already
    assert own.admits(states).all()
    own.past.load_state_dict(PastStates(6, 8).with_edit(states, moves))
    assert not own.admits(new)


def test_other_prompts_are_answered_bit_for_bit_as_without_the_edit(tokenizer, guarded, of):
    model = make_model()
    before = of(model, OTHER)
    editor = BaFTEditor(model, tokenizer, guarded)
    for k in range(3):
        assert editor.edit(request(k)).learned == (True,)
    assert editor.holds([request(k) for k in range(3)]) == [True] * 3
    assert torch.equal(of(model, OTHER), before)
    editor.model_edit.min_similarity = None
    assert not torch.equal(of(model, OTHER), before)


def test_padding_does_not_open_the_guard(tokenizer, guarded):
    model = make_model()
    editor = BaFTEditor(model, tokenizer, guarded)
    editor.edit(request(0))
    ids = tokenizer([OTHER, PROMPTS[0]], return_tensors="pt", padding=True)
    with editor.model_edit.recording() as record:
        together = model(**ids).logits
    weights = record.weights[editor.model_edit.layers[0]]
    assert not weights[0].any()
    assert weights[1].any()
    with editor.model_edit.disabled():
        without = model(**ids).logits
    assert torch.equal(together[0], without[0])
    assert not torch.equal(together[1], without[1])


def test_the_least_similarity_opens_everywhere(tokenizer, guarded, of):
    model = make_model()
    editor = BaFTEditor(model, tokenizer, replace(guarded, min_similarity=-1.0))
    editor.edit(request(0))
    opened = of(model, OTHER)
    editor.model_edit.min_similarity = None
    torch.testing.assert_close(of(model, OTHER), opened, rtol=0, atol=0)


def test_guarded_edits_are_undone_bit_for_bit(tokenizer, guarded, of):
    model = make_model()
    editor = BaFTEditor(model, tokenizer, guarded)
    seen = []
    for k in range(3):
        seen.append([of(model, text) for text in (OTHER, *PROMPTS)])
        editor.edit(request(k))
    for before in reversed(seen):
        editor.undo()
        after = [of(model, text) for text in (OTHER, *PROMPTS)]
        assert all(map(torch.equal, before, after))


def test_guarded_edits_learned_apart_are_those_learned_alone(tokenizer, guarded, of):
    answers = []
    for apart in (False, True):
        model = make_model()
        editor = BaFTEditor(model, tokenizer, guarded)
        if apart:
            (learned,) = editor.learn_apart([request(0)])
            editor.install(learned)
        else:
            editor.edit(request(0))
        assert editor.holds([request(0)]) == [True]
        answers.append(of(model, PROMPTS[0]))
    torch.testing.assert_close(*answers, rtol=1e-3, atol=1e-3)


def test_a_kept_edit_is_guarded_likewise(tokenizer, guarded, of, tmp_path):
    model, other = make_model(), make_model()
    editor = BaFTEditor(model, tokenizer, guarded)
    editor.edit(request(0))
    editor.save(tmp_path)
    assert attach(other, tmp_path).min_similarity == 0.9
    for text in (OTHER, PROMPTS[0]):
        assert torch.equal(of(model, text), of(other, text))


def test_copies_of_an_edited_model_are_guarded(tokenizer, guarded, of):
    model = make_model()
    editor = BaFTEditor(model, tokenizer, guarded)
    editor.edit(request(0))
    of(model, OTHER)  # its keys are known
    copied = copy.deepcopy(model)
    editor.undo()
    assert not torch.equal(of(copied, PROMPTS[0]), of(model, PROMPTS[0]))
    assert torch.equal(of(copied, OTHER), of(model, OTHER))


def test_the_report_of_a_first_edit_is_of_the_guarded_one(tokenizer, guarded, caplog):
    model, few = make_model(), replace(guarded, past_states=4)  # fewer than the requests have
    editor = BaFTEditor(model, tokenizer, few)
    requests = [request(k) for k in range(3)]
    learned = editor.edit(requests).learned
    assert not all(learned)
    assert list(learned) == editor.holds(requests)
    assert any("requests not learned" in text for text in caplog.messages)


def test_a_guard_works_in_inference_mode(tokenizer, guarded, of):
    model = make_model()
    editor = BaFTEditor(model, tokenizer, guarded)
    editor.edit(request(0))
    expected = of(model, PROMPTS[0])
    with torch.inference_mode():
        assert torch.equal(of(model, PROMPTS[0]), expected)
        copied = copy.deepcopy(model)
        assert torch.equal(of(copied, PROMPTS[0]), expected)
        assert torch.equal(of(pickle.loads(pickle.dumps(model)), PROMPTS[0]), expected)
    assert torch.equal(of(model, PROMPTS[0]), expected)


@pytest.mark.parametrize(("least", "some"), [(0.9, False), (-1.0, True)])
def test_only_irrelevant_states_where_the_edit_acts_are_kept(least, some, tokenizer, guarded):
    editor = BaFTEditor(make_model(), tokenizer, replace(guarded, min_similarity=least))
    editor.edit(request(0))
    for layer in editor.model_edit.layers:
        moves = editor.model_edit.past(layer).kept()[1]
        assert moves.any(-1).any()
        assert (~moves.any(-1)).any() == some


def test_irrelevant_states_where_the_edit_does_not_act_go_on_wanting_no_displacement(
    tokenizer, guarded
):
    """They are kept for another layer, where it acts; here they would become places to act at."""
    editor = BaFTEditor(make_model(), tokenizer, guarded)
    editor.edit(request(0))
    edit = editor.model_edit
    for layer in edit.layers:
        past, far = edit.past(layer), torch.randn(1, HIDDEN)
        both = torch.cat([past.kept()[0][:1] + 1e-3, far])
        past.load_state_dict(past.with_edit(both, torch.zeros_like(both)))
        assert edit.guard(layer).admits(both).tolist() == [True, False]
        edit.accept({layer: both})
        assert past.kept()[1][-2:].any(-1).tolist() == [True, False]


@pytest.mark.parametrize("least", [-1, 0])
def test_whole_numbers_are_similarities(guarded, least):
    assert replace(guarded, min_similarity=least).min_similarity == float(least)
