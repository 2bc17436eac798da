import subprocess
import sys

import pytest

from baft_easyedit.cli import main
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
    assert main(["demo", "--methods", "BaFT,EMMET"]) == 2
    assert "methods must be among BaFT, ReFT, FT-L" in capsys.readouterr().err


def test_command_line_runs_as_a_module():
    run = subprocess.run(
        [sys.executable, "-m", "baft_easyedit", "--help"], capture_output=True, text=True
    )
    assert run.returncode == 0
    assert "doctor" in run.stdout


def test_import_brings_neither_easyedit_nor_transformers():
    code = "import sys, baft_easyedit; print({'easyeditor', 'transformers'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"
