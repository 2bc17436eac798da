from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from baft_easyedit import BaFTEditor, ModelEdit
from baft_easyedit.method.whitening import Whitening
from baft_easyedit.model.inspect import CACHE_NAMES
from baft_easyedit.model.prompt_format import PromptFormat
from baft_easyedit.training.coordinates import Coordinates
from baft_easyedit.training.own_texts import (
    ANSWER_LENGTH,
    LENGTH,
    MESSAGE_LENGTH,
    NUM_PROMPTS,
    NUM_TEXTS,
    own_length,
    own_prompts,
    own_texts,
    own_whitenings,
)
from tests.conftest import GPT_SIZES, HIDDEN, call_cache, make_model, make_tokenizer, with_prefix

D = HIDDEN


def skewed_states(count=4000, size=D, seed=0):
    """States like those of a real model: a common mean, few dimensions with most of the power."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(count, size, generator=generator) @ torch.randn(
        size, size, generator=generator
    )
    mixed[:, :3] *= 30
    return mixed + 50 * torch.randn(size, generator=generator)


def measured(states):
    whitening = Whitening(states.shape[1])
    whitening.measure(states)
    return whitening


def known_edit():
    """An edit that has learned something."""
    edit, generator = ModelEdit(D, (1, 2), 4, "rms-sigmoid", 3), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in edit.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    edit.retract()
    return edit


def test_whitened_states_are_alike_in_all_directions():
    states = skewed_states()
    whitening = measured(states)
    z = whitening.whitened(states)
    power = torch.linalg.eigvalsh(z.mT @ z / len(z))
    before = torch.linalg.eigvalsh(states.mT @ states / len(states))
    assert before[-1] / before[-6] > 100
    assert power[-1] / power[-6] < 1.2
    assert power[-1] <= 1 / 0.9 + 1e-2
    assert torch.allclose(z.mean(0), torch.zeros(D), atol=1e-3)


def test_states_that_are_not_finite_are_refused_and_nothing_stays(model, tokenizer, hparams):
    editor = BaFTEditor(model, tokenizer, replace(hparams, min_similarity=0.5))
    before = editor.model_edit.snapshot()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.fill_(float("inf"))
    with pytest.raises(
        FloatingPointError, match=r"own texts must be finite .* or set min_similarity to null"
    ):
        editor.edit({"prompt": "A is", "target_new": "b"})
    assert not editor.is_attached
    assert all(torch.equal(v, before[n]) for n, v in editor.model_edit.snapshot().items())


def loss_of(edit, hidden, target):
    """Some loss that depends on all parameters of both layers."""
    outputs = [edit.intervention(layer)(hidden)[0] for layer in edit.layers]
    return sum(((output - target) ** 2).mean() for output in outputs)


def test_gradients_and_edit_are_those_of_the_function_of_what_is_moved():
    """Against autograd through Eq. 3, of A, b and R."""
    edit, hidden, target = known_edit(), skewed_states(6), torch.randn(6, D)
    coordinates = Coordinates(edit)
    loss_of(edit, hidden, target).backward()
    coordinates.pull_back()
    moved = {name: value.detach().clone() for name, value in coordinates.moved.items()}
    leaves = {name: value.requires_grad_() for name, value in moved.items()}
    loss = 0.0
    for layer in edit.layers:
        prefix = f"_interventions.{layer}."
        own = {n.removeprefix(prefix): v for n, v in leaves.items() if n.startswith(prefix)}
        step = F.linear(hidden, own["difference"], own["source_bias"]) - hidden @ own["basis"].mT
        weights = edit.intervention(layer).gate(hidden)
        loss = loss + ((hidden + (weights.detach() * step) @ own["basis"] - target) ** 2).mean()
    names = [name for name in leaves if ".gate." not in name]
    found = torch.autograd.grad(loss, [leaves[name] for name in names])
    for name, gradient in zip(names, found, strict=True):
        value = coordinates.moved[name]
        if name.endswith(".basis"):
            along = gradient @ value.mT
            gradient = gradient - 0.5 * (along + along.mT) @ value
        assert torch.allclose(
            value.grad, gradient, rtol=1e-2, atol=1e-3 * float(gradient.detach().abs().max())
        ), name


def test_texts_have_room_in_a_short_context(monkeypatch):
    """GPT-2's positions end with its context."""
    monkeypatch.setitem(GPT_SIZES, "n_positions", LENGTH // 2)
    assert own_texts(make_model("gpt2")).ids.shape == (NUM_TEXTS, LENGTH // 2)


def test_a_model_writes_the_same_texts_each_time(model):
    state = torch.random.get_rng_state()
    texts = own_texts(model).ids
    assert texts.shape == (NUM_TEXTS, LENGTH)
    assert torch.equal(own_texts(make_model()).ids, texts)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert len({tuple(text.tolist()) for text in texts}) == NUM_TEXTS


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_a_model_writes_with_its_cache_whatever_it_calls_it(model, name):
    texts = own_texts(model, layers=[1])
    widths = call_cache(model, name)
    again = own_texts(model, layers=[1])
    assert torch.equal(again.ids, texts.ids)
    assert torch.equal(again.states[1], texts.states[1])
    assert widths == [1] * LENGTH


def test_a_model_without_a_cache_writes_the_same(model):
    texts = own_texts(model, layers=[1])
    widths = call_cache(model, "of_no_known_name")
    again = own_texts(model, layers=[1])
    assert widths == [*range(1, LENGTH + 1)]
    assert torch.equal(again.ids, texts.ids)
    assert torch.allclose(again.states[1], texts.states[1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("bos", "eos", "first"), [(5, 6, 5), (0, 6, 0), (None, [7, 8], 7), (None, None, 0)]
)
def test_own_texts_begin_with_the_models_first_token(model, bos, eos, first):
    model.config.bos_token_id, model.config.eos_token_id = bos, eos
    assert own_texts(model).ids[:, 0].tolist() == [first] * NUM_TEXTS


def test_states_are_those_of_the_layers(model):
    texts = own_texts(model, [1, 3])
    hidden = model(texts.ids, output_hidden_states=True).hidden_states[2][:, 1:]
    assert torch.allclose(texts.states[1], hidden, rtol=1e-3, atol=1e-4)


def test_own_texts_are_of_a_model_with_peft_and_its_virtual_tokens(model):
    plain, tuned = own_texts(model, [2]), with_prefix(model)
    texts = own_texts(tuned, [2])
    hidden = tuned(input_ids=texts.ids, output_hidden_states=True).hidden_states[3][:, 1:]
    assert torch.allclose(texts.states[2], hidden, rtol=1e-3, atol=1e-4)
    assert not torch.equal(texts.ids, plain.ids)
    known = own_whitenings(tuned, [2])[2]
    assert own_whitenings(tuned, [2])[2] is known


def test_statistics_are_known_until_the_weights_change(model):
    known = own_whitenings(model, [1, 3])
    assert own_whitenings(model, [1, 3])[3] is known[3]
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(1.5)
    again = own_whitenings(model, [1, 3])
    assert not torch.equal(again[3].mean, known[3].mean)


FRAMES = (((5, 6, 7), (8, 9)), ((3,), (8, 9)))


@pytest.mark.parametrize(("frame", "begins"), [(FRAMES[0], [5, 6, 7]), (((), ()), [1])])
def test_a_model_writes_messages_and_answers_in_a_template(model, frame, begins):
    model.config.bos_token_id = 1
    texts = own_prompts(model, frame).ids
    asked = len(begins) + MESSAGE_LENGTH
    assert texts.shape == (NUM_PROMPTS, asked + len(frame[1]) + ANSWER_LENGTH)
    assert texts[:, : len(begins)].tolist() == [begins] * NUM_PROMPTS
    assert texts[:, asked : asked + len(frame[1])].tolist() == [list(frame[1])] * NUM_PROMPTS
    assert torch.equal(own_prompts(make_model(), frame).ids, texts) or not frame[0]
    assert len({tuple(text.tolist()) for text in texts}) == NUM_PROMPTS


def test_in_a_template_the_statistics_are_of_where_edits_act(model):
    """At each prompt's last token and in its answer."""
    known = own_whitenings(model, [1, 3], FRAMES)
    found = []
    for frame in FRAMES:
        hidden = model(own_prompts(model, frame).ids, output_hidden_states=True).hidden_states[2]
        found.append(hidden[:, -ANSWER_LENGTH - 1 :].flatten(0, 1))
    assert torch.allclose(known[1].mean, torch.cat(found).mean(0), atol=1e-5)
    plain = own_whitenings(model, [1])[1]
    assert not torch.allclose(plain.mean, known[1].mean, atol=1e-3)


def test_a_model_writes_where_its_context_has_room(monkeypatch, hparams, request_dict):
    """GPT-2's positions end with its context: frames that are too long for it are left out."""
    monkeypatch.setitem(GPT_SIZES, "n_positions", 70)
    model, tokenizer = make_model("gpt2"), make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m['content'] }}>{% endfor %}"
    hparams = replace(hparams, use_chat_template=True, min_similarity=0.5)
    editor = BaFTEditor(model, tokenizer, hparams)
    editor.edit(request_dict)
    room = [own_length(one) <= 70 for one in PromptFormat.of(hparams).frames(tokenizer)]
    assert room == [True, True, True, False]


def write_data(model):
    model.model.layers[0].mlp.down_proj.weight.data.mul_(1.5)


def add_hook(model):
    model.model.layers[0].mlp.register_forward_hook(lambda m, a, out: out * 1.5)


@pytest.mark.parametrize(
    ("change", "frames"), [(write_data, ()), (add_hook, ()), (add_hook, FRAMES[:1])]
)
def test_statistics_are_those_of_the_model_as_it_is(change, frames, model):
    """Also after a change that no version of the weights tells of."""
    before = own_whitenings(model, [1], frames)[1].mean
    change(model)
    after = own_whitenings(model, [1], frames)[1].mean
    texts, other = own_texts(model).ids, make_model()
    change(other)
    assert not torch.allclose(after, before, atol=1e-3)
    assert torch.equal(after, own_whitenings(other, [1], frames)[1].mean)
    assert torch.equal(own_texts(other).ids, texts)


def test_statistics_are_measured_once_and_without_the_edit(
    model, tokenizer, hparams, request_dict, monkeypatch
):
    editor = BaFTEditor(model, tokenizer, replace(hparams, min_similarity=0.5))
    editor.edit(request_dict)
    first = editor.model_edit.whitening(1).mean.clone()
    monkeypatch.setattr("baft_easyedit.training.own_texts.own_texts", None)
    editor.edit({"prompt": "Water is", "target_new": "ice"})
    assert torch.equal(editor.model_edit.whitening(1).mean, first)
    editor.undo()
    editor.undo()
    assert not editor.model_edit.whitening(1).is_known  # as it was
    monkeypatch.setattr(Whitening, "measure", None)
    editor.learn_apart([request_dict])
    editor.edit(request_dict)  # what the model writes is still known, and its statistics
    assert torch.equal(editor.model_edit.whitening(1).mean, first)
