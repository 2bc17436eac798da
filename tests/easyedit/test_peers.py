"""Names, hyper-parameters and statistics of EasyEdit's other methods."""

import re
from types import SimpleNamespace

import pytest
import torch
import yaml
from transformers import LlamaConfig

from baft_easyedit.easyedit.peers import PEERS, batchable, own_preset_config, presets, why_not
from baft_easyedit.easyedit.peers.presets import peer_config, peer_hparams
from baft_easyedit.easyedit.peers.statistics import key_moments, null_space
from baft_easyedit.easyedit.session import make_peer
from baft_easyedit.files.resources import hparams_file
from tests.conftest import logits, make_model, make_tokenizer

BUNDLED = LlamaConfig(num_hidden_layers=6, hidden_size=192)
DEEP = LlamaConfig(num_hidden_layers=12, hidden_size=768, tie_word_embeddings=True)
SHALLOW = LlamaConfig(num_hidden_layers=2, hidden_size=192)
TIED = "model.embed_tokens"
"""Where EasyEdit finds an output layer that shares the input embedding's weights."""


# Which methods there are.


def test_what_can_be_compared():
    assert {name for name in PEERS if why_not(name, "current")} == set()
    in_release = {name for name in PEERS if not why_not(name, "pypi")}
    assert in_release == {"FT-L", "AdaLoRA", "ROME", "MEMIT"}
    assert why_not("BaFT", "pypi") is why_not("ReFT", "current") is None
    assert "needs a hypernetwork trained for the model" in why_not("MEND", "current")
    assert why_not("WISE", "pypi") == "WISE is not in the release 0.0.1.dev0 of EasyEdit"
    assert "is AdaLoRA" in why_not("LoRA", "pypi")


def test_what_edits_several_requests_together():
    alone = {"ROME", "WISE", "GRACE", "MELO"}
    assert {name for name in PEERS if not batchable(name, "current")} == alone
    assert {name for name in PEERS if batchable(name, "pypi")} == {"FT-L", "MEMIT"}
    assert batchable("BaFT", "pypi")
    for ask in (why_not, batchable):
        with pytest.raises(ValueError, match=r"method must be one of .*FT-L, .*; got 'FT-X'"):
            ask("FT-X", "current")


# Our own hyper-parameters.


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
    assert peer_config("MEMIT", SHALLOW)["layers"] == [0]
    assert peer_config("WISE", SHALLOW)["inner_params"] == ["model.layers[0].mlp.down_proj.weight"]


def test_melos_blocks_come_right_after_the_layer_that_routes():
    for shape, routing, blocks in ((DEEP, 7, [8, 9]), (SHALLOW, 0, [1])):
        model = peer_config("MELO", shape)["model"]
        assert model["grace_layer"] == f"model.layers.{routing}.mlp.down_proj"
        assert model["target_modules"] == [f"model.layers.{i}.mlp.down_proj" for i in blocks]


def test_what_cannot_be_run_is_refused():
    with pytest.raises(ValueError, match="WISE is not in the release"):
        peer_hparams("WISE", "unused", "cpu", "pypi")
    with pytest.raises(ValueError, match="SERAC needs a classifier"):
        peer_hparams("SERAC", "unused", "cpu", "current")


@pytest.mark.easyedit
@pytest.mark.parametrize("name", ["MEMIT", "ROME"])
def test_statistics_need_texts(host, model_path, name):
    with pytest.raises(ValueError, match=f"{name} needs statistics of the model on ordinary"):
        make_peer(name, model_path, "cpu", [], {"mom2_adjustment": True})


@pytest.mark.easyedit
def test_hparams_are_easyedits_own(host, model_path):
    changes = {"num_steps": 3, "fp16": True}
    hparams, notes = peer_hparams("FT-L", model_path, "cpu", host.generation, changes)
    assert type(hparams).__name__ == "FTHyperParams"
    assert (hparams.num_steps, hparams.model_name, hparams.fp16) == (3, model_path, True)
    assert bool(notes) == (host.generation == "pypi")  # it has one objective only


# EasyEdit's hyper-parameters.


def test_a_preset_of_ours_goes_first():
    config, notes = presets._config("FT-M", "unused", "smollm2")
    assert (config["layers"], notes) == ([26], ())
    assert own_preset_config("FT-M", "llama-7b") is None


@pytest.mark.parametrize("name", [name for name in PEERS if own_preset_config(name, "smollm2")])
def test_presets_of_ours_are_whole_and_within_the_model(name):
    config, bundled = own_preset_config(name, "smollm2"), peer_config(name, BUNDLED)
    assert config.keys() == bundled.keys()
    assert config["alg_name"] == bundled["alg_name"]
    modules = " ".join(config.get("inner_params", []))
    layers = [int(number) for number in re.findall(r"layers[.\[](\d+)", modules)]
    assert all(0 <= layer < 29 for layer in [*layers, *config.get("layers", [])])
    assert config.get("lm_head_module") in (None, "lm_head" if name[:2] == "FT" else TIED)
    for key, value in config.items():
        is_number = type(bundled[key]) in (int, float)
        assert not is_number or type(value) in (int, float, type(None)), key


@pytest.mark.easyedit
def test_shipped_hparams_are_found_by_model_name_or_scaled(current, model_path):
    config, notes = presets._config("FT-M", "unused", "GPT-J-6b")
    assert config["layers"] == [21]
    assert notes == ("FT-M: EasyEdit's hparams/FT/gpt-j-6B.yaml",)
    config, (note,) = presets._config("FT-M", model_path, "nothing")
    assert config == peer_config("FT-M", LlamaConfig.from_pretrained(model_path))
    assert note.startswith("FT-M: EasyEdit ships no nothing (it has ")
    assert note.endswith("); the bundled model's values, scaled")


def test_an_easyedit_without_hparams_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(presets, "load_host", lambda: SimpleNamespace(path=tmp_path / "easyeditor"))
    with pytest.raises(ValueError, match="this EasyEdit ships no hyper-parameters: there is no"):
        presets._shipped_presets("ROME")


@pytest.mark.easyedit
@pytest.mark.parametrize("preset", ["llama-7b", "llama3-8b", "qwen2.5-7b"])
def test_presets_load_with_paths_and_objectives_filled_in(current, model_path, preset):
    for name in PEERS:
        hparams, notes = peer_hparams(name, model_path, "cpu", "current", preset=preset)
        assert (hparams.model_name, hparams.device) == (model_path, "cpu")
        assert notes[0].startswith(f"{name}: EasyEdit")
        if name == "FT-M":
            assert hparams.objective_optimization == "target_new"


# Statistics.


def test_statistics_are_the_second_moments_of_keys():
    model, tok, texts = make_model(), make_tokenizer(), ["a longer text", "short"]
    keys, name = [], "model.layers.1.mlp.down_proj"
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, args: keys.append(*args))
    for text in texts:
        logits(model, **tok(text, return_tensors="pt"))
    hook.remove()
    keys = torch.cat(keys, 1)[0]
    found = key_moments(model, tok, texts, [name])
    torch.testing.assert_close(found, {name: keys.T @ keys / len(keys)})


def test_the_null_space_holds_the_directions_least_used():
    moment = torch.diag(torch.tensor([5.0, 0.1, 3.0, 0.2]))
    for threshold, unused in ((None, [0.0, 1.0, 1.0, 1.0]), (0.15, [0.0, 1.0, 0.0, 0.0])):
        torch.testing.assert_close(null_space(moment, threshold), torch.diag(torch.tensor(unused)))
    with pytest.raises(ValueError, match=r"nullspace_threshold must leave a direction; 0\.01 is"):
        null_space(moment, threshold=0.01)
