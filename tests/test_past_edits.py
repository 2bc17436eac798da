import copy
import pickle
from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch.nn import functional as F

from baft_easyedit import BaFTEditor, attach
from baft_easyedit.method.gates import GATES
from baft_easyedit.method.intervention import BaFTIntervention
from baft_easyedit.method.past_edits import UNKNOWN, PastEdit, PastEdits
from baft_easyedit.method.whitening import Whitening
from baft_easyedit.model.edit import EditParameters
from baft_easyedit.storage.state import state_hash
from baft_easyedit.training.learner import EditState
from baft_easyedit.training.requests import TextRow
from baft_easyedit.training.stand_ins import centres
from tests.conftest import logits, make_model, random_edit

APART = {"min_similarity": 0.9}
OTHER = "Water boils at"
PROMPTS = "Fact 0 is", "My own name", "The end of"
D = 6


def request(k, target="no"):
    return {"prompt": PROMPTS[k], "target_new": target, "loc_prompt": f"Ice {k} is cold"}


@pytest.fixture
def apart(hparams):
    return replace(hparams, **APART, rank=16, num_steps=40, early_stop_loss=0.05)


@pytest.fixture
def of(tokenizer):
    """Returns a model's logits for a text."""
    return lambda model, text: logits(model, tokenizer(text, return_tensors="pt").input_ids)


def same(state, other):
    return state.keys() == other.keys() and all(torch.equal(state[n], other[n]) for n in state)


def whitening():
    """The statistics of random states."""
    measured = Whitening(D)
    measured.measure(torch.randn(50, D, generator=torch.Generator().manual_seed(0)) * 3 + 1)
    return measured


def moving(gate="one", seed=0):
    """An intervention that moves what it acts on."""
    torch.manual_seed(seed)
    intervention = BaFTIntervention(D, 2, gate).requires_grad_(False)
    for p in intervention.parameters():
        p.add_(torch.randn(p.shape))
    return intervention


def num_parameters(state):
    return sum(value.numel() for name, value in state.items() if name.endswith(".values"))


def vector_of(intervention):
    return torch.nn.utils.parameters_to_vector(intervention.parameters())


def bare(states, values, texts=None, centre=None):
    """An edit whose first state has no centres, and whose texts are not known, if not given."""
    texts = torch.full(states.shape[:1], UNKNOWN) if texts is None else texts
    return PastEdit(states, texts, states[:0] if centre is None else centre, values)


def past(*edits, gate="one"):
    """Past edits of states and an intervention each."""
    made = PastEdits(D, 2, gate)
    for states, intervention in edits:
        made.load_state_dict(made.with_edit(bare(states, vector_of(intervention))))
    return made


@pytest.mark.parametrize("gate", GATES)
def test_at_each_state_the_edit_acts_that_has_the_most_similar_one(gate):
    torch.manual_seed(1)
    states, edits = torch.randn(5, D) * 3, [moving(gate, seed) for seed in (1, 2)]
    own, z = past((states[:2], edits[0]), gate=gate), whitening()
    centres = torch.stack([torch.randn(D), z.mean])
    own.load_state_dict(own.with_edit(bare(states[2:], vector_of(edits[1]), centre=centres)))
    hidden = torch.randn(4, 3, D) * 3
    around = z.whitened(hidden)[..., None, :]
    cosines = F.cosine_similarity(around, z.whitened(states), dim=-1)  # [4, 3, 5]
    from_centre = F.cosine_similarity(
        around - z.whitened(centres), z.whitened(states[2:3]) - z.whitened(centres), dim=-1
    )
    cosines = 1 - 2 * (1 - cosines)  # distances count twice where there is no centre
    cosines[..., 2] = from_centre.mean(-1)
    edited, weights = own(hidden, z, 0.5)
    for i in range(4):
        for t in range(3):
            h, best = hidden[i, t], cosines[i, t].argmax()
            expected, w = edits[int(best >= 2)](h)
            if cosines[i, t, best] >= 0.5:
                torch.testing.assert_close(edited[i, t], expected)
                torch.testing.assert_close(weights[i, t], w)
            else:
                assert torch.equal(edited[i, t], h)
                assert not weights[i, t].any()
    assert 0 < weights.any(-1).sum() < 12


def test_an_edit_acts_at_its_subject_in_other_forms_and_not_at_its_form_with_others():
    form, other_form, subject, other = (torch.eye(D)[i] for i in range(4))
    z = Whitening(D)
    z.measure(torch.cat([torch.eye(D), -torch.eye(D)]))  # of length 1 in all directions
    state, centre = (9 * form + subject)[None], 9 * form[None]
    hidden = torch.stack([9 * form + other, 8.8 * form + 0.3 * other_form + 0.9 * subject])
    for around, acts in ((centre, [False, True]), (centre[:0], [True, True])):
        own = PastEdits(D, 2, "one")
        own.load_state_dict(own.with_edit(bare(state, vector_of(moving()), centre=around)))
        assert own(hidden, z, 0.5)[1].any(-1).tolist() == acts


def test_without_past_edits_nothing_is_edited():
    hidden = torch.randn(2, 3, D)
    edited, weights = past()(hidden, whitening(), -1.0)
    assert torch.equal(edited, hidden)
    assert weights.shape == (2, 3, 2)
    assert not weights.any()


def test_an_edit_begins_to_act_when_it_is_there_and_ends_when_it_goes():
    states, hidden = torch.eye(D)[:2] * 5, torch.eye(D)[3:4] * 5
    own, z = past((states, moving())), whitening()
    assert own.nearest(hidden, z)[0] < 0.99
    before = own.state_dict()
    new = vector_of(moving(seed=2))
    own.load_state_dict(own.with_edit(bare(hidden, new)))
    assert own.nearest(hidden, z)[0] > 0.99
    torch.testing.assert_close(own(hidden, z, 0.9)[0], moving(seed=2)(hidden)[0])
    own.load_state_dict(before)
    assert own.nearest(hidden, z)[0] < 0.99


def test_an_edit_whose_states_are_gone_goes():
    states = torch.eye(D) * 5
    own = past((states[:2], moving(seed=1)), (states[2:4], moving(seed=2)))
    parameters = vector_of(moving(seed=3))
    some = own.with_edit(bare(states[:1], parameters), torch.tensor([True, False, False, False]))
    assert [len(some[f"{i}.states"]) for i in range(3)] == [1, 2, 1]
    assert len(some) == 12
    all_ = own.with_edit(bare(states[:2], parameters), torch.tensor([True, True, False, False]))
    assert [len(all_[f"{i}.states"]) for i in range(2)] == [2, 2]
    own.load_state_dict(all_)
    assert torch.equal(own.states, states[[2, 3, 0, 1]])
    for index, seed in enumerate((2, 3)):
        expected = moving(seed=seed)(states)[0]
        torch.testing.assert_close(own.intervention(index)(states)[0], expected, rtol=0, atol=0)


def test_past_edits_take_the_memory_of_those_that_are_there():
    own, parameters = past(), vector_of(moving())
    with torch.inference_mode():
        own.load_state_dict(own.with_edit(bare(torch.eye(D), parameters)))
        own.intervention(0)
    assert not any(buffer.is_inference() for buffer in own.buffers())
    hidden = torch.eye(D).requires_grad_()
    own(hidden, whitening(), -1.0)[0].sum().backward()  # through what inference mode made
    assert hidden.grad.abs().sum() > 0


def test_tensors_of_other_edits_are_not_loaded():
    own = past((torch.eye(D)[:2], moving()))
    with pytest.raises(RuntimeError, match="are not the tensors of edits of this rank and gate"):
        own.load_state_dict(own.state_dict() | {"0.values": torch.zeros(3)})
    assert len(own.edits[0].values) > 3


SHARED = pytest.mark.parametrize(
    ("new", "gone", "gone_new"),
    [
        ([0, 1, 4], [True, True, True, False], [False] * 3),  # the prompt of the first edit
        ([0, 3], [True, True, True, False], [False, True]),
        ([4, 1, 3], [False] * 4, [False, True, True]),  # the beginnings of prompts are the same
        ([1, 4], [False, True, False, False], [False] * 2),  # a prompt goes on where an answer was
        ([4], [False] * 4, [False]),
    ],
)


@SHARED
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_edit_replaces_that_of_its_prompt_and_leaves_others_theirs(new, gone, gone_new, dtype):
    """By tokens: their states may be alike, or come out otherwise."""
    texts, values = torch.arange(D) + 1, vector_of(moving())
    states = (torch.ones(D, D) + 1e-3 * torch.randn(D, D)).to(dtype).float()
    own = past()
    for part in (slice(0, 3), slice(3, 4)):
        own.load_state_dict(own.with_edit(bare(states[part], values, texts[part])))
    edit = bare(states[new] + torch.randn(len(new), D), values, texts[new])
    assert [one.tolist() for one in own.shared_with(edit)] == [gone, gone_new]
    assert [len(one) for one in past().shared_with(edit)] == [0, len(new)]


@SHARED
def test_where_texts_are_not_known_equal_states_are_of_one_text(new, gone, gone_new):
    states = torch.eye(D) * 5
    own = past((states[:3], moving(seed=1)), (states[3:4], moving(seed=2)))
    edit = bare(states[new] * (1 + 1e-6), vector_of(moving()), torch.arange(len(new)) + 1)
    assert [one.tolist() for one in own.shared_with(edit)] == [gone, gone_new]
    edit = bare(states[new] * 1.001, vector_of(moving()), torch.arange(len(new)) + 1)
    assert not torch.cat(own.shared_with(edit)).any()


def test_an_edit_replaces_that_of_its_tokens_whatever_their_states(tokenizer, apart):
    """Other prompts may have nearly the same states, and the same prompt others later on."""
    model, (ice, tea) = make_model(), (tokenizer(text).input_ids[-1] for text in ("Ice", "Tea"))
    with torch.no_grad():
        rows = model.get_input_embeddings().weight
        rows[tea] = rows[ice] * (1 + 1e-6)
    editor = BaFTEditor(model, tokenizer, replace(apart, num_steps=2))
    first = editor.model_edit.past(apart.layers[0])
    for prompt, count in (("Ice is", 1), ("Tea is", 2), ("Ice is", 2)):
        editor.edit({"prompt": prompt, "target_new": "hot"})
        assert len(first.edits) == count
        with torch.no_grad():
            model.get_input_embeddings().weight.add_(1e-3)


def test_texts_are_told_by_all_their_tokens_alike_in_all_processes():
    one, other = (TextRow(ids, 1, is_edit=True).hashes() for ids in ((7, 8, 9), (7, 9, 9)))
    assert one == [1792322306264558857, 3944506111732025358, 6779170472795749825]
    assert one[0] == other[0]
    assert not {*one[1:]} & {*other[1:]}


def test_edits_act_at_their_own_prompts_only_and_are_undone_bit_for_bit(tokenizer, apart, of):
    """Later edits change nothing of earlier ones, nor of other prompts."""
    model, seen = make_model(), []
    editor = BaFTEditor(model, tokenizer, apart)

    def answers():
        return [of(model, text) for text in (OTHER, *PROMPTS)]

    for k in range(3):
        seen.append((answers(), editor.model_edit.snapshot()))
        assert editor.edit(request(k)).learned == (True,)
    assert editor.holds([request(k) for k in range(3)]) == [True] * 3
    (other, *_), last = seen[0][0], answers()
    assert torch.equal(last[0], other)
    for k, (before, _) in enumerate(seen):  # k edits had been made, in the order of the prompts
        assert all(map(torch.equal, before[1 : k + 1], last[1 : k + 1]))
    for before, state in reversed(seen):
        editor.undo()
        assert all(map(torch.equal, before, answers()))
        assert same(editor.model_edit.snapshot(), state)


def test_an_edit_is_learned_as_if_it_were_the_first(tokenizer, apart):
    """So edits in another order do the same."""
    found = []
    for order in ((0, 1), (1, 0)):
        editor = BaFTEditor(make_model(), tokenizer, apart)
        reports = [editor.edit(request(k)) for k in order]
        values = [editor.model_edit.past(1).edits[order.index(k)].values for k in (0, 1)]
        found.append(([reports[order.index(k)].losses for k in (0, 1)], torch.stack(values)))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])


def test_padding_opens_nothing(tokenizer, apart):
    model = make_model()
    editor = BaFTEditor(model, tokenizer, apart)
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


def test_the_least_similarity_lets_an_edit_act_everywhere(tokenizer, apart, of):
    model = make_model()
    editor = BaFTEditor(model, tokenizer, replace(apart, min_similarity=-1.0))
    before = of(model, OTHER)
    editor.edit(request(0))
    opened = of(model, OTHER)
    assert not torch.equal(opened, before)
    edit = editor.model_edit
    with torch.no_grad():
        for layer in edit.layers:  # the edit alone, as one that acts everywhere
            parts = zip(
                edit.intervention(layer).parameters(),
                edit.past(layer).intervention(0).parameters(),
                strict=True,
            )
            for own, learned in parts:
                own.copy_(learned)
    edit.min_similarity = None
    torch.testing.assert_close(of(model, OTHER), opened, rtol=1e-4, atol=1e-4)


def test_a_prompt_can_be_edited_again_and_again(tokenizer, apart):
    editor = BaFTEditor(make_model(), tokenizer, replace(apart, num_steps=60))
    editor.edit(request(1))
    expected = editor.edit(request(0, "ice")) and editor.model_edit.snapshot()
    for target in ("yes", "ice"):
        editor.edit([request(0, target), request(2)])  # of several
        assert editor.holds([request(k, target) for k in (1, 0, 2)]) == [False, True, False]
        assert editor.model_edit.num_parameters == 1.5 * num_parameters(expected)
        editor.undo()
    for target in ("yes", "red", "ice"):
        assert editor.edit(request(0, target)).learned == (True,), target
        assert editor.holds([request(1), request(0, target)]) == [True, True]
    assert same(editor.model_edit.snapshot(), expected)


def test_an_edit_can_leave_fewer_than_there_were(tokenizer, apart, monkeypatch):
    editor = BaFTEditor(make_model(), tokenizer, apart)
    for k in range(3):
        editor.edit(request(k))

    def all_gone(past, new):
        return torch.ones(len(past.states), dtype=torch.bool), torch.zeros(len(new.states)) > 0

    monkeypatch.setattr(PastEdits, "shared_with", all_gone)
    editor.edit([request(0, "ice")])
    assert [len(editor.model_edit.past(layer).edits) for layer in apart.layers] == [1, 1]
    editor.edit([request(0), request(1)])
    assert [len(editor.model_edit.past(layer).edits) for layer in apart.layers] == [1, 1]
    editor.undo()
    editor.undo()
    assert [len(editor.model_edit.past(layer).edits) for layer in apart.layers] == [3, 3]


def test_prompts_with_the_same_first_words_keep_their_edits(tokenizer, apart, of, caplog):
    hparams = replace(apart, num_prompt_positions=6, num_steps=60)
    editor, prompts = BaFTEditor(make_model(), tokenizer, hparams), ("AB cd", "AB ef", "AB gh")
    requests = [{"prompt": prompt, "target_new": "no"} for prompt in prompts]
    seen = []
    for k, new in enumerate(requests):
        report = editor.edit(new)
        assert (report.learned == (False,)) == ("not learned" in caplog.text)
        caplog.clear()
        seen.append([of(editor.model, p) for p in prompts[: k + 1]])
    for one in seen:
        assert all(map(torch.equal, one, seen[-1]))
    editor.edit(requests[0])
    assert [len(editor.model_edit.past(layer).edits) for layer in apart.layers] == [3, 3]


def test_layers_may_have_any_order(tokenizer, apart):
    editor = BaFTEditor(make_model(), tokenizer, replace(apart, layers=[3, 1]))
    for target in ("ice", "yes"):
        assert editor.edit(request(0, target)).learned == (True,)
    assert [len(editor.model_edit.past(layer).edits) for layer in (3, 1)] == [1, 1]


def test_a_prompt_that_goes_on_where_an_answer_was_leaves_the_edit_of_the_answer(tokenizer, apart):
    editor = BaFTEditor(make_model(), tokenizer, apart)
    first = {"prompt": "The capital is", "target_new": " Rome"}
    editor.edit([first, {"prompt": "The capital is Ro", "target_new": "xy"}])
    assert [len(editor.model_edit.past(layer).edits) for layer in apart.layers] == [2, 2]
    editor.edit(first)


def test_edits_learned_apart_are_those_learned_in_a_row(tokenizer, apart, of):
    answers = []
    for is_apart in (False, True):
        model = make_model()
        editor = BaFTEditor(model, tokenizer, apart)
        for k in (0, 1):
            if is_apart:
                before = editor.model_edit.snapshot()
                (learned,) = editor.learn_apart([request(k)])
                assert same(editor.model_edit.snapshot(), before)
                editor.install(learned, request(k))
            else:
                editor.edit(request(k))
        assert editor.holds([request(0), request(1)]) == [True, True]
        answers.append(of(model, PROMPTS[0]))
    torch.testing.assert_close(*answers, rtol=1e-3, atol=1e-3)


def test_requests_of_one_call_have_bases_of_their_own(tokenizer, apart, of):
    apart, answers, losses = replace(apart, early_stop_loss=0.0), [], []
    for calls in ([0, 1, 2], [[0, 1, 2]]):
        model = make_model()
        editor = BaFTEditor(model, tokenizer, apart)
        for call in calls:
            report = editor.edit([request(k) for k in ([call] if call in (0, 1, 2) else call)])
        answers.append([of(model, text) for text in (OTHER, *PROMPTS)])
        losses.append(report.request_losses)
        assert [len(editor.model_edit.past(layer).edits) for layer in apart.layers] == [3, 3]
    for one, other in zip(*answers, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
    assert report.num_requests == 3
    assert report.learned == (True,) * 3
    assert len(report.losses) == report.num_steps + 1
    assert losses[0][0] == pytest.approx(losses[1][2], rel=1e-2, abs=1e-4)
    assert report.final_loss == pytest.approx(sum(report.request_losses) / 3, rel=1e-2, abs=1e-4)
    editor.undo()
    assert editor.model_edit.num_parameters == 0


def test_kept_edits_are_learned_again_bit_for_bit_and_act_likewise(tokenizer, apart, of, tmp_path):
    with BaFTEditor.open(
        make_model(), tokenizer, tmp_path / "edit", apart, checkpoint_every=100
    ) as editor:
        for k in range(3):
            editor.edit(request(k))
            if k == 1:
                expected = editor.model_edit.snapshot()
    model = make_model()
    with BaFTEditor.open(model, tokenizer, tmp_path / "edit", undo_depth=1) as editor:
        editor.rollback(to=2)
        assert same(editor.model_edit.snapshot(), expected)
        editor.edit(request(2, "ice"))
    other = make_model()
    assert attach(other, tmp_path / "edit").min_similarity == 0.9
    for text in (OTHER, *PROMPTS):
        assert torch.equal(of(model, text), of(other, text))


def test_a_kept_edit_goes_on_without_texts_of_the_model(tokenizer, apart, tmp_path, monkeypatch):
    with BaFTEditor.open(make_model(), tokenizer, tmp_path / "edit", apart) as editor:
        editor.edit(request(0))
    monkeypatch.setattr("baft_easyedit.training.own_texts.own_texts", None)
    with BaFTEditor.open(make_model(), tokenizer, tmp_path / "edit") as editor:
        editor.edit(request(1))
        editor.learn_apart([request(2)])


def test_past_edits_work_in_inference_mode_and_in_copies(tokenizer, apart, of):
    model = make_model()
    editor = BaFTEditor(model, tokenizer, apart)
    editor.edit(request(0))
    expected, other = of(model, PROMPTS[0]), of(model, OTHER)
    with torch.inference_mode():
        assert torch.equal(of(model, PROMPTS[0]), expected)
        copied = copy.deepcopy(model)
        assert torch.equal(of(copied, PROMPTS[0]), expected)
        assert torch.equal(of(pickle.loads(pickle.dumps(model)), PROMPTS[0]), expected)
    assert torch.equal(of(model, PROMPTS[0]), expected)
    copied = copy.deepcopy(model)
    editor.undo()
    assert not torch.equal(of(model, PROMPTS[0]), expected)
    assert torch.equal(of(copied, PROMPTS[0]), expected)
    assert torch.equal(of(copied, OTHER), other)


@pytest.mark.parametrize("least", [-1, 0])
def test_whole_numbers_are_similarities(apart, least):
    assert replace(apart, min_similarity=least).min_similarity == float(least)


def settled(edit):
    """What development versions kept: one intervention of all edits, and the moves at states."""
    state = edit.snapshot()
    for layer in edit.layers:
        past = edit.past(layer)
        own = zip(
            dict(edit.intervention(layer).named_parameters()),
            past.intervention(0).parameters(),
            strict=True,
        )
        state |= {f"_interventions.{layer}.{name}": value for name, value in own}
        for name in PastEdit._fields:
            del state[f"_past.{layer}.0.{name}"]
        far = torch.full_like(past.states[:1], 9.0)  # a state that wanted no move
        states = torch.cat([past.states, far])
        moves = torch.ones_like(states)
        moves[-1] = 0
        count = torch.tensor(float(len(states)))
        parts = {"states": states, "moves": moves, "count": count}
        state |= {f"_past.{layer}.{name}": value for name, value in parts.items()}
    return state


def test_edits_that_earlier_versions_settled_act_as_one_past_edit(tokenizer, apart, of):
    model = make_model()
    editor = BaFTEditor(model, tokenizer, apart)
    editor.edit(request(0))
    expected, old = [of(model, text) for text in (OTHER, *PROMPTS)], settled(editor.model_edit)
    editor.undo()
    editor.model_edit.restore(old)
    editor.model_edit.attach(model)
    assert all(map(torch.equal, expected, [of(model, text) for text in (OTHER, *PROMPTS)]))


def test_a_state_without_texts_has_the_hash_that_earlier_versions_gave_it(tokenizer, apart):
    editor = BaFTEditor(make_model(), tokenizer, apart)
    editor.edit(request(0))
    learned = editor.model_edit.snapshot()
    old = {name: value for name, value in learned.items() if not name.endswith(".texts")}
    editor.model_edit.restore(old)
    now = editor.model_edit.snapshot()
    assert now.keys() == learned.keys()
    hashes = [state_hash(EditState(state, attached=True)) for state in (old, now, learned)]
    assert hashes[0] == hashes[1] != hashes[2]


@pytest.mark.parametrize("had_centre", [False, True])
def test_edits_of_earlier_versions_are_measured_as_they_were(tokenizer, apart, had_centre):
    """By the cosine from one centre, or from the mean of all texts."""
    editor = BaFTEditor(make_model(), tokenizer, apart)
    editor.edit(request(0))
    state = editor.model_edit.snapshot()
    old = {name: value for name, value in state.items() if not name.endswith(".centre")}
    assert len(old) < len(state)
    centre = torch.randn(1, 32)
    if had_centre:
        old |= {f"_past.{layer}.0.centre": centre for layer in editor.model_edit.layers}
    editor.undo()
    editor.model_edit.restore(old)
    layer = editor.model_edit.layers[0]
    past, z = editor.model_edit.past(layer), editor.model_edit.whitening(layer)
    first, origin = past.edits[0].states[0], centre[0] if had_centre else z.mean
    for scale in (0.01, 0.1, 0.3):
        near = first + scale * first.norm() * F.normalize(torch.randn(32), dim=0)
        away = (z.whitened(state) - z.whitened(origin) for state in (near, first))
        found = past.nearest(near[None], z)[0]
        cosine = F.cosine_similarity(*away, dim=0)
        torch.testing.assert_close(found, cosine[None], rtol=1e-4, atol=1e-4)


def test_a_directory_of_an_earlier_version_goes_on_and_back(tokenizer, apart, tmp_path):
    """There an edit had one centre at most."""
    subject = {"prompt": "France is in", "target_new": "no", "subject": "France"}
    with BaFTEditor.open(make_model(), tokenizer, tmp_path / "kept", apart) as editor:
        with mock.patch("baft_easyedit.training.loop.centres", one_centre):
            editor.edit(subject)
            editor.edit(request(1))
        kept = editor.model_edit.snapshot()
        shapes = {v.shape[0] for n, v in kept.items() if n.endswith(".centre")}
        assert shapes == {0, 1}
    with BaFTEditor.open(make_model(), tokenizer, tmp_path / "kept") as editor:
        assert same(editor.model_edit.snapshot(), kept)
        editor.edit(subject | {"prompt": "France was in"})
        editor.undo()
        assert same(editor.model_edit.snapshot(), kept)
        editor.rollback(to=0)
        assert editor.model_edit.num_parameters == 0
        with pytest.raises(ValueError, match=r"entry 1 .* could not be learned again bit for bit"):
            editor.rollback(to=1)


def one_centre(*given):
    return [{i: c[:1] for i, c in own.items()} for own in centres(*given)]


def test_several_edits_from_before_centres_can_be_saved(tokenizer, apart, tmp_path):
    editor = BaFTEditor(make_model(), tokenizer, apart)
    editor.edit(request(0))
    editor.edit(request(1))
    state = editor.model_edit.snapshot()
    old = {name: value for name, value in state.items() if not name.endswith(".centre")}
    editor.undo()
    editor.model_edit.restore(old)
    editor.save(tmp_path / "kept")
    again = BaFTEditor.load(make_model(), tokenizer, tmp_path / "kept")
    assert same(again.model_edit.snapshot(), editor.model_edit.snapshot())


def test_an_edit_that_acts_everywhere_takes_no_past_edits(tokenizer, apart):
    """What `apart` cannot tell as one intervention would be lost."""
    own = BaFTEditor(make_model(), tokenizer, apart)
    plain = BaFTEditor(make_model(), tokenizer, replace(apart, min_similarity=None))
    before = plain.model_edit.snapshot()
    own.edit(request(0))
    with pytest.raises(ValueError, match="snapshot must be one of an edit of the same layers"):
        plain.model_edit.restore(own.model_edit.snapshot())
    assert same(plain.model_edit.snapshot(), before)


def test_states_at_a_centre_are_near_to_no_edit():
    """Where rounding decides the direction from the centre; however many are asked at once."""
    z = whitening()
    states, others = torch.randn(2, D) * 3, torch.randn(40, D) * 9
    same_as_centre = bare(others[:1], vector_of(moving()), centre=others[:1] + 1e-5)
    own = past((states, moving()))
    own.load_state_dict(own.with_edit(bare(states[:1] + 2, vector_of(moving()), centre=states[:1])))
    own.load_state_dict(own.with_edit(same_as_centre))
    similarity, owner = own.nearest(torch.cat([others, states]), z)
    assert similarity.max() <= 1 + 1e-5
    assert (similarity[0], owner[0]) == (pytest.approx(1, abs=1e-5), 2)  # without its centre
    alone = own.nearest(states[:1], z)
    torch.testing.assert_close(alone[0], similarity[40:41])
    assert (alone[1].item(), owner[40].item()) == (0, 0)


def test_an_edit_that_hardly_sees_its_subject_acts_as_narrowly_as_one_without():
    z = whitening()
    state, hidden = torch.randn(1, D) * 3, torch.randn(40, D) * 5
    near = torch.cat([state * 1.001, z.mean[None]])
    found = []
    for centre in (near, state[:0]):
        own = PastEdits(D, 2, "one")
        own.load_state_dict(own.with_edit(bare(state, vector_of(moving()), centre=centre)))
        found.append(own.nearest(hidden, z)[0])
    torch.testing.assert_close(*found)
    assert (found[0] > 0).any()


def test_a_state_that_is_the_mean_of_all_texts_is_near_to_no_edit():
    z = whitening()
    own = PastEdits(D, 2, "one")
    centre = torch.stack([torch.randn(D), z.mean])
    own.load_state_dict(own.with_edit(bare(torch.randn(1, D) * 3, torch.zeros(26), centre=centre)))
    assert own.nearest(z.mean[None], z)[0] <= 0


def test_what_whitened_the_training_of_earlier_versions_is_left_out():
    edit, old = random_edit(), EditParameters(32, (1, 2), 4, "one", 3, min_similarity=0.5)
    state = edit.snapshot()
    statistics = {n: v for n, v in old.snapshot().items() if n.startswith("_whitening.")}
    assert statistics
    edit.restore({**state, **statistics})
    assert same(edit.snapshot(), state)


OF_ANOTHER_SHAPE = [
    ("_whitening.1.mean", None),
    ("_past.1.0.values", None),
    ("_past.1.0.values", torch.zeros(3)),
    ("_past.1.0.states", torch.zeros(5, D + 1)),
    ("_past.1.2.states", torch.zeros(5, D)),
    ("_past.7.0.states", torch.zeros(5, D)),
    ("_past.1.mine", torch.zeros(5, D)),
    ("_past.1.0.states", torch.zeros(2, 32)),  # fewer than at the other layer
    ("_past.1.0.states", torch.tensor(1.0)),
    ("_past.1.0.states", torch.zeros(0, 32)),
    ("_past.1.0.texts", torch.zeros(1, dtype=torch.int64)),
    ("_past.1.0.centre", torch.zeros(0, D + 1)),
    ("_past.1.0.centre", torch.tensor(1.0)),
    ("_past.1.0.centre", torch.zeros(2, 32)),  # more than at the other layer
]


def test_a_snapshot_of_another_shape_changes_nothing(tokenizer, apart):
    editor = BaFTEditor(make_model(), tokenizer, apart)
    editor.edit(request(0))
    before = editor.model_edit.snapshot()
    for name, value in OF_ANOTHER_SHAPE:
        changed = {n: v for n, v in {**before, name: value}.items() if v is not None}
        with pytest.raises(ValueError, match="snapshot must be one of an edit of the same layers"):
            editor.model_edit.restore(changed)
        assert same(editor.model_edit.snapshot(), before)


def test_the_states_before_many_edits_take_the_memory_of_one(tokenizer, apart):
    editor = BaFTEditor(make_model(), tokenizer, apart)
    editor.edit(request(0))
    early = editor.model_edit.snapshot()
    editor.edit(request(1))
    late = editor.model_edit.snapshot()
    shared = [n for n in early if n.startswith("_past.")]
    assert len(shared) == 8
    assert all(early[n].data_ptr() == late[n].data_ptr() for n in shared)
