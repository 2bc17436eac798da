"""Paths from which EasyEdit loads the right classes."""

import json
from pathlib import Path

import pytest

from baft_easyedit.easyedit import model_path as module
from baft_easyedit.easyedit.model_path import host_model_path


def save_config(directory, model_type):
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps({"model_type": model_type}))
    return directory


def test_a_clear_path_stays(tmp_path):
    directory = save_config(tmp_path / "my-llama", "llama")
    assert host_model_path(str(directory)) == str(directory)
    assert host_model_path("meta-llama/Llama-2-7b-hf") == "meta-llama/Llama-2-7b-hf"


@pytest.mark.parametrize(
    ("name", "model_type", "family"),
    [
        ("gpt-runs/llama", "llama", "llama"),
        ("t5-like", "llama", "llama"),
        ("nameless", "llama", "llama"),
        ("nameless", "gemma", "llama"),  # the Auto classes of that branch
        ("nameless", "gpt2", "gpt"),
        ("llama-copy", "mistral", "mistral"),
        ("a-llama", "qwen2", "qwen2"),
    ],
)
def test_a_misleading_path_gets_a_link(tmp_path, name, model_type, family):
    directory = save_config(tmp_path / name, model_type)
    link = Path(host_model_path(str(directory)))
    assert link != directory
    assert link.resolve() == directory.resolve()
    assert module._family_in(str(link)) == family


def test_a_hub_name_of_a_family_unknown_to_easyedit_is_downloaded(tmp_path, monkeypatch):
    directory = save_config(tmp_path / "nameless", "gemma")
    asked = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda name: asked.append(name) or str(directory)
    )
    link = Path(host_model_path("google/gemma-1.1-7b-it"))
    assert asked == ["google/gemma-1.1-7b-it"]
    assert link.resolve() == directory.resolve()
    assert module._family_in(str(link)) == "llama"


def test_a_misleading_temporary_directory_is_refused(tmp_path, monkeypatch):
    directory = save_config(tmp_path / "nameless", "llama")
    misleading = tmp_path / "gpt"
    misleading.mkdir()
    monkeypatch.setattr(module.tempfile, "tempdir", str(misleading))
    with pytest.raises(ValueError, match="set TMPDIR to another one"):
        host_model_path(str(directory))


@pytest.mark.parametrize("text", ["[]", "3"])
def test_a_configuration_that_is_no_object_is_refused(tmp_path, text):
    (save_config(tmp_path / "nameless", "llama") / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"nameless/config\.json must be a JSON object; got"):
        host_model_path(str(tmp_path / "nameless"))


def test_a_configuration_may_hold_infinities(tmp_path):
    directory = save_config(tmp_path / "a-llama", float("inf"))
    assert host_model_path(str(directory)) == str(directory)
