"""Layer replay against the full forward, which it must equal in loss and gradient."""

import logging
from dataclasses import replace

import pytest
import torch

from baft_easyedit import BaFTEditor
from baft_easyedit.objective import answer_loss
from baft_easyedit.replay import FullForward, LayerReplay, make_engine
from baft_easyedit.requests import as_requests, build_batch
from tests.conftest import FAMILIES, make_model, random_edit

REQUESTS = [
    {"prompt": "The capital of France is", "target_new": "Rome", "loc_prompt": "Ice is cold"},
    {"prompt": "Once upon a time, the king of Spain lived in the town of", "target_new": "Oslo"},
]


@pytest.fixture
def batch(tokenizer):
    return build_batch(as_requests(REQUESTS), tokenizer)


@pytest.fixture(params=["sdpa", "eager"])
def attention(request):
    return request.param


def loss_and_gradients(engine, batch, edit):
    edit.zero_grad()
    logits = engine()[: batch.num_edits]
    loss = answer_loss(logits, batch.labels[: batch.num_edits, -logits.shape[1] :])
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in edit.parameters()])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("irrelevant", [True, False])
def test_replay_equals_the_full_forward(family, attention, irrelevant, tokenizer):
    model = make_model(family)
    model.set_attn_implementation(attention)
    model.requires_grad_(False)
    edit = random_edit()
    edit.attach(model)
    batch = build_batch(as_requests(REQUESTS), tokenizer, with_irrelevant=irrelevant)
    with edit.prompt_lengths(batch.prompt_lengths):
        loss, gradients = loss_and_gradients(FullForward(model, batch), batch, edit)
        engine = LayerReplay(model, edit, batch)
        for _ in range(2):  # the recorded prefix serves every step
            replayed, replayed_gradients = loss_and_gradients(engine, batch, edit)
            assert torch.allclose(replayed, loss, rtol=0, atol=1e-5)
            difference = (replayed_gradients - gradients).abs().max()
            assert difference < 1e-5 * gradients.abs().max()
    assert gradients.abs().max() > 1e-3


def test_replay_runs_the_suffix_only(model, batch):
    edit = random_edit()
    edit.attach(model)
    seen = []
    model.model.layers[3].register_forward_hook(lambda m, a, out: seen.append(out.shape[1]))
    with edit.prompt_lengths(batch.prompt_lengths):
        engine = LayerReplay(model, edit, batch)
        seen.clear()
        engine()
    # The widest of: an irrelevant prompt, and the last three prompt tokens with the answer.
    irrelevant = int(batch.attention_mask[2].sum())
    assert seen == [max(irrelevant, 3 + batch.max_answer_length)]


@pytest.mark.parametrize("family", FAMILIES)
def test_no_family_needs_the_full_forward(family, batch, caplog):
    model, edit = make_model(family), random_edit()
    edit.attach(model)
    with caplog.at_level(logging.INFO), edit.prompt_lengths(batch.prompt_lengths):
        assert isinstance(make_engine(model, edit, batch, "replay"), LayerReplay)
        assert isinstance(make_engine(model, edit, batch, "full"), FullForward)
    assert "full forward" not in caplog.text


def test_edits_are_the_same_with_either_engine(tokenizer, hparams, request_dict):
    learned = []
    for engine in ("replay", "full"):
        model = make_model()
        editor = BaFTEditor(model, tokenizer, replace(hparams, engine=engine, num_steps=10))
        report = editor.edit(request_dict)
        learned.append((report, editor.model_edit.snapshot()))
    (one, first), (other, second) = learned
    assert one.final_loss == pytest.approx(other.final_loss, abs=1e-4)
    assert all(torch.allclose(first[name], second[name], atol=1e-3) for name in first)


def test_a_model_that_cannot_be_replayed_gets_the_full_forward(model, batch, caplog):
    edit = random_edit()
    edit.attach(model)
    forward = model.forward

    def no_cache(*args, past_key_values=None, **kwargs):
        if past_key_values is not None:
            raise NotImplementedError("no cache here")
        return forward(*args, **kwargs)

    model.forward = no_cache
    with caplog.at_level(logging.INFO), edit.prompt_lengths(batch.prompt_lengths):
        assert isinstance(make_engine(model, edit, batch, "replay"), FullForward)
    assert "full forward: LlamaForCausalLM cannot be replayed" in caplog.text
    assert "no cache here" in caplog.text


def test_short_memory_is_no_reason_for_the_full_forward(model, batch, monkeypatch):
    def full(*args):
        raise torch.cuda.OutOfMemoryError("full")

    monkeypatch.setattr("baft_easyedit.replay.LayerReplay.__init__", full)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        make_engine(model, random_edit(), batch, "replay")


def test_replay_that_gives_other_logits_is_refused(model, batch, monkeypatch):
    edit = random_edit()
    edit.attach(model)
    # A layer that looks at more than its mask: it adds the mean over columns.
    layer = model.model.layers[3]
    layer.register_forward_hook(lambda m, a, out: out + out.mean(1, keepdim=True))
    with edit.prompt_lengths(batch.prompt_lengths):
        with pytest.raises(ValueError, match=r"replayed logits differ by .* from the full"):
            LayerReplay(model, edit, batch)
        assert isinstance(make_engine(model, edit, batch, "replay"), FullForward)


def test_layers_get_their_forward_back_after_an_error(model, batch):
    edit = random_edit()
    edit.attach(model)
    with edit.prompt_lengths(batch.prompt_lengths):
        engine = LayerReplay(model, edit, batch)
        handle = model.lm_head.register_forward_hook(lambda *a: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine()
        handle.remove()
    assert not any("forward" in vars(layer) for layer in model.model.layers)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_replay_in_half_precision(dtype, batch):
    model, edit = make_model(dtype=dtype), random_edit()
    edit.attach(model)
    with edit.prompt_lengths(batch.prompt_lengths):
        assert isinstance(make_engine(model, edit, batch, "replay"), LayerReplay)


def test_engines_are_named(model, batch):
    with pytest.raises(ValueError, match="engine must be one of replay, full; got 'graph'"):
        make_engine(model, random_edit(), batch, "graph")
