import subprocess
import sys

import pytest

from baft_easyedit.cli import main
from tests.bench.synthetic import write_run
from tests.conftest import make_model


@pytest.fixture
def saved(tmp_path, tokenizer):
    make_model().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return str(tmp_path)


def edit_command(model, *more):
    return ["edit", "--model", model, "--prompt", "The capital of France is", *more]


def test_edit_prints_the_answers_before_and_after(saved, capsys):
    hparams = f"{saved}/mine.yaml"
    with open(hparams, "w") as file:
        file.write(f"model_name: {saved}\nlayers: [1, 3]\nrank: 4\nlr: 3.0e-2\ndevice: cpu\n")
    command = edit_command(saved, "--target", "Rome", "--loc-prompt", "Water is wet")
    assert main([*command, "--hparams", hparams, "--device", "cpu", "--ask", "Ice is"]) == 0
    out = capsys.readouterr().out
    assert "The capital of France is\n  before: " in out
    assert "after:  Rome" in out
    assert "Ice is\n" in out
    assert "BaFT: " in out


def test_layers_are_scaled_to_a_model_without_a_file(saved, capsys):
    assert main([*edit_command(saved, "--target", "Rome"), "--device", "cpu"]) == 0
    assert "BaFT: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", ""], "target_new must not be empty"),
        (["--target", "Rome", "--subject", "Spain"], "subject must be a part of the prompt"),
        (["--target", "Rome", "--hparams", "nowhere"], "no hyper-parameter file 'nowhere'"),
    ],
)
def test_bad_input_is_one_line_before_a_model_is_loaded(arguments, message, capsys):
    assert main(edit_command("no-such-model", *arguments)) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_unknown_method_of_the_demo_is_refused(capsys):
    assert main(["demo", "--methods", "BaFT,EDIT"]) == 2
    assert "method must be one of FT-L" in capsys.readouterr().err


def test_bench_options_replace_values_of_the_file(tmp_path, monkeypatch, capsys):
    seen = []
    row = {"method": "MEND", "protocol": "continual", "T": 5, "batch_size": 2, "n": 0, "error": "x"}
    monkeypatch.setattr(
        "baft_easyedit.bench.runner.run_bench",
        lambda config, out, start: seen.append((config, out)) or [row],
    )
    options = ["--model", "m", "--data", "d", "--methods", "MEND,+x", "--T", "5", "--limit", "3"]
    more = ["--batch-size", "2", "--device", "1", "--jobs", "2", "--report-to", "tensorboard"]
    more += ["--peer-preset", "llama-7b", "--texts", "t", "--no-fp16"]
    file = tmp_path / "mine.yaml"
    file.write_text(
        "{data: {kind: zsre}, preset: gone, fp16: true, methods: [{name: +x, method: BaFT}]}"
    )
    assert main(["bench", str(file), *options, *more]) == 0
    ((config, out),) = seen
    assert str(out) == "runs/mine"
    assert [(m.name, m.method) for m in config.methods] == [("MEND", "MEND"), ("+x", "BaFT")]
    assert (config.model, config.data.path, config.data.limit) == ("m", "d", 3)
    assert (config.T, config.batch_size, config.device, config.jobs) == ((5,), (2,), 1, 2)
    assert (config.report_to, config.texts, config.fp16) == ("tensorboard", "t", False)
    assert (config.preset, config.peer_preset) == (None, "llama-7b")
    assert "| MEND   | not run: x |" in capsys.readouterr().out


def test_runs_are_reported_and_diagnosed(tmp_path, capsys):
    write_run(tmp_path / "run")
    assert main(["report", str(tmp_path / "run")]) == 0
    assert main(["diagnose", str(tmp_path / "run"), "--out", str(tmp_path / "found")]) == 0
    out = capsys.readouterr().out
    assert f"{tmp_path}/run/report/report.md" in out
    assert "# Diagnosis of run" in out
    assert (tmp_path / "found/diagnosis.json").is_file()
    assert main(["report", str(tmp_path)]) == 2
    assert "is not the directory of a finished run" in capsys.readouterr().err


def test_command_line_runs_as_a_module():
    run = subprocess.run(
        [sys.executable, "-m", "baft_easyedit", "--help"], capture_output=True, text=True
    )
    assert run.returncode == 0
    assert "doctor" in run.stdout


def test_import_brings_neither_easyedit_nor_transformers():
    heavy = {"easyeditor", "transformers", "huggingface_hub", "safetensors"}
    code = f"import sys, baft_easyedit; print({heavy} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"
