"""Hyper-parameters, statistics and repairs of EasyEdit's other methods."""

import importlib

import numpy as np
import pytest
import torch
import yaml
from conftest import edit_arguments

from baft_easyedit.easyedit.peer_fixes import fix_peer
from baft_easyedit.easyedit.peers import (
    PEERS,
    ModelShape,
    peer_config,
    peer_hparams,
    write_statistics,
)
from baft_easyedit.easyedit.protocols import run_single
from baft_easyedit.easyedit.statistics import (
    statistics_file,
    write_key_statistics,
    write_null_space,
)
from baft_easyedit.resources import hparams_file

BUNDLED = ModelShape(depth=6, width=192, tied=False)
DEEP = ModelShape(depth=12, width=768, tied=True)


@pytest.mark.parametrize("name", PEERS)
def test_the_files_are_made_for_the_bundled_model(name):
    config = yaml.safe_load(hparams_file(f"peers/{name}/facts-llama").read_text())
    assert peer_config(name, BUNDLED) == config


def test_layers_and_steps_follow_the_model():
    assert peer_config("FT-M", DEEP)["layers"] == [8]
    assert peer_config("FT-M", DEEP)["lr"] == pytest.approx(2.3e-3 / 2)
    assert peer_config("GRACE", DEEP)["inner_params"] == ["model.layers[8].mlp.down_proj.weight"]
    assert peer_config("UltraEdit", DEEP)["inner_params"][0] == "model.layers.4.mlp.gate_proj"
    assert peer_config("MEMIT", DEEP)["mom2_update_weight"] == pytest.approx(152.0 * 8)
    assert peer_config("MEMIT", DEEP)["v_loss_layer"] == 11
    assert peer_config("MEMIT", DEEP)["lm_head_module"] == "model.embed_tokens"


def test_layers_stay_below_the_last():
    shallow = ModelShape(depth=2, width=192, tied=False)
    assert peer_config("MEMIT", shallow)["layers"] == [0]
    assert peer_config("WISE", shallow)["inner_params"] == ["model.layers[0].mlp.down_proj.weight"]


def test_unknown_peers_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"method must be one of FT-L, .*; got 'FT-X'"):
        peer_config("FT-X", BUNDLED)
    with pytest.raises(ValueError, match="WISE is not in the release"):
        peer_hparams("WISE", "unused", "cpu", tmp_path, "pypi")
    with pytest.raises(ValueError, match="MEMIT needs statistics of the model on ordinary text"):
        peer_hparams("MEMIT", "unused", "cpu", tmp_path, "current")


def test_the_shape_is_read_from_the_model(model_path):
    assert ModelShape.of(model_path) == ModelShape(depth=4, width=48, tied=False)


@pytest.mark.easyedit
def test_hparams_are_easyedits_own(host, model_path, tmp_path):
    hparams, notes = peer_hparams(
        "FT-L", model_path, "cpu", tmp_path, host.generation, overrides={"num_steps": 3}
    )
    assert type(hparams).__name__ == "FTHyperParams"
    assert (hparams.num_steps, hparams.model_name) == (3, model_path)
    assert bool(notes) == (host.generation == "pypi")  # it has one objective only


@pytest.fixture
def tiny(model_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(model_path), AutoTokenizer.from_pretrained(
        model_path
    )


def test_statistics_are_second_moments_of_all_tokens(tiny, tmp_path):
    model, tok = tiny
    texts = ["a longer text", "short"]
    (moment,) = write_key_statistics(model, tok, [2], texts, tmp_path, ["tiny"]).values()
    keys = []
    module = model.get_submodule("model.layers.2.mlp.down_proj")
    handle = module.register_forward_pre_hook(lambda m, args: keys.append(args[0][0].detach()))
    for text in texts:
        model(**tok(text, return_tensors="pt"))
    handle.remove()
    keys = torch.cat(keys)
    torch.testing.assert_close(moment, keys.mT @ keys / len(keys), atol=1e-4, rtol=1e-4)
    saved = np.load(statistics_file(tmp_path, "tiny", 2, 2))
    assert (int(saved["mom2.count"]), int(saved["sample_size"])) == (len(keys), 2)
    assert not module._forward_pre_hooks


def test_statistics_need_texts(tiny, tmp_path):
    with pytest.raises(ValueError, match="texts must hold at least one text"):
        write_key_statistics(*tiny, [0], [], tmp_path, ["tiny"])


def test_the_null_space_holds_the_directions_least_used(tmp_path):
    moment = torch.diag(torch.tensor([5.0, 0.1, 3.0, 0.2]))
    write_null_space([moment], tmp_path / "p.pt", share=0.5)
    (projector,) = torch.load(tmp_path / "p.pt")
    torch.testing.assert_close(projector, torch.diag(torch.tensor([0.0, 1.0, 0.0, 1.0])))
    with pytest.raises(ValueError, match=r"share must be in \(0, 1\); got 1"):
        write_null_space([moment], tmp_path / "p.pt", share=1)


@pytest.mark.easyedit
def test_memit_reads_our_statistics(host, model_path, tmp_path, requests):
    from easyeditor import BaseEditor

    texts = [f"text number {i}" for i in range(30)]
    hparams, _ = peer_hparams(
        "MEMIT",
        model_path,
        "cpu",
        tmp_path,
        host.generation,
        num_texts=len(texts),
        overrides={"v_num_grad_steps": 2, "mom2_update_weight": 1.0},
    )
    editor = BaseEditor.from_hparams(hparams)
    write_statistics(editor, texts)
    editor_module = importlib.import_module("easyeditor.models.memit.memit_main")
    editor_module.CONTEXT_TEMPLATES_CACHE = [["{}"]]  # generating prefixes takes a while
    result = run_single(editor, requests[:1])
    assert (result.num_restored, result.num_restores) == (1, 1)
    assert result.trainable_parameters == len(hparams.layers) * 48 * 96


@pytest.mark.easyedit
def test_the_release_tells_of_fields_it_lacks_and_batches(host, make_editor, requests, undoing):
    if host.generation == "current":
        pytest.skip("about the release")
    # A tokenizer without an unknown token gets one, without which the release's FT fails.
    editor = make_editor()
    assert editor.tok.unk_token_id is not None
    assert editor.edit(**edit_arguments(requests[:1]), **undoing)


@pytest.mark.easyedit
def test_repairs_are_told(host):
    if host.generation == "pypi":
        pytest.skip("the release has neither WISE nor GRACE")
    hparams = type("H", (), {})()
    assert "sequential_edit" in fix_peer("WISE", hparams)[0]
    assert hparams.sequential_edit is True
    grace = importlib.import_module("easyeditor.models.grace.GRACE").GRACE
    assert any("generation" in note for note in fix_peer("GRACE", hparams))
    repaired = grace.edit
    fix_peer("GRACE", hparams)
    assert grace.edit is repaired
    assert fix_peer("ROME", hparams) == ()
