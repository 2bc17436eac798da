"""Kept edits in serving engines, which are simulated here: how they cut, flatten and call.

The simulation has a Llama whose layers return (hidden, residual), all tokens of all requests one
behind the other, first whole prompts and then a token a step.
"""

import copy
import json
import pickle
import re
import sys
from itertools import chain
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from baft_easyedit import BaFTEditor, BaFTHyperParams, ReFTHyperParams
from baft_easyedit.cli import main
from baft_easyedit.engines import easysteer, served, sglang, vllm_lens
from baft_easyedit.engines.served import delta, read_edit
from baft_easyedit.storage.loading import attach
from tests.conftest import HIDDEN, logits, make_model

STEPS = 6
PROMPTS = ["The capital of France is", "Water boils at", "", "A"]


class Block(nn.Module):
    """A decoder layer as in vLLM and SGLang: what it returns sums up to its output."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.cache = layer, {}

    def forward(self, positions, hidden, batch, residual):
        residual = hidden if residual is None else hidden + residual
        attended = self.attend(self.layer.input_layernorm(residual), positions, batch)
        residual = residual + attended
        return self.layer.mlp(self.layer.post_attention_layernorm(residual)), residual

    def attend(self, normed, positions, batch):
        own, size = self.layer.self_attn, self.layer.self_attn.head_dim
        parts = []
        for request, rows in batch.rows.items():
            heads = [
                p(normed[rows]).unflatten(-1, (-1, size)).transpose(0, 1)[None]
                for p in (own.q_proj, own.k_proj, own.v_proj)
            ]
            cos, sin = batch.rotary(normed, positions[rows][None])
            query, key = apply_rotary_pos_emb(heads[0], heads[1], cos, sin)
            known = self.cache.get(request, (key[:, :, :0], key[:, :, :0]))
            key, value = torch.cat([known[0], key], 2), torch.cat([known[1], heads[2]], 2)
            self.cache[request] = key, value
            whole = {"is_causal": query.shape[2] > 1, "enable_gqa": True}
            out = F.scaled_dot_product_attention(query, key, value, **whole)
            parts.append(own.o_proj(out[0].transpose(0, 1).flatten(1)))
        return torch.cat(parts)


def forward_mode(name):
    """SGLang's ForwardMode, as far as it is asked."""
    return SimpleNamespace(is_decode=lambda: name == "decode", is_idle=lambda: name == "idle")


class Engine(nn.Module):
    """Serves a Llama; hooks are put on `model.layers.N`, as SGLang names them."""

    def __init__(self, llama):
        super().__init__()
        self.llama = llama
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(map(Block, llama.model.layers))
        self.batch = None

    @torch.no_grad()
    def step(self, tokens, firsts, mode):
        """Return the logits behind the last token of each request, by their new tokens."""
        lengths, start, rows = [len(new) for new in tokens], 0, {}
        for request, length in enumerate(lengths):
            rows[request], start = slice(start, start + length), start + length
        self.batch = batch = SimpleNamespace(
            forward_mode=forward_mode(mode),
            extend_seq_lens_cpu=lengths if mode == "extend" else None,
            extend_prefix_lens_cpu=list(firsts) if mode == "extend" else None,
            rows=rows,
            rotary=self.llama.model.rotary_emb,
        )
        hidden, residual = self.llama.model.embed_tokens(torch.tensor([*chain(*tokens)])), None
        positions = torch.cat(
            [torch.arange(f, f + n) for f, n in zip(firsts, lengths, strict=True)]
        )
        for layer in self.model.layers:
            hidden, residual = layer(positions, hidden, batch, residual)
        last = (hidden + residual)[[part.stop - 1 for part in rows.values()]]
        return self.llama.lm_head(self.llama.model.norm(last))

    def answer(self, prompts):
        """Answer greedily; return the tokens and logits, [request, step]."""
        tokens, firsts, mode, found = prompts, [0] * len(prompts), "extend", []
        for _ in range(STEPS):
            found.append(self.step(tokens, firsts, mode))
            firsts = [first + len(new) for first, new in zip(firsts, tokens, strict=True)]
            tokens, mode = [[int(best)] for best in found[-1].argmax(-1)], "decode"
        return torch.stack(found, 1)


def put_vllm_lens(engine, hooks):
    """Call hooks as vllm-lens does: for each request, with the sum; the difference is added."""
    contexts = {}
    engine_hooks = pickle.loads(pickle.dumps(hooks))  # they go to the worker's process

    def on_layer(index):
        def dispatch(_module, _args, output):
            changed, whole = output[0].clone(), output[0] + output[1]
            for request, rows in engine.batch.rows.items():
                for hook in engine_hooks:
                    if index in hook.layer_indices:
                        context = contexts.setdefault(request, SimpleNamespace(saved={}))
                        context.layer_idx = index
                        changed[rows] += hook.fn(context, whole[rows]) - whole[rows]
            return changed, output[1]

        return dispatch

    for index, layer in enumerate(engine.model.layers):
        layer.register_forward_hook(on_layer(index))


def put_sglang(engine, specification):
    """Register hooks as SGLang does."""
    for spec in json.loads(json.dumps(specification)):
        module, name = spec["hook_factory"].split(":")
        hook = getattr(sys.modules[module], name)(spec["config"])
        for target in spec["target_modules"]:
            engine.get_submodule(target).register_forward_hook(hook)


def put_easysteer(engine, spec):
    """Do what `loreft` does at the positions that `apply` selects."""

    def steered(vector):
        def hook(_module, args, output):
            rows = list(engine.batch.rows.values())
            here = [i for part in rows for i in range(part.start, part.stop)]
            if not engine.batch.forward_mode.is_decode():
                first, last = vector.apply.prompt_window
                assert last is None
                here = [i for part in rows for i in list(range(part.start, part.stop))[first:]]
            data, whole = vector.data, (output[0] + output[1])[here]
            rotated = whole @ data.rotate_layer
            learned = whole @ data.learned_source_weight.T + data.learned_source_bias
            changed = output[0].clone()
            changed[here] += (learned - rotated) @ data.rotate_layer.T
            return changed, output[1]

        return hook

    for vector in spec.vectors:
        assert (vector.algorithm, vector.apply.generation) == ("loreft", "all")
        engine.model.layers[vector.data.layer].register_forward_hook(steered(vector))


@pytest.fixture(autouse=True)
def _engines(monkeypatch):
    """The names that the adapters import of engines which are not here."""
    lens, steer = ModuleType("vllm_lens"), ModuleType("vllm.steer_vectors")
    lens.Hook = SimpleNamespace
    for name in ("ApplySpec", "ReftIntervention", "SteeringSpec", "VectorSpec"):
        setattr(steer, name, SimpleNamespace)
    modules = {"vllm_lens": lens, "vllm": ModuleType("vllm"), "vllm.steer_vectors": steer}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture(scope="module")
def kept(tmp_path_factory, tokenizer):
    """Directories of edits by BaFT, by BaFT and ReFT with a guard, and by ReFT."""
    request = {"prompt": PROMPTS[0], "target_new": "Rome", "loc_prompt": "Water boils at 100"}
    own = {"model_name": "tiny", "layers": [1, 3], "device": "cpu", "rank": 4, "lr": 3.0e-2}
    guard = {"min_similarity": 0.9}
    found = {
        "BaFT": BaFTHyperParams(**own, gate_lr=3.0e-2),
        "ReFT": ReFTHyperParams(**own),
        "guarded": BaFTHyperParams(**own, **guard),
        "guarded ReFT": ReFTHyperParams(**own, **guard),
    }
    for method, hparams in found.items():
        directory = tmp_path_factory.mktemp("kept") / method
        with BaFTEditor.open(make_model(), tokenizer, directory, hparams) as editor:
            editor.edit(request)
        found[method] = str(directory)
    return found


def wanted(directory, prompts):
    """The logits of `attach`, one prompt after the other."""
    model, found = make_model(), []
    attach(model, directory)
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=STEPS,
            min_new_tokens=STEPS,
            eos_token_id=None,
            pad_token_id=257,
            output_logits=True,
            return_dict_in_generate=True,
        )
        found.append(torch.cat(out.logits))
    return torch.stack(found)


@pytest.fixture(scope="module")
def prompts(tokenizer):
    return [tokenizer(text)["input_ids"] for text in PROMPTS]


ROUTES = {
    "vllm-lens": ("BaFT", lambda e, d: put_vllm_lens(e, vllm_lens.hooks(d))),
    "sglang": ("BaFT", lambda e, d: put_sglang(e, sglang.specification(d, read_edit(d)))),
    "vllm-lens, guarded": ("guarded", lambda e, d: put_vllm_lens(e, vllm_lens.hooks(d))),
    "sglang, guarded": (
        "guarded",
        lambda e, d: put_sglang(e, sglang.specification(d, read_edit(d))),
    ),
    "easysteer": ("ReFT", lambda e, d: put_easysteer(e, easysteer.specification(d))),
}


@pytest.mark.parametrize("name", ROUTES)
def test_an_engine_answers_as_the_model_that_carries_the_edit(name, kept, prompts):
    plain, engine = Engine(make_model()), Engine(make_model())
    method, put = ROUTES[name]
    put(engine, kept[method])
    expected = wanted(kept[method], prompts)
    answers = engine.answer(prompts)
    assert torch.equal(answers.argmax(-1), expected.argmax(-1))
    torch.testing.assert_close(answers, expected, rtol=1e-3, atol=1e-3)
    assert (plain.answer(prompts)[0] - answers[0]).abs().max() > 0.1


def test_the_simulated_engine_answers_as_the_model(prompts):
    model = make_model()
    expected = logits(model, torch.tensor([prompts[0]]))[0, -1]
    torch.testing.assert_close(Engine(model).answer(prompts)[0, 0], expected, rtol=1e-4, atol=1e-4)


def test_bf16_states_are_edited_in_fp32_under_any_default_dtype_and_device(kept):
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            edit = read_edit(kept["BaFT"])
    finally:
        torch.set_default_dtype(torch.float32)
    assert {(p.dtype, p.device.type) for p in edit.parameters()} == {(torch.float32, "cpu")}
    hidden = torch.randn(5, HIDDEN).bfloat16()
    moves = delta(edit, 1, hidden)
    assert moves.dtype == torch.float32
    assert torch.equal(moves, delta(edit, 1, hidden.float()))


def test_chunked_prefill_is_refused(kept, prompts):
    engine = Engine(make_model())
    put_sglang(engine, sglang.specification(kept["BaFT"], read_edit(kept["BaFT"])))
    engine.step([prompts[0][:9]], [0], "extend")
    with pytest.raises(RuntimeError, match="an edit must see a prompt whole, and this batch has"):
        engine.step([prompts[0][9:]], [9], "extend")
    engine = Engine(make_model())
    put_vllm_lens(engine, vllm_lens.hooks(kept["BaFT"]))
    engine.step([prompts[0][:9]], [0], "extend")
    with pytest.raises(RuntimeError, match="tokens of a request after its first pass"):
        engine.step([prompts[0][9:]], [9], "extend")


def test_an_llm_gets_the_hook_unless_it_cuts_prompts(kept):
    llm, scheduler = Mock(), SimpleNamespace(enable_chunked_prefill=False)
    llm.llm_engine.vllm_config.scheduler_config = scheduler
    vllm_lens.register(llm, kept["BaFT"])
    ((hook,),) = llm.register_hooks.call_args.args
    assert hook.layer_indices == [1, 3]
    scheduler.enable_chunked_prefill = True
    with pytest.raises(ValueError, match="enable_chunked_prefill must be False"):
        vllm_lens.register(llm, kept["BaFT"])


def test_sglang_needs_its_batch_and_leaves_an_idle_one(kept):
    hook = sglang.factory({"directory": kept["BaFT"], "layer": 1})
    output = (torch.zeros(0, HIDDEN), torch.zeros(0, HIDDEN))
    assert hook(None, (SimpleNamespace(forward_mode=forward_mode("idle")),), output) is output
    with pytest.raises(RuntimeError, match="without its ForwardBatch"):
        hook(None, (), output)


def test_rows_of_padding_are_left(kept):
    hook = sglang.factory({"directory": kept["BaFT"], "layer": 1})
    output = (torch.randn(7, HIDDEN), torch.randn(7, HIDDEN))
    batch = SimpleNamespace(
        forward_mode=forward_mode("extend"),
        extend_seq_lens_cpu=[4, 1],
        extend_prefix_lens_cpu=[0, 0],
    )
    changed = (hook(None, (batch,), output)[0] != output[0]).any(-1)
    assert changed.tolist() == [False, True, True, True, True, False, False]


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("BaFT", "gate must be 'one' (ReFT) for EasySteer"),
        ("guarded ReFT", "min_similarity must be null for EasySteer"),
    ],
)
def test_easysteer_takes_no_gate_and_no_guard(method, message, kept, refused):
    with pytest.raises(ValueError, match=re.escape(message)):
        easysteer.specification(kept[method])
    refused(["export", kept[method], "--to", "easysteer"], message)


@pytest.mark.parametrize(
    ("name", "value"),
    [("_interventions.1.source_bias", None), ("_past.1.0.values", torch.zeros(3))],
)
def test_tensors_that_do_not_fit_are_refused(name, value, kept, monkeypatch):
    found = copy.deepcopy(served.read_to_use(Path(kept["guarded"])))
    found.state.learned[name] = value
    if value is None:
        del found.state.learned[name]
    monkeypatch.setattr(served, "read_to_use", lambda path: found)
    with pytest.raises(ValueError, match=r"the edit in .* cannot be used: .*same layers, rank and"):
        read_edit(kept["guarded"])


@pytest.mark.parametrize("name", ["vllm-lens", "sglang", "easysteer"])
def test_export_writes_what_an_engine_needs(name, kept, tmp_path, capsys, refused):
    method, _ = ROUTES[name]
    assert main(["export", kept[method], "--to", name]) == 0
    printed = capsys.readouterr()
    assert kept[method] in printed.out
    assert "in float32, prompts without a chat template" in printed.err
    assert "may not be on the Hub: give the engine the path of the model" in printed.err
    if name == "sglang":
        assert [spec["config"]["layer"] for spec in json.loads(printed.out)] == [1, 3]
    else:
        compile(printed.out, name, "exec")
    assert main(["export", kept[method], "--to", name, "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out").read_text() == printed.out
    command = ["export", kept[method], "--to", name, "--out", tmp_path / "out"]
    refused(command, "--out must be a new file")
