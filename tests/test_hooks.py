import copy

import pytest
import torch
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

from baft_easyedit import attached_edit
from baft_easyedit.model.inspect import check_layers, decoder_layers, text_config
from tests.conftest import IDS, LAYERS, first_of, logits, make_model, random_edit


def layer_output(model, layer=1):
    seen = []
    hook = decoder_layers(model)[layer].register_forward_hook(
        lambda module, args, output: seen.append(first_of(output))
    )
    logits(model)
    hook.remove()
    return seen[0]


def pad(ids, num, side):
    """Pad a batch; return the keyword arguments of a forward pass."""
    padding = torch.full((len(ids), num), 257)
    ones, zeros = torch.ones_like(ids), torch.zeros_like(padding)
    left = side == "left"
    mask = torch.cat([zeros, ones] if left else [ones, zeros], 1)
    return {
        "input_ids": torch.cat([padding, ids] if left else [ids, padding], 1),
        "attention_mask": mask,
        "position_ids": (mask.cumsum(-1) - 1).clamp(min=0),
    }


def test_attached_edit_changes_the_logits_and_detached_it_does_not(family_model):
    before, edit = logits(family_model), random_edit()
    edit.attach(family_model)
    edited = logits(family_model)
    assert (edited - before).abs().max() > 1e-3
    with edit.disabled():
        assert torch.equal(logits(family_model), before)
    assert torch.equal(logits(family_model), edited)
    edit.detach()
    assert torch.equal(logits(family_model), before)


def test_a_layer_is_edited_at_the_positions_and_bit_equal_off_them(family_model):
    before = layer_output(family_model)
    edit = random_edit(layers=(1,))
    edit.attach(family_model)
    after = layer_output(family_model)
    assert torch.equal(after[:, :-3], before[:, :-3])
    expected = edit.intervention(1)(before[:, -3:])[0]
    assert torch.allclose(after[:, -3:], expected, atol=1e-5)
    assert ((after[:, -3:] - before[:, -3:]).abs().amax(-1) > 1e-3).all()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(family_model, side):
    edit = random_edit()
    edit.attach(family_model)
    with edit.prompt_lengths([5, 6]):
        plain = logits(family_model)
        padded = logits(family_model, **pad(IDS, 4, side))
    padded = padded[:, 4:] if side == "left" else padded[:, :-4]
    assert torch.allclose(padded, plain, atol=1e-4)


def test_nan_in_padding_does_not_reach_the_gradient(model):
    def spoil(module, args, output):
        hidden = first_of(output).clone()
        hidden[:, 0] = float("nan")
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    edit, mask = random_edit(layers=(1,)), torch.ones_like(IDS)
    mask[:, 0] = 0
    edit.attach(model)
    decoder_layers(model)[1].register_forward_hook(spoil, prepend=True)
    with edit.recording() as record:
        model(input_ids=IDS, attention_mask=mask)
    record.weights[1][record.positions].sum().backward()
    assert edit.intervention(1).gate.weight.grad.isfinite().all()


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_cached_generation_equals_uncached(family_model, options):
    edit = random_edit()
    edit.attach(family_model)
    kwargs = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, **options}
    inputs = pad(IDS, 2, "left")
    inputs.pop("position_ids")
    cached = family_model.generate(**inputs, **kwargs)
    with edit.prompt_lengths([9, 9]):
        uncached = family_model.generate(**inputs, use_cache=False, **kwargs)
    assert torch.equal(cached, uncached)
    with edit.disabled():
        assert not torch.equal(family_model.generate(**inputs, **kwargs), cached)


def test_teacher_forced_argmax_is_the_greedy_generation(family_model):
    edit = random_edit()
    edit.attach(family_model)
    generated = family_model.generate(
        input_ids=IDS, max_new_tokens=6, do_sample=False, eos_token_id=None
    )
    with edit.prompt_lengths([9, 9]):
        forced = logits(family_model, generated).argmax(-1)
    assert torch.equal(forced[:, 8:-1], generated[:, 9:])


@pytest.mark.parametrize("returns_tuple", [True, False])
def test_layers_may_return_a_tensor_or_a_tuple(model, returns_tuple):
    def convert(module, args, output):
        hidden = first_of(output)
        return (hidden, "kept") if returns_tuple else hidden

    def take(module, args, output):
        assert isinstance(output, tuple) is returns_tuple
        seen.append(first_of(output))
        raise StopIteration  # what follows may want the other convention

    seen, edit = [], random_edit(layers=(1,))
    edit.attach(model)
    expected = layer_output(model)
    layer = decoder_layers(model)[1]
    layer.register_forward_hook(convert, prepend=True)
    layer.register_forward_hook(take)
    with pytest.raises(StopIteration):
        logits(model)
    assert torch.equal(seen[0], expected)


def test_deepcopy_of_the_model_copies_the_edit(model):
    edit = random_edit()
    edit.attach(model)
    twin, before = copy.deepcopy(model), logits(model)
    assert torch.equal(logits(twin), before)
    copied = attached_edit(twin)
    assert copied is not edit
    with torch.no_grad():
        copied.intervention(1).source_bias.add_(1)
    assert torch.equal(logits(model), before)
    assert not torch.equal(logits(twin), before)
    copied.detach()
    assert attached_edit(twin) is None
    assert attached_edit(model) is edit


def test_attaching_twice_is_refused(model):
    edit = random_edit()
    edit.attach(model)
    with pytest.raises(ValueError, match="already attached to a model: call detach"):
        edit.attach(model)
    with pytest.raises(ValueError, match="the model already carries an edit"):
        random_edit().attach(model)


def test_layers_beyond_the_depth_are_refused_before_a_hook_is_set(model):
    with pytest.raises(ValueError, match=rf"layers must be below {LAYERS}.*got {LAYERS}"):
        random_edit(layers=(1, LAYERS)).attach(model)
    assert attached_edit(model) is None
    with pytest.raises(ValueError, match="layers must be below 4"):
        check_layers([9], 4)


def test_model_without_a_decoder_stack_is_refused():
    with pytest.raises(ValueError, match="Linear has no config"):
        text_config(nn.Linear(2, 2))
    shallow = make_model()
    shallow.config.num_hidden_layers = 7
    with pytest.raises(ValueError, match=r"no recognisable decoder stack.*= 7 layers"):
        decoder_layers(shallow)
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 9}
    with pytest.raises(ValueError, match="must be a decoder-only language model"):
        decoder_layers(T5ForConditionalGeneration(T5Config(**sizes)))


def test_output_that_does_not_fit_the_call_is_an_error(model):
    edit = random_edit(layers=(1,))
    edit.attach(model)
    decoder_layers(model)[1].register_forward_hook(
        lambda module, args, output: first_of(output)[:, :-1], prepend=True
    )
    with pytest.raises(RuntimeError, match=r"layer 1 returned hidden states of shape \(2, 8, 32\)"):
        logits(model)
