"""Several edits on one model: each as if it were alone, and nothing of them outside."""

import asyncio

import pytest
import torch

from baft_easyedit import BaFTEditor, attach, attach_named
from baft_easyedit.model.hooks import with_prompt_lengths
from baft_easyedit.model.named import NamedEdits
from tests.conftest import IDS, logits, make_model, random_edit


def test_each_edit_acts_as_if_it_were_alone(model):
    before, only = logits(model), make_model()
    random_edit(seed=4).attach(only)
    edits = NamedEdits(model, {"a": random_edit(seed=3), "b": random_edit(seed=4)})
    assert edits.names == ("a", "b")
    assert torch.equal(logits(model), before)
    with edits.active("b"):
        assert torch.equal(logits(model), logits(only))
        with edits.active():
            assert torch.equal(logits(model), before)
        assert torch.equal(logits(model), logits(only))
    assert torch.equal(logits(model), before)
    edits.detach()
    assert torch.equal(logits(model), before)
    assert "generate" not in vars(model)


def test_edits_of_different_layers_are_one_of_all_layers(model):
    low, high = random_edit(layers=(1,), seed=3), random_edit(layers=(2,), seed=4)
    edits = NamedEdits(model, {"low": low, "high": high})
    with edits.active("low", "high"):
        both = logits(model)
    both_off = logits(model)
    with low.switched(True), high.switched(True):
        assert torch.equal(logits(model), both)
    assert not torch.equal(both, both_off)


def test_at_a_shared_layer_the_first_edit_acts_first(model):
    first, second = random_edit(layers=(1,), seed=3), random_edit(layers=(1,), seed=4)
    edits = NamedEdits(model, {"first": first, "second": second})
    with edits.active("first"), first.recording() as alone, torch.no_grad():
        model(IDS)
    pair = edits.active("second", "first")  # the order of the call is none
    with pair, first.recording() as of_first, second.recording() as of_second, torch.no_grad():
        model(IDS)
    assert torch.equal(of_first.hidden[1], alone.hidden[1])
    assert not torch.equal(of_second.hidden[1], of_first.hidden[1])


def test_every_edit_is_told_where_prompts_end(model):
    edits = NamedEdits(model, {"a": random_edit(seed=3), "b": random_edit(seed=4)})
    for name, seed in (("a", 3), ("b", 4)):
        only = make_model()
        random_edit(seed=seed).attach(only)
        with edits.active(name), with_prompt_lengths(model, [3]), with_prompt_lengths(only, [3]):
            assert torch.equal(logits(model), logits(only))
        with edits.active(name), with_prompt_lengths(only, [3]):
            assert not torch.equal(logits(model), logits(only))


def test_a_task_has_its_own_edits_and_takes_them_into_its_threads(model):
    edits = NamedEdits(model, {"a": random_edit(seed=3), "b": random_edit(seed=4)})
    expected = {}
    for names in ((), ("a",), ("b",)):
        with edits.active(*names):
            expected[names] = logits(model)

    async def ask(names, pauses):
        with edits.active(*names):
            for _ in range(pauses):
                await asyncio.sleep(0)
                assert torch.equal(logits(model), expected[names])
            assert torch.equal(await asyncio.to_thread(logits, model), expected[names])

    async def ask_all():
        await asyncio.gather(*(ask(names, i) for i, names in enumerate((*expected, *expected))))

    asyncio.run(ask_all())
    assert torch.equal(logits(model), expected[()])


def test_generation_is_that_of_the_active_edit(model):
    only = make_model()
    random_edit(seed=4).attach(only)
    edits = NamedEdits(model, {"a": random_edit(seed=3), "b": random_edit(seed=4)})
    with edits.active("b"):
        assert torch.equal(
            model.generate(IDS, max_new_tokens=8, do_sample=False),
            only.generate(IDS, max_new_tokens=8, do_sample=False),
        )


def test_kept_edits_are_attached_by_name(tmp_path, model, tokenizer, hparams, request_dict):
    with BaFTEditor(model, tokenizer, hparams) as editor:
        editor.edit(request_dict)
        editor.save(tmp_path / "kept")
        learned = logits(model)
        editor.model_edit.detach()
    edits = attach_named(model, {"mine": tmp_path / "kept"})
    with edits.active("mine"):
        assert torch.equal(logits(model), learned)
    with pytest.raises(ValueError, match="the model carries named edits, only to be used"):
        BaFTEditor(model, tokenizer, hparams)
    with pytest.raises(ValueError, match="already carries an edit"):
        attach(model, tmp_path / "kept")


def test_misuse_is_an_error_that_leaves_the_model_as_it_is(model):
    for names in (["base"], ["a+b"], [""]):
        with pytest.raises(ValueError, match="must not be empty or 'base', or hold a '\\+'"):
            NamedEdits(model, {name: random_edit() for name in names})
    with pytest.raises(ValueError, match="at least one edit; got none"):
        NamedEdits(model, {})
    before = logits(model)
    with pytest.raises(ValueError, match="layer"):
        NamedEdits(model, {"far": random_edit(layers=(9,)), "a": random_edit()})
    assert torch.equal(logits(model), before)
    edits = NamedEdits(model, {"a": random_edit()})
    with pytest.raises(ValueError, match="there is no edit 'b'; there are"), edits.active("b"):
        pass
    with pytest.raises(ValueError, match="the model already carries an edit"):
        NamedEdits(model, {"b": random_edit()})
