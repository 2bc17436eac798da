"""README's commands and programs on a model that is not the bundled one."""

import json
from dataclasses import replace

import pytest

from baft_easyedit import BaFTHyperParams
from baft_easyedit.cli import main
from baft_easyedit.files import resources
from tests.bench.dataset_files import write_records, zsre
from tests.conftest import save_tiny_llama
from tests.test_readme import STORAGE, blocks_of, fenced, text_of


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_tiny_llama(tmp_path_factory.mktemp("models")))


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def settings(model, tmp_path):
    """A file of hyper-parameters for the model."""
    file = tmp_path / "mine.yaml"
    file.write_text(f"{{model_name: {model}, layers: [1, 2], rank: 3, num_steps: 4, device: cpu}}")
    return str(file)


def on_cpu(*command):
    assert main([*command, "--device", "cpu"]) == 0


@pytest.mark.slow
@pytest.mark.easyedit
def test_benchmark_report_and_diagnosis(model, tmp_path, capsys):
    (tmp_path / "zsre").mkdir()
    data = write_records(tmp_path / "zsre", [zsre("Roma"), zsre("Milan")], "zsre_mend_eval.json")
    fewer = ["--T", "1", "--limit", "2", "--methods", "BaFT", "--no-fp16"]
    on_cpu("bench", "bench/zsre_continual", "--data", str(data), "--model", model, *fewer)
    run = tmp_path / "runs/zsre_continual"
    (row,) = json.loads((run / "summary.json").read_text())
    assert (row["error"], row["n"]) == (None, 2)
    assert main(["report", str(run)]) == 0
    assert main(["diagnose", str(run)]) == 0
    assert "not run" not in capsys.readouterr().out


def test_edit_that_is_kept_and_goes_on(model, settings, tmp_path, capsys):
    command = ["edit", "--model", model, "--prompt", "The capital of France is", "--target", "Rome"]
    command.append("--allow-unlearned")
    on_cpu(*command, "--loc-prompt", "The currency of Japan is the yen", "--save", "my-edit")
    on_cpu(*command, "--save", "my-edit")
    on_cpu(*command, "--from", "my-edit")
    on_cpu(*command, "--hparams", settings)
    capsys.readouterr()
    assert main(["history", "my-edit"]) == 0
    assert capsys.readouterr().out.count("The capital of France is") == 2


@pytest.mark.slow
def test_speed(model, capsys):
    few = ["--methods", "BaFT", "--repeats", "1", "--steps", "2", "--new-tokens", "2"]
    on_cpu("speed", "--model", model, *few)
    assert "BaFT-cached" in capsys.readouterr().out


@pytest.mark.parametrize("heading", ["An edit in ten lines", "Keep, ship and undo an edit"])
def test_programs(model, heading, monkeypatch, capsys):
    own = BaFTHyperParams(model, [1, 2], num_steps=4, device="cpu")
    monkeypatch.setattr(
        BaFTHyperParams, "from_hparams", lambda name, **others: replace(own, **others)
    )
    monkeypatch.setattr(resources, "bundled_model_path", lambda: model)
    (program,) = blocks_of(heading)
    used = fenced(text_of(STORAGE), "python") if "shipped" in program else []
    for code in (program, *used):
        exec(compile(code, "README", "exec"), {})
    assert capsys.readouterr().out
