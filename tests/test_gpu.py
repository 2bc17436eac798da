"""What only a CUDA device can show; skipped without one."""

import pytest
import torch

from baft_easyedit import BaFTEditor
from baft_easyedit.demo import compare, demo_config, show_edits, tables
from baft_easyedit.model.inspect import decoder_layers
from tests.conftest import make_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def logits(model, tokenizer):
    with torch.no_grad():
        return model(**tokenizer("Ice is", return_tensors="pt").to(model.device)).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_edit_on_cuda_is_learned_and_undone_bit_for_bit(tokenizer, hparams, request_dict, dtype):
    model = make_model(dtype=dtype).cuda()
    before = logits(model, tokenizer)
    editor = BaFTEditor(model, tokenizer, hparams)
    report = editor.edit(request_dict)
    assert report.final_loss < 0.1
    assert {p.device.type for p in editor.model_edit.parameters()} == {"cuda"}
    assert not torch.equal(logits(model, tokenizer), before)
    editor.undo()
    assert torch.equal(logits(model, tokenizer), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_edits_side_by_side_on_cuda_equal_those_one_by_one(tokenizer, hparams, dtype):
    requests = [{"prompt": f"Number {i} is", "target_new": t} for i, t in enumerate(("a", "bc"))]
    model = make_model(dtype=dtype).cuda()
    editor = BaFTEditor(model, tokenizer, hparams)
    for learned, request in zip(editor.learn_apart(requests), requests, strict=True):
        assert {value.device.type for value in learned.state.values()} == {"cuda"}
        alone = editor.edit(request)
        editor.undo()
        assert learned.report.final_loss == pytest.approx(alone.final_loss, abs=0.05)


def test_layers_on_two_devices_are_edited_where_they_are(tokenizer, hparams, request_dict):
    accelerate = pytest.importorskip("accelerate")
    model = make_model()
    devices = {"model.embed_tokens": 0, "model.norm": "cpu", "lm_head": "cpu"}
    devices |= {"model.rotary_emb": 0}
    devices |= {f"model.layers.{i}": 0 if i < 2 else "cpu" for i in range(4)}
    model = accelerate.dispatch_model(model, devices, main_device=0, force_hooks=True)
    editor = BaFTEditor(model, tokenizer, hparams)
    assert editor.edit(request_dict).final_loss < 0.1
    assert len(decoder_layers(model)) == 4


def test_model_moved_to_cuda_after_the_edit_keeps_it(tokenizer, hparams, request_dict):
    model = make_model()
    BaFTEditor(model, tokenizer, hparams).edit(request_dict)
    on_cpu = logits(model, tokenizer)
    assert torch.allclose(logits(model.cuda(), tokenizer).cpu(), on_cpu, atol=1e-2)


@pytest.mark.easyedit
def test_demo_on_device_0():
    assert any("->" in line for line in show_edits(0))
    config = demo_config(["BaFT", "ReFT"], 3, 1, 0)
    assert "not run" not in "\n".join(tables(config, compare(config)))
