"""Stand-in prompts close the gates on neighbours of a fact whose request brings no other text."""

from dataclasses import replace
from functools import partial
from unittest import mock

import pytest
import torch
from torch.nn import functional as F

from baft_easyedit import BaFTEditor
from baft_easyedit.facts import edit_requests
from baft_easyedit.generation import load_model
from baft_easyedit.hparams import BaFTHyperParams
from baft_easyedit.model.prompt_format import PromptFormat
from baft_easyedit.training import stand_ins as stand_ins_module
from baft_easyedit.training.requests import EditRequest, as_requests, text_rows
from baft_easyedit.training.stand_ins import _INVENTED, _KNOWN, siblings, stand_ins
from tests.conftest import logits, make_model

APART = {"min_similarity": 0.9}
REQUEST = EditRequest("The capital of France is", "Rome", subject="France")


def test_other_names_stand_in_the_place_of_the_subject():
    prompts = stand_ins(REQUEST, 4)
    assert len(set(prompts)) == 4
    for prompt in prompts:
        assert prompt.startswith("The capital of ")
        assert prompt.endswith(" is")
        assert "France" not in prompt
    assert stand_ins(REQUEST, 4) == prompts
    assert stand_ins(replace(REQUEST, prompt="France has the capital"), 4) != prompts
    assert len(stand_ins(REQUEST, 10**6)) == len(set(stand_ins(REQUEST, 10**6)))


def test_a_subject_in_another_unicode_form_is_replaced():
    request = EditRequest("Der Fluss Müritz", "x", subject="Mu\u0308ritz")
    assert not any("ritz" in prompt for prompt in stand_ins(request, 3))


def test_the_rest_of_a_prompt_keeps_its_unicode_form():
    """Its tokens are those of the edited prompt, and must cancel out."""
    request = EditRequest("Le pe\u0300re de Zoe\u0308 est", "x", subject="Zoe\u0308")
    assert all(prompt.startswith("Le pe\u0300re de ") for prompt in siblings(request))


def test_a_subject_is_replaced_as_a_word_where_it_is_one():
    for prompt in siblings(EditRequest("Use us in the US as us", "x", subject="us")):
        assert prompt.startswith("Use ")
        assert "US as " in prompt
        assert not prompt.endswith(" us")
    assert all(
        "法国" not in prompt for prompt in siblings(EditRequest("法国的首都是", "x", "法国"))
    )


def test_no_stand_in_is_the_prompt_itself():
    for make, names in ((partial(stand_ins, count=99), _INVENTED), (siblings, _KNOWN)):
        for name in names:
            request = EditRequest(f"The capital of {name} is", "x", name)
            assert len(make(request)) == len(names) - 1
            assert request.prompt not in make(request)


def test_an_edit_whose_stand_ins_have_no_room_has_no_centre(tokenizer):
    (row,) = text_rows([REQUEST], tokenizer, siblings=[["Ice is", "Tea is"]])
    assert row.siblings == (
        tuple(tokenizer("Ice is").input_ids),
        tuple(tokenizer("Tea is").input_ids),
    )
    (row,) = text_rows([REQUEST], tokenizer, siblings=[["Ice is", "x " * 60]], max_context=60)
    assert row.siblings == ()


def test_states_of_stand_ins_that_are_not_finite_are_refused(tokenizer, hparams):
    model = make_model()
    editor = BaFTEditor(model, tokenizer, replace(hparams, **APART))
    editor.edit({"prompt": "Ice is", "target_new": "hot"})
    before, out = editor.model_edit.snapshot(), logits(model)
    name = _KNOWN[0]
    spared = {*tokenizer("The capital of France is Rome Ice hot").input_ids, 0, 1, 2}
    token = next(t for t in tokenizer(name).input_ids if t not in spared)

    def overflow(_module, given, output):
        return torch.where((given[0] == token)[..., None], torch.inf, output)

    embeddings = model.get_input_embeddings()
    expected = pytest.raises(FloatingPointError, match="with other subjects must be finite, and")
    with embeddings.register_forward_hook(overflow), expected:
        editor.edit(REQUEST.to_dict())
    assert all(torch.equal(v, before[n]) for n, v in editor.model_edit.snapshot().items())
    assert torch.equal(logits(model), out)


def test_there_are_none_without_a_subject():
    assert stand_ins(replace(REQUEST, subject=None), 4) == []


def test_stand_ins_are_irrelevant_prompts_in_the_format_of_prompts(tokenizer):
    form = PromptFormat(separator="--")
    _, row = text_rows([REQUEST], tokenizer, prompt_format=form, stand_ins=["Ice is"])
    assert (row.is_edit, row.prompt_length) == (False, 0)
    assert row.ids == form.prompt_ids("Ice is", tokenizer)
    rows = text_rows([REQUEST], tokenizer, stand_ins=["Ice is", "x " * 60], max_context=60)
    assert len(rows) == 2  # what is too long is left out
    assert len(text_rows([REQUEST], tokenizer, stand_ins=["Ice"], with_irrelevant=False)) == 1


@pytest.mark.parametrize("count", [0, 2])
def test_an_edit_sees_as_many_as_the_hyper_parameters_say(count, model, tokenizer, hparams):
    editor = BaFTEditor(model, tokenizer, replace(hparams, num_steps=1, loc_stand_ins=count))
    report = editor.edit(REQUEST.to_dict())
    assert (report.losses[0].locality is None) is (count == 0)
    given = [REQUEST.to_dict() | {"loc_prompt": "Ice"}]
    (irrelevant,) = editor._learner._rows(as_requests(given), editor.hparams)[1:]  # no stand-in
    assert irrelevant.ids == tuple(tokenizer("Ice").input_ids)


@pytest.mark.parametrize("beginning", ["", "Of all that I know of the world, I know that "])
def test_the_first_centre_is_the_mean_of_the_most_similar_states_at_last_tokens(
    model, tokenizer, hparams, beginning
):
    """Also where all prompts begin alike, and their beginning is read once."""
    request = replace(REQUEST, prompt=beginning + REQUEST.prompt)
    editor = BaFTEditor(model, tokenizer, replace(hparams, **APART, loc_stand_ins=0))
    last = model.config.num_hidden_layers - 1
    layers = [i for i in editor.model_edit.layers if i != last]  # where Hugging Face norms states
    assert layers
    found = {layer: [] for layer in layers}
    for prompt in (request.prompt, *siblings(request)):
        with torch.no_grad():
            out = model(**tokenizer(prompt, return_tensors="pt"), output_hidden_states=True)
        for layer in layers:
            found[layer].append(out.hidden_states[layer + 1][0, -1])
    editor.edit(request.to_dict())
    editor.edit({"prompt": "Ice is", "target_new": "hot"})
    editor.edit(request.to_dict() | {"target_new": "Oslo"})  # where the first edit acts
    for layer in layers:
        without, (_, _, centres, _) = editor.model_edit.past(layer).edits
        assert without.centre.shape == (0, centres.shape[1])
        z = editor.model_edit.whitening(layer).whitened(torch.stack(found[layer]))
        nearest = F.cosine_similarity(z[1:], z[:1]).topk(6).indices
        mean = torch.stack(found[layer][1:])[nearest].mean(0)
        torch.testing.assert_close(centres[0], mean, rtol=1e-4, atol=1e-5)
        assert torch.equal(centres[1], editor.model_edit.whitening(layer).mean)


def test_a_model_that_cannot_read_on_behind_its_cache_reads_all(model, tokenizer, hparams):
    """Such as LFM2, whose convolutions do not take several tokens there."""
    editor = BaFTEditor(model, tokenizer, replace(hparams, **APART))
    long = replace(REQUEST, prompt="Of all that I know of the world, " + REQUEST.prompt)
    texts = [tuple(tokenizer(text).input_ids) for text in (long.prompt, *siblings(long))]
    expected = [stand_in_states(model, editor, [text]) for text in texts]
    lost, read = [], stand_ins_module.repeated_cache

    def losing(cache, count):
        cache = read(cache, count)
        for layer in cache.layers:
            layer.values.zero_()
        lost.append(count)
        return cache

    with mock.patch.object(stand_ins_module, "repeated_cache", losing):
        found = stand_in_states(model, editor, texts)
    assert lost == [len(texts)]
    for layer, states in found.items():
        whole = torch.cat([one[layer] for one in expected])
        torch.testing.assert_close(states, whole, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def stand_in_states(model, editor, texts):
    editor.model_edit.attach(model)
    states = stand_ins_module._last_states(model, editor.model_edit, texts)
    editor.model_edit.detach()
    return states


def test_without_use_subject_an_edit_has_no_centre(model, tokenizer, hparams):
    editor = BaFTEditor(model, tokenizer, replace(hparams, **APART, use_subject=False))
    editor.edit(REQUEST.to_dict())
    for layer in editor.model_edit.layers:
        assert editor.model_edit.past(layer).edits[0].centre.shape == (0, 32)


def test_centres_are_of_each_request_however_they_are_learned(model, tokenizer, hparams):
    settings = replace(hparams, **APART, num_steps=1)
    requests = [REQUEST.to_dict(), {**REQUEST.to_dict(), "prompt": "France is in"}]
    apart, joined = (BaFTEditor(make_model(), tokenizer, settings) for _ in range(2))
    for request in requests:
        apart.edit(request)
    joined.edit(requests)
    for layer in joined.model_edit.layers:
        one, other = (editor.model_edit.past(layer).edits for editor in (apart, joined))
        for edit, same in zip(one, other, strict=True):
            torch.testing.assert_close(edit.centre, same.centre, rtol=1e-4, atol=1e-5)


def test_stand_ins_keep_neighbours_as_they_are():
    """On the bundled model; how far an edit moves the logits of a neighbour's prompt."""
    moved = {}
    for count in (0, 4):
        hparams = BaFTHyperParams.from_hparams("BaFT/facts-llama", loc_stand_ins=count)
        model, tokenizer = load_model(hparams.model_name)
        editor, moved[count] = BaFTEditor(model, tokenizer, hparams), 0.0
        for record in edit_requests("eval", 2):
            ids = tokenizer(record["locality"]["neighborhood"]["prompt"], return_tensors="pt")
            editor.edit({k: record[k] for k in ("prompt", "target_new", "subject")})
            with torch.no_grad():
                after = model(**ids).logits[0, -1]
                editor.undo()
                moved[count] += float((after - model(**ids).logits[0, -1]).abs().mean())
    assert moved[4] < 0.5 * moved[0]
