"""README's commands and programs on a model that is not the bundled one."""

import json
from dataclasses import replace

import pytest

from baft_easyedit import BaFTHyperParams
from baft_easyedit.cli import main
from tests.bench.dataset_files import write_records, zsre
from tests.conftest import save_tiny_llama
from tests.test_readme import blocks_of


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_tiny_llama(tmp_path_factory.mktemp("models")))


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


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


@pytest.mark.slow
def test_speed(model, capsys):
    few = ["--methods", "BaFT", "--repeats", "1", "--steps", "2", "--new-tokens", "2"]
    on_cpu("speed", "--model", model, *few)
    assert "BaFT-cached" in capsys.readouterr().out


def test_an_edit_in_ten_lines(model, monkeypatch, capsys):
    own = BaFTHyperParams(model, [1, 2], num_steps=4, device="cpu")
    monkeypatch.setattr(
        BaFTHyperParams, "from_hparams", lambda name, **others: replace(own, **others)
    )
    (program,) = blocks_of("An edit in ten lines")
    exec(compile(program, "README", "exec"), {})
    assert capsys.readouterr().out
