"""The script for whoever has a GPU: its own parts, on the CPU, and its table."""

import importlib
import json
import subprocess
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def parts(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    module = importlib.import_module("gpu_parts")
    monkeypatch.setattr(module, "STEPS", 2)
    monkeypatch.setattr(module, "PROMPT_LENGTH", 8)
    return module


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_the_script_without_a_directory_says_how_it_is_called(arguments):
    ended = subprocess.run(
        ["bash", SCRIPTS / "gpu_check.sh", *arguments], capture_output=True, text=True
    )
    assert ended.returncode == 2
    assert "\n  gpu_check.sh OUT_DIR [SHAPE [DEVICE]]\n" in ended.stderr


def test_parts_are_measured_and_joined(parts, tmp_path, capsys):
    parts.apart("llama-2x64", "cpu", str(tmp_path / "apart-2.json"), "2")
    parts.in_a_row("llama-2x64", "cpu", str(tmp_path / "in-a-row-1.json"), "1")
    (tmp_path / "parts.txt").write_text("apart-2 0 3\nin-a-row-1 124 4\neasyedit 1 9\n")
    parts.table(str(tmp_path))
    found = json.loads((tmp_path / "gpu_check.json").read_text())["parts"]
    assert [(p["status"], p["seconds"]) for p in found.values()] == [(0, 3), (124, 4), (1, 9)]
    names = ["BaFT, 2 side by side", "BaFT, in a row", "BaFT, own bases"]
    rows = [row for p in found.values() for row in p.get("rows", [])]
    assert [row["row"]["name"] for row in rows] == names
    assert all(row["summary"]["edit_s"] > 0 for row in rows)
    failed = ("failed (124), see in-a-row-1.log", "failed (1), see easyedit.log")
    lines = capsys.readouterr().out.splitlines()[3:]
    assert [line.split(" | ")[1] for line in lines] == [*names, *failed]


def test_written_weights_are_a_model(parts, tmp_path):
    transformers = pytest.importorskip("transformers")
    parts.weights("llama-2x64", "cpu", str(tmp_path))
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path).config.hidden_size == 64
    assert transformers.AutoTokenizer.from_pretrained(tmp_path).pad_token_id is not None
