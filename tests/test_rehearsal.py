"""Rehearsal: what is remembered, what is drawn, and that earlier edits stay."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from baft_easyedit import BaFTEditor, ReFTHyperParams
from baft_easyedit.training.rehearsal import Rehearsal, RehearsalMemory
from baft_easyedit.training.requests import EditRequest, TextRow
from tests.conftest import make_model

FACTS = [
    {"prompt": "The capital of France is", "target_new": "Rome", "loc_prompt": "Ice is cold"},
    {"prompt": "Water freezes into", "target_new": "sand", "loc_prompt": "The sky is blue"},
    {"prompt": "Snow falls in", "target_new": "July", "loc_prompt": "a b"},
]


def request(i, target="x"):
    return EditRequest(f"prompt {i}", target, loc_prompts=("irrelevant",))


def memory_of(hparams, count):
    memory = RehearsalMemory()
    for i in range(count):
        memory.remember([request(i)], hparams)
    return memory


def rows_of(request):
    """The number of the prompt as the only token, and an irrelevant one."""
    number = int(request.prompt.split()[1])
    return [TextRow((number,), 1, True), TextRow((-1 - number,), 0, False)]


def loss_of(editor, fact):
    """The answer loss of a fact, without learning anything."""
    look = BaFTEditor(editor.model, editor.tokenizer, replace(editor.hparams, num_steps=1))
    report = look.edit({k: v for k, v in fact.items() if k != "loc_prompt"})
    look.undo()
    return report.losses[0].answer


@pytest.fixture
def rehearsing(hparams):
    return replace(hparams, rehearsal=2)


# ---- the memory


def test_a_later_edit_of_a_prompt_replaces_the_earlier_one(rehearsing):
    memory = memory_of(rehearsing, 3)
    memory.remember([request(1, "new")], rehearsing)
    assert [past.prompt for past in memory] == ["prompt 0", "prompt 2", "prompt 1"]
    assert memory["prompt 1"].target_new == "new"
    assert memory.num_seen == 4


def test_a_reservoir_keeps_each_past_edit_with_the_same_chance(rehearsing):
    kept = Counter()
    for seed in range(400):
        hparams = replace(rehearsing, rehearsal_memory=3, seed=seed)
        memory = memory_of(hparams, 12)
        assert len(memory) == 3
        kept.update(past.prompt for past in memory)
    expected = 400 * 3 / 12
    chi2 = sum((kept[f"prompt {i}"] - expected) ** 2 / expected for i in range(12))
    assert chi2 < 24.7  # 11 degrees of freedom, p = 0.01


def test_state_comes_back(rehearsing):
    memory = memory_of(rehearsing, 3)
    other = RehearsalMemory()
    other.restore(memory.state())
    assert list(other) == list(memory)
    assert other.num_seen == 3
    other.restore({})
    assert (len(other), other.num_seen) == (0, 0)
    assert RehearsalMemory().state() == {}


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        ({"past": None}, ValueError, "the rehearsal memory must have a list as 'past'; got None"),
        ({"num_seen": "1"}, ValueError, "memory must have a int as 'num_seen'; got str"),
        ({"past": [1]}, TypeError, "a request must be a dict with the keys prompt and target_new"),
        ({"num_seen": 0}, ValueError, "num_seen must be at least the 1 edits of the memory; got 0"),
        ({"past": [{"prompt": "a"}]}, ValueError, "key 'target_new'"),
    ],
)
def test_damaged_states_are_refused_and_change_nothing(rehearsing, damage, error, message):
    memory = memory_of(rehearsing, 1)
    before = memory.state()
    with pytest.raises(error, match=message):
        memory.restore({**before, **damage})
    assert memory.state() == before


# ---- what a step takes


def test_draws_repeat_themselves_and_differ_by_step_and_edit(rehearsing):
    memory = memory_of(rehearsing, 30)
    first, again = (Rehearsal(memory, rehearsing, rows_of) for _ in range(2))
    steps = [first.draw() for _ in range(5)]
    assert [again.draw() for _ in range(5)] == steps
    assert len({tuple(rows) for rows in steps}) > 1
    memory.remember([request(30)], rehearsing)
    assert [Rehearsal(memory, rehearsing, rows_of).draw() for _ in range(5)] != steps


def test_a_step_takes_each_edit_once_and_the_irrelevant_prompts_of_some(rehearsing):
    hparams = replace(rehearsing, rehearsal=4, rehearsal_irrelevant=1)
    rows = Rehearsal(memory_of(hparams, 6), hparams, rows_of).draw()
    edits = [row.ids[0] for row in rows if row.is_edit]
    assert len(set(edits)) == 4
    assert [row.ids[0] for row in rows if not row.is_edit] == [-1 - edits[0]]


def test_what_is_learned_anew_is_not_rehearsed(rehearsing):
    rehearsal = Rehearsal(memory_of(rehearsing, 3), rehearsing, rows_of, [request(1), request(2)])
    assert len(rehearsal) == 1
    assert rehearsal.draw()[0].ids == (0,)


# ---- learning


def test_rehearsing_an_edit_is_learning_both_at_once(tokenizer, hparams):
    """With answers of as many tokens, and nothing that tells new from past."""
    first, second = ({**fact, "target_new": "Rome"} for fact in FACTS[:2])
    hparams = replace(hparams, balance=False, num_steps=4, early_stop_loss=0.0)
    batched = BaFTEditor(make_model(), tokenizer, hparams)
    together = batched.edit([first, second])
    editor = BaFTEditor(make_model(), tokenizer, replace(hparams, rehearsal=1))
    editor.model_edit.memory.remember([EditRequest.from_dict(first)], replace(hparams, rehearsal=1))
    report = editor.edit(second)
    for one, both in zip(report.losses, together.losses, strict=True):
        assert (one.answer + one.rehearsal) / 2 == pytest.approx(both.answer, abs=1e-4)
    learned, expected = editor.model_edit.snapshot(), batched.model_edit.snapshot()
    for name in expected:
        if not name.startswith(("_usage", "_whitening")):  # past ones count before, or not yet
            assert torch.allclose(learned[name], expected[name], atol=1e-4), name


@pytest.mark.parametrize("method", ["BaFT", "ReFT"])
def test_rehearsed_edits_stay(tokenizer, hparams, method):
    if method == "ReFT":
        hparams = ReFTHyperParams("tiny-llama", [1, 3], device="cpu", rank=4, lr=3e-2)
    forgotten, kept = (
        BaFTEditor(make_model(), tokenizer, replace(hparams, num_steps=30, rehearsal=m))
        for m in (0, 2)
    )
    for fact in FACTS:
        forgotten.edit(fact)
        kept.edit(fact)
    for fact in FACTS[:2]:
        assert loss_of(kept, fact) < loss_of(forgotten, fact) / 3


def test_an_early_stop_waits_for_rehearsed_edits(tokenizer, hparams):
    steps = []
    h = replace(hparams, rehearsal=2, early_stop_loss=0.5, num_steps=100)
    for limit in (1e9, 0.1):
        h = replace(h, rehearsal_stop_loss=limit)
        editor = BaFTEditor(make_model(), tokenizer, h)
        for fact in FACTS[:2]:
            report = editor.edit(fact)
        steps.append(report.num_steps)
        assert report.final_loss < 0.5
    assert report.losses[-1].rehearsal <= 0.1
    assert steps[0] < steps[1]


def test_rehearsed_edits_are_not_used_again_for_balance(tokenizer, rehearsing):
    editor = BaFTEditor(make_model(), tokenizer, replace(rehearsing, num_steps=2))
    counts = []
    for fact in FACTS:
        editor.edit(fact)
        counts.append(editor.model_edit.usage(1).count.item())
    assert counts == [3 + 5, 2 * (3 + 5), 3 * (3 + 5)]  # the prompt's last, and " Rome"


def test_undo_takes_back_what_is_remembered(tokenizer, rehearsing):
    editor = BaFTEditor(make_model(), tokenizer, replace(rehearsing, num_steps=2))
    states = []
    for fact in FACTS:
        states.append(editor.model_edit.memory.state())
        editor.edit(fact)
    for state in reversed(states):
        editor.undo()
        assert editor.model_edit.memory.state() == state
