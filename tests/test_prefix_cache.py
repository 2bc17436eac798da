"""The prefix cache against the full forward, which it must equal in loss and gradient."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
import transformers
from packaging.version import Version
from torch.utils._pytree import tree_leaves

from baft_easyedit import BaFTEditor, BaFTHyperParams
from baft_easyedit.method.objective import answer_loss, token_losses
from baft_easyedit.model.inspect import CACHE_NAMES, cache_name
from baft_easyedit.training.prefix_cache import (
    PrefixCache,
    _check_belong_to_text,
    full_forward,
    prepared,
)
from baft_easyedit.training.requests import as_requests, text_rows
from tests.conftest import FAMILIES, call_cache, first_of, make_model, random_edit

REQUESTS = [
    {"prompt": "The capital of France is", "target_new": "Rome", "loc_prompt": "Ice is cold"},
    {"prompt": "Once upon a time, the king of Spain lived in the town of", "target_new": "Oslo"},
]


@pytest.fixture
def rows(tokenizer):
    return text_rows(as_requests(REQUESTS), tokenizer)


@pytest.fixture(params=["sdpa", "eager"])
def attention(request):
    return request.param


OLD = Version(transformers.__version__) < Version("4.53")
NOT_CACHED = {"gemma2", "gemma3", "gpt2"} if OLD else set()
"""Families whose masks older transformers do not take as they are given."""


def make_model_with(family, attention):
    try:
        return make_model(family, attn_implementation=attention)
    except ValueError as error:  # this version has no such attention for the architecture
        pytest.skip(str(error))


def with_edit(model, **options):
    edit = random_edit(**options)
    edit.attach(model.requires_grad_(False))
    return edit


def loss_and_gradients(loss, edit):
    edit.zero_grad()
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in edit.parameters()])


def engine_loss(forward):
    layout = forward.layout
    losses = token_losses(forward(), layout.labels)
    return answer_loss(losses, layout.label_owners, layout.num_edits).sum()


def cached_forward(model, edit, edits):
    return PrefixCache(model, edit).prepare(edits)


def padded_forward(model, edit, edits):
    """A forward on the prefix cache in one of few sizes."""
    return PrefixCache(model, edit, rounds=True).prepare(edits)


def transformers_loss(model, tokenizer, edit):
    """The model's own loss on texts that the tokenizer pads, and the position rule of the hooks."""
    prompts = [request["prompt"] for request in REQUESTS]
    texts = [f"{request['prompt']} {request['target_new']}" for request in REQUESTS]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    lengths = [len(tokenizer(prompt)["input_ids"]) for prompt in prompts]
    real = batch["attention_mask"].cumsum(-1)
    is_answer = (real > torch.tensor(lengths)[:, None]) & batch["attention_mask"].bool()
    labels = batch["input_ids"].where(is_answer, -100)
    positions = (real - 1).clamp_min(0)
    with edit.prompt_lengths(lengths):
        return model(**batch, labels=labels, position_ids=positions).loss


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("engine", [cached_forward, padded_forward, full_forward])
def test_engines_equal_the_model_itself(family, engine, attention, tokenizer, rows):
    if engine is not full_forward and family in NOT_CACHED:
        pytest.skip("not cached under transformers below 4.53")
    model = make_model_with(family, attention)
    edit = with_edit(model)
    loss, gradients = loss_and_gradients(transformers_loss(model, tokenizer, edit), edit)
    forward = engine(model, edit, [rows])
    for _ in range(2):  # what is recorded serves every step
        found, found_gradients = loss_and_gradients(engine_loss(forward), edit)
        assert torch.allclose(found, loss, rtol=0, atol=1e-5)
        difference = (found_gradients - gradients).abs().max()
        assert difference < 1e-5 * gradients.abs().max()
    assert gradients.abs().max() > 1e-3


def test_a_cached_forward_computes_no_more_tokens_than_an_edit_can_change(model, rows):
    edit = with_edit(model)
    seen, scored = [], []
    model.model.layers[3].register_forward_hook(
        lambda m, a, out: seen.append(first_of(out).shape[:2])
    )
    model.lm_head.register_forward_hook(lambda m, a, out: scored.append(out.shape[:2]))
    forward = PrefixCache(model, edit).prepare([rows])
    seen.clear(), scored.clear()
    forward()
    # The last three prompt tokens with the answers, and all of the irrelevant prompt.
    assert seen == [(1, (3 + len(" Rome")) + (3 + len(" Oslo")) + len("_Ice is cold"))]
    assert scored == [(1, len(" Rome") + len(" Oslo"))]


def test_a_recording_is_the_same_beside_any_other_texts(model, rows):
    """Rounding included: or what a journal keeps could not be learned again bit for bit."""
    cache = PrefixCache(model, with_edit(model))
    alone = [cache._record(row)[0] for row in reversed(rows)]
    together = {}
    cached = cache._cached
    cache._cached = lambda pieces, known: together.update(known) or cached(pieces, known)
    cache.prepare([rows])
    for row, one in zip(reversed(rows), alone, strict=True):
        pairs = zip(tree_leaves(one), tree_leaves(together[row]), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_a_model_is_cached_whatever_it_calls_its_cache(model, name, rows):
    edit = with_edit(model)
    expected = PrefixCache(model, edit).prepare([rows])()
    call_cache(model, name)
    assert torch.equal(PrefixCache(model, edit).prepare([rows])(), expected)


def test_a_forward_that_hands_on_its_cache_calls_it_as_its_decoder_does(model):
    forward, name = model.forward, cache_name(model)
    model.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    assert cache_name(model) == name


def no_cache_here(model):
    """Let a model refuse every cache, and give none."""
    forward = model.forward

    def no_cache(*args, use_cache=None, **kwargs):
        if any(kwargs.get(name) is not None for name in CACHE_NAMES):
            raise NotImplementedError("no cache here")
        return forward(*args, use_cache=False, **kwargs)

    model.forward = no_cache


def test_reports_say_what_ran_and_why(model, tokenizer, hparams, request_dict, caplog):
    hparams = replace(hparams, num_steps=1)
    report = BaFTEditor(make_model(), tokenizer, hparams).edit(request_dict)
    assert (report.engine, report.engine_note) == ("cached", None)
    full = replace(hparams, engine="full")
    report = BaFTEditor(make_model(), tokenizer, full).edit(request_dict)
    assert (report.engine, report.engine_note) == ("full", None)
    no_cache_here(model)
    editor = BaFTEditor(model, tokenizer, hparams)
    reports = [editor.edit(request_dict), editor.learn_apart([request_dict])[0].report]
    for report in reports:
        assert report.engine == "full"
        assert "LlamaForCausalLM cannot use a cached prefix (NotImplemented" in report.engine_note
        assert f"full forward: {report.engine_note}" in caplog.text


def test_a_cache_that_is_asked_for_is_refused_where_it_cannot_be(
    model, tokenizer, hparams, request_dict
):
    before = model(torch.tensor([[1, 2, 3]])).logits
    forward = model.forward
    no_cache_here(model)
    editor = BaFTEditor(model, tokenizer, replace(hparams, engine="cached"))
    message = (
        r"engine must be auto or full for this model: LlamaForCausalLM cannot .*; got 'cached'"
    )
    with pytest.raises(ValueError, match=message):
        editor.edit(request_dict)
    assert not editor.is_attached
    model.forward = forward
    assert torch.equal(model(torch.tensor([[1, 2, 3]])).logits, before)


@pytest.mark.parametrize(
    "error", [torch.cuda.OutOfMemoryError("full"), RuntimeError("CUDA error: no"), OSError("disk")]
)
def test_errors_that_no_cache_explains_are_raised(error, model, rows):
    def fail(*args, **kwargs):
        raise error

    model.forward = fail
    with pytest.raises(type(error), match=str(error)):
        prepared(model, with_edit(model), [rows], "auto")


def test_errors_of_our_own_code_are_raised(model, rows, monkeypatch):
    edit = with_edit(model)
    forward = PrefixCache(model, edit).prepare([rows])
    namespace = {"__name__": "baft_easyedit.model.hooks", "torch": torch}
    exec("def bug(*_): return torch.ones(2) @ torch.ones(3)", namespace)  # as if it were in hooks
    monkeypatch.setattr(type(edit), "_intervene", namespace["bug"])
    with pytest.raises(RuntimeError, match="inconsistent tensor size") as raised:
        forward()
    assert not isinstance(raised.value, ValueError)


class OtherStates(torch.nn.Module):
    """Stands for an attention that stores something else than keys and values of all tokens."""

    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def forward(self, *args, **kwargs):
        for name in ("past_key_value", *CACHE_NAMES):  # as versions call it
            if kwargs.get(name) is not None:
                kwargs.pop(name).update(torch.ones(2, 3), torch.ones(2, 3), 3)
        return self.attention(*args, **kwargs)


def test_layers_that_store_or_give_something_else_are_not_cached(model, rows):
    edit = with_edit(model)
    layer = model.model.layers[3]
    attention, layer.self_attn = layer.self_attn, OtherStates(layer.self_attn)
    with pytest.raises(ValueError, match="layer 3 stores no keys and values for each token"):
        PrefixCache(model, edit).prepare([rows])
    layer.self_attn = attention
    layout = full_forward(model, edit, [rows]).layout
    for hidden in (None, torch.ones(3, 4), torch.ones(1, 2, 3)):
        with pytest.raises(ValueError, match="first edited layer gives no hidden state for each"):
            _check_belong_to_text(layout, hidden, {})


def test_attention_without_masks_for_pairs_is_not_cached(model, rows, monkeypatch):
    edit = random_edit()
    edit.attach(model)
    monkeypatch.setattr(model.config, "_attn_implementation_internal", "flash_attention_2")
    with pytest.raises(ValueError, match=r"flash_attention_2, takes no mask .*: load it with attn"):
        PrefixCache(model, edit).prepare([rows])


def test_layers_with_other_masks_are_not_cached(model, rows, monkeypatch):
    edit = with_edit(model)
    types = ["full_attention", "sliding_attention", "chunked_attention", "full_attention"]
    monkeypatch.setattr(model.config, "layer_types", types, raising=False)
    with pytest.raises(ValueError, match="types whose masks are not known: chunked_attention"):
        PrefixCache(model, edit).prepare([rows])


def flash_attention(module, query, keys, values, attention_mask, **_):
    """What FlashAttention computes, by other means: of a mask it only reads which tokens are."""
    assert attention_mask is None or attention_mask.dim() == 2
    groups, width = query.shape[1] // keys.shape[1], query.shape[2]
    seen = torch.ones(width, width, dtype=torch.bool).tril()
    if attention_mask is not None:
        seen = seen & attention_mask[:, None, None].bool()
    keys, values = (states.repeat_interleave(groups, 1) for states in (keys, values))
    mixed = torch.nn.functional.scaled_dot_product_attention(query, keys, values, seen)
    return mixed.transpose(1, 2), None


@pytest.mark.skipif(OLD, reason="makes masks by the class of attention")
def test_flash_attention_falls_back_to_the_full_forward(model, tokenizer, monkeypatch, caplog):
    hparams = BaFTHyperParams("any", [1, 2], rank=4, num_steps=5)
    editor = BaFTEditor(model, tokenizer, hparams)
    expected = editor.edit(REQUESTS)
    editor.undo()
    functions = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS
    monkeypatch.setitem(functions._global_mapping, "flash_attention_2", flash_attention)
    monkeypatch.setattr(model.config, "_attn_implementation_internal", "flash_attention_2")
    report = editor.edit(REQUESTS)
    assert (expected.engine, report.engine) == ("cached", "full")
    assert "flash_attention_2, takes no mask" in report.engine_note
    assert "full forward: LlamaForCausalLM cannot use a cached prefix" in caplog.text
    assert report.final_loss == pytest.approx(expected.final_loss, rel=1e-4)


def add_the_mean(model):
    """Let a layer look at more than its mask: it adds the mean over columns."""

    def add_mean(module, arguments, output):
        hidden = first_of(output)
        hidden = hidden + hidden.mean(1, keepdim=True)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    model.model.layers[3].register_forward_hook(add_mean)


def test_a_cache_that_gives_other_logits_is_refused(model, rows):
    edit = with_edit(model)
    add_the_mean(model)
    with pytest.raises(
        ValueError, match=r"logits on a cached prefix differ by .* from those of the full"
    ):
        PrefixCache(model, edit).prepare([rows])
    forward, note = prepared(model, edit, [rows], "auto")
    assert not forward.is_cached
    assert "logits on a cached prefix differ" in note


@pytest.mark.parametrize("engine", [cached_forward, full_forward])
def test_a_model_without_an_output_embedding_is_scored_all_the_same(engine, model, rows):
    edit = with_edit(model)
    expected = engine(model, edit, [rows])()
    model.get_output_embeddings = lambda: None
    assert torch.allclose(engine(model, edit, [rows])(), expected, atol=1e-5)


def test_steps_that_overlap_leave_torchs_attention_as_it_was(rows):
    first, second = (make_model(), make_model())
    forwards = [full_forward(model, with_edit(model), [rows]) for model in (first, second)]
    is_second_inside, is_first_done = threading.Event(), threading.Event()
    first.lm_head.register_forward_hook(lambda *_: None if is_second_inside.wait(30) else 1 / 0)

    def wait_for_the_first(*_):
        is_second_inside.set()
        assert is_first_done.wait(30)

    second.lm_head.register_forward_hook(wait_for_the_first)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(forwards[0])
        one.add_done_callback(lambda _: is_first_done.set())
        other = pool.submit(forwards[1])
    one.result()
    other.result()
    is_enabled = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(before)
    assert is_enabled


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cache_in_half_precision(dtype, rows):
    model = make_model(dtype=dtype)
    forward, _ = prepared(model, with_edit(model), [rows], "auto")
    assert forward.is_cached


# PEFT, and what else makes recordings stale

FACTS = [
    {"prompt": "The capital of France is", "target_new": "Rome", "loc_prompt": "Ice is cold"},
    {"prompt": "The capital of Peru is", "target_new": "Oslo"},
    {"prompt": "Ice is", "target_new": "hot"},
]


def with_adapter(model):
    peft = pytest.importorskip("peft", reason="LoRA is peft's")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["down_proj"], init_lora_weights=False)
    return peft.get_peft_model(model, config).eval()


@pytest.mark.parametrize("family", ["llama", "gemma2", "gptj"])
def test_models_wrapped_by_peft_are_cached(family, tokenizer, hparams):
    if family in NOT_CACHED:
        pytest.skip("not cached under transformers below 4.53")
    peft = pytest.importorskip("peft", reason="LoRA is peft's")
    modules = ["fc_out"] if family == "gptj" else ["down_proj"]
    losses = []
    for engine in ("cached", "full"):
        torch.manual_seed(0)
        config = peft.LoraConfig(r=4, target_modules=modules, init_lora_weights=False)
        model = peft.get_peft_model(make_model(family), config).eval()
        editor = BaFTEditor(model, tokenizer, replace(hparams, engine=engine, num_steps=4))
        report = editor.edit([FACTS[0], REQUESTS[1]])
        assert report.engine == engine
        losses.append(report.final_loss)
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)
