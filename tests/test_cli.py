import copy
import dataclasses
import logging
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from tqdm import tqdm

import baft_easyedit
from baft_easyedit import BaFTEditor
from baft_easyedit.cli import main
from baft_easyedit.cli.console import Bar
from baft_easyedit.storage.reading import read_latest
from baft_easyedit.training.learner import Learner
from tests.bench.synthetic import write_run
from tests.conftest import make_model

SCRIPTS = sorted(
    path for path in Path(__file__).parents[1].glob("scripts/*.sh") if path.stem != "gpu_check"
)


def edit_command(model, *more):
    return ["edit", "--model", model, "--prompt", "The capital of France is", *more]


EDIT = ["edit", "--model", "no-such-model", "--prompt", "The capital of France is"]
ROME = [*EDIT, "--target", "Rome"]
BENCH = ["bench", "bench/facts"]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["edt"], "argument COMMAND: invalid choice: 'edt' (choose from"),
        (EDIT, "the following arguments are required: --target"),
        ([*EDIT, "--target", ""], "target_new must not be empty"),
        ([*ROME, "--hparams", "nowhere"], "no hyper-parameter file 'nowhere'"),
        ([*ROME, "--lr", "nan"], "argument --lr: must be a number above 0; got 'nan'"),
        ([*ROME, "--from", "nowhere"], "argument --from: must be a directory; there is none"),
        ([*ROME, "--from", __file__], "argument --from: must be a directory"),
        ([*ROME, "--save", __file__], "argument --save: must be a directory"),
        ([*ROME, "--save", f"{__file__}/x"], "argument --save: must lie in a directory"),
        ([*ROME, "--save", ""], "argument --save: must be a directory, and is empty: name one"),
        ([*ROME, "--overwrite"], "--overwrite needs --from, and another directory as --save"),
        ([*ROME, "--device", "gpu"], "argument --device: device must be a CUDA device number"),
        ([*ROME, "--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        ([*ROME, "--dvice", "cpu"], "unrecognized arguments: --dvice cpu"),
        (["demo", "--methods", "BFT"], "got 'BFT' (did you mean 'BaFT'?)"),
        (["demo", "--methods", ","], "argument --methods: must be a comma-separated list"),
        (["demo", "--jobs", "many"], "argument --jobs: must be a whole number of at least 1"),
        (["bench", "bench/fact"], "no hyper-parameter file 'bench/fact' (did you mean 'bench/f"),
        ([*BENCH, "--T", "1,x"], "argument --T: must be a whole number"),
        ([*BENCH, "--methods", "BaFT,BFT"], "(did you mean 'BaFT'?)"),
        ([*BENCH, "--texts", "."], "argument --texts: must be a file; '.' is a directory"),
        (["report", "nowhere"], "argument RUN_DIR: must be a directory; there is none"),
        (["speed", "--out", "."], "argument --out: must be a file; '.' is a directory"),
        (["speed", "--prompt-length", "3"], "must be a whole number of at least 4; got '3'"),
        (["speed", "--methods", "ReFTT"], "(did you mean 'ReFT'?)"),
    ],
)
def test_bad_input_is_one_line_before_a_model_is_loaded(command, message, refused):
    refused(command, message)


@pytest.mark.parametrize("command", [ROME, ["demo"], BENCH, ["speed"]])
def test_device_that_this_machine_lacks_is_refused(command, monkeypatch, refused):
    set_cuda(monkeypatch, 2)
    where = "argument --device: device must be on this machine, where torch finds"
    message = f"{where} CUDA devices 0 to 1 only; got 'cuda:3'"
    refused([*command, "--device", "cuda:3"], message)


def set_cuda(monkeypatch, count):
    """Let the machine have so many CUDA devices."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: count > 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)


def test_files_that_the_system_refuses_are_named(monkeypatch, refused):
    def refuse(path, overrides):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr("baft_easyedit.bench.config.read_config", refuse)
    refused(["bench", "mine.yaml"], "baft-easyedit: mine.yaml: Permission denied")


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may read and write anything")
def test_files_without_permission_are_refused(tmp_path, refused):
    tmp_path.chmod(0o500)
    command = ["bench", "bench/facts", "--out", str(tmp_path / "run")]
    refused(command, "argument --out: must be a place to write to; got")
    tmp_path.chmod(0o700)
    (tmp_path / "texts").touch(0o000)
    command = ["bench", "bench/facts", "--texts", str(tmp_path / "texts")]
    refused(command, "argument --texts: must be readable;")


def test_version_is_told(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"baft-easyedit {baft_easyedit.__version__}\n"


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere", "empty"])
def test_model_directory_that_is_none_is_refused(name, tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    message = "model must be a Hugging Face name or the directory of a model; "
    refused(edit_command(name, "--target", "Rome"), message)
    refused(["bench", "bench/facts", "--methods", "FT-L", "--model", name], message)
    assert not (tmp_path / "runs").exists()


def test_damaged_model_is_one_line(saved, refused):
    with open(f"{saved}/model.safetensors", "w") as file:
        file.write("no weights")
    command = [*edit_command(saved, "--target", "Rome", "--allow-unlearned"), "--device", "cpu"]
    refused(command, f"model {saved!r} could not be loaded (")


def test_edit_prints_the_answers_before_and_after(saved, tmp_path, capsys, refused):
    file = tmp_path / "mine.yaml"
    file.write_text("layers: [1, 3]\nrank: 4\nlr: 3.0e-2\n")
    command = [
        "edit",
        "--prompt",
        "The capital of France is",
        "--target",
        "Rome",
        "--device",
        "cpu",
    ]
    command += ["--hparams", str(file), "--loc-prompt", "Water is wet", "--ask", "Ice is"]
    refused(command, f"--model must be given, as {file} has no model_name")
    assert main([*command, "--model", saved]) == 0
    out = capsys.readouterr().out
    assert "The capital of France is\n  before: " in out
    assert "after:  Rome" in out
    assert "Ice is\n" in out
    assert "BaFT: " in out


def test_cuda_device_of_a_file_becomes_the_cpu_without_cuda(saved, tmp_path, monkeypatch, capsys):
    set_cuda(monkeypatch, 0)
    file = tmp_path / "mine.yaml"
    file.write_text("layers: [1, 3]\ndevice: 0\nnum_steps: 1\n")
    command = edit_command(saved, "--target", "Rome", "--hparams", str(file), "--allow-unlearned")
    assert main(command) == 0
    line = f"baft-easyedit: {file} names the device 0; torch finds no CUDA here: using the CPU\n"
    assert capsys.readouterr().err.startswith(line)
    seen = []
    monkeypatch.setattr("baft_easyedit.bench.run.run_bench", lambda c, *_: seen.append(c) or [])
    assert main(["bench", "bench/zsre_single", "--data", str(tmp_path)]) == 0
    assert [config.device for config in seen] == ["cpu"]
    assert "bench/zsre_single names the device 0" in capsys.readouterr().err


def hparams_learned_by(command, monkeypatch):
    """Run an edit; return the hyper-parameters that it learned by."""
    seen = []
    original = Learner.learn
    monkeypatch.setattr(Learner, "learn", lambda s, r, h: seen.append(h) or original(s, r, h))
    assert main([*command, "--device", "cpu", "--num-steps", "2", "--lr", "0.03"]) == 0
    monkeypatch.undo()
    (hparams,) = seen
    return hparams


def test_end_of_an_answer_is_learned_unless_a_file_decides(saved, tmp_path, monkeypatch):
    command = edit_command(saved, "--target", "Rome", "--allow-unlearned")
    hparams = hparams_learned_by(command, monkeypatch)
    assert (hparams.learn_end, hparams.num_steps, hparams.lr) == (True, 2, 0.03)
    bundled = edit_command("bundled", "--target", "Rome")
    assert hparams_learned_by(bundled, monkeypatch).learn_end
    file = tmp_path / "mine.yaml"
    file.write_text("layers: [1, 3]\n")
    assert not hparams_learned_by([*command, "--hparams", str(file)], monkeypatch).learn_end
    # What is kept goes on with its own settings, but for those that are given.
    kept = ["--save", str(tmp_path / "kept")]
    hparams_learned_by([*command, *kept, "--hparams", str(file)], monkeypatch)
    hparams = hparams_learned_by([*command, *kept], monkeypatch)
    assert (hparams.learn_end, hparams.num_steps, hparams.lr) == (False, 2, 0.03)


def test_settings_that_are_given_for_one_edit_are_those_of_no_other(
    saved, tmp_path, monkeypatch, refused
):
    (tmp_path / "mine.yaml").write_text("{layers: [1, 3], num_steps: 1, lr: 0.5, device: cpu}")
    command = edit_command(saved, "--target", "Rome", "--allow-unlearned")
    kept = tmp_path / "kept"
    command += ["--save", str(kept)]
    begun = hparams_learned_by([*command, "--hparams", f"{tmp_path}/mine.yaml"], monkeypatch)
    assert (begun.num_steps, begun.lr) == (2, 0.03)

    def of_others():
        hparams = read_latest(kept).config.hparams
        return hparams["num_steps"], hparams["lr"]

    assert of_others() == (1, 0.5)
    hparams_learned_by(command, monkeypatch)
    assert of_others() == (1, 0.5)
    monkeypatch.setattr(Learner, "learn", fail)
    refused([*command, "--lr", "9"], "the loss became nan")
    assert of_others() == (1, 0.5)


def test_a_file_of_settings_decides_where_an_edit_goes_on_from_another(
    saved, tmp_path, monkeypatch, refused
):
    settings = tmp_path / "mine.yaml"
    settings.write_text("{layers: [1, 3], rank: 4, device: cpu}")
    command = edit_command(saved, "--target", "Rome", "--allow-unlearned")
    hparams_learned_by(
        [*command, "--hparams", str(settings), "--save", f"{tmp_path}/kept"], monkeypatch
    )
    command += ["--from", f"{tmp_path}/kept", "--hparams", str(settings)]
    settings.write_text("{layers: [1, 3], rank: 4, learn_end: true, device: cpu}")
    assert hparams_learned_by(command, monkeypatch).learn_end
    settings.write_text("{layers: [1, 3], rank: 2, device: cpu}")
    refused(command, "rank must be 4, as in this edit; got 2")


def fail(*_):
    raise FloatingPointError("the loss became nan")


def test_weights_are_of_the_dtype_of_the_option_or_the_file(saved, tmp_path, monkeypatch):
    seen, original = [], BaFTEditor.edit
    monkeypatch.setattr(
        BaFTEditor, "edit", lambda s, r: seen.append(s.model.dtype) or original(s, r)
    )
    file = tmp_path / "mine.yaml"
    file.write_text("{layers: [1, 3], bf16: true, num_steps: 1, device: cpu}")
    command = edit_command(saved, "--target", "Rome", "--allow-unlearned")
    given = ["--hparams", str(file)]
    edits = tmp_path / "edits.jsonl"
    edits.write_text('{"prompt": "Ice is", "target_new": "hot"}')
    applied = ["apply", str(tmp_path / "kept"), str(edits), "--model", saved]
    for options in (command, [*command, *given], [*command, *given, "--dtype", "float16"]):
        assert main([*options, "--device", "cpu"]) == 0
    main([*applied, *given])
    assert seen == [torch.float32, torch.bfloat16, torch.float16, torch.bfloat16]


def test_tokenizer_without_an_end_is_told_and_used(tmp_path, tokenizer, monkeypatch, caplog):
    endless = copy.deepcopy(tokenizer)
    endless.eos_token = endless.pad_token = None
    make_model().save_pretrained(tmp_path)
    endless.save_pretrained(tmp_path)
    command = edit_command(str(tmp_path), "--target", "Rome", "--allow-unlearned", "--ask", "Ice")
    assert not hparams_learned_by(command, monkeypatch).learn_end
    assert "the tokenizer has no eos_token: where an answer ends is not learned" in caplog.text


@pytest.fixture
def _unlearned(monkeypatch):
    """Let reports say that nothing was learned."""
    original = BaFTEditor.edit
    monkeypatch.setattr(
        BaFTEditor, "edit", lambda s, r: dataclasses.replace(original(s, r), learned=(False,))
    )


@pytest.mark.usefixtures("_unlearned")
@pytest.mark.parametrize(("option", "status"), [([], 3), (["--allow-unlearned"], 0)])
def test_edit_that_was_not_learned_is_told_once(option, status, saved, tmp_path, capsys, caplog):
    steps = ["--num-steps", "2", "--lr", "1e-5", "--device", "cpu"]
    command = [*edit_command(saved, "--target", "Rome"), *steps, *option]
    told = "baft-easyedit: not learned: 'The capital of France is' -> 'Rome'"
    more = ". Try more steps (--num-steps 4) or a higher learning rate (--lr 2e-05)\n"
    assert main(command) == status
    assert capsys.readouterr().err == told + more
    assert not caplog.records
    assert logging.getLogger("baft_easyedit.training.learner").level == logging.NOTSET
    kept = str(tmp_path / "kept")
    assert main([*command, "--save", kept]) == status
    assert capsys.readouterr().err == f"{told}; it is kept in {kept} all the same{more}"
    assert main(["history", kept]) == 0
    assert "The capital of France is -> Rome" in capsys.readouterr().out


def stop(*args, **kwargs):
    raise KeyboardInterrupt


def test_progress_is_counted_without_a_bar(monkeypatch):
    monkeypatch.setattr("tqdm.tqdm", partial(tqdm, disable=True))  # as TQDM_DISABLE has it
    with Bar() as bar:
        bar.start(40, 10)(2)
        assert bar.position == "at 12 of 40 edits"


def test_interrupt_ends_with_130_and_says_what_is_kept(saved, tmp_path, monkeypatch, capsys):
    def stop_later(config, out, start, *_):
        start(40, 10)(2)
        raise KeyboardInterrupt

    monkeypatch.setattr("baft_easyedit.bench.run.run_bench", stop_later)
    assert main(["bench", "bench/facts", "--out", str(tmp_path / "run")]) == 130
    line = f"stopped: at 12 of 40 edits; what was finished is kept in {tmp_path}/run, and the same"
    assert capsys.readouterr().err.endswith(f"{line} command goes on from there\n")
    monkeypatch.setattr("baft_easyedit.bench.run.run_bench", stop)
    assert main(["bench", "bench/facts", "--out", str(tmp_path / "run")]) == 130
    assert "stopped: before the first edit; what" in capsys.readouterr().err
    monkeypatch.setattr("baft_easyedit.easyedit.doctor.doctor", stop)
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err == "baft-easyedit: stopped\n"
    monkeypatch.setattr(Learner, "learn", stop)
    command = [*edit_command(saved, "--target", "Rome"), "--device", "cpu"]
    assert main(command) == 130
    assert capsys.readouterr().err == "baft-easyedit: stopped: nothing is kept\n"
    assert main([*command, "--save", str(tmp_path / "kept")]) == 130
    assert f"history {tmp_path}/kept` lists what is kept" in capsys.readouterr().err


def test_bench_options_replace_values_of_the_file(tmp_path, monkeypatch, capsys):
    seen = []
    row = {"method": "MEND", "protocol": "continual", "T": 5, "batch_size": 2, "n": 0, "error": "x"}
    monkeypatch.setattr(
        "baft_easyedit.bench.run.run_bench",
        lambda config, out, *_: seen.append((config, out)) or [row],
    )
    set_cuda(monkeypatch, 2)
    monkeypatch.chdir(tmp_path)
    for name in ("d", "t"):
        (tmp_path / name).touch()
    options = ["--model", "m", "--data", "d", "--methods", "MEND,+x", "--T", "5", "--limit", "3"]
    more = ["--batch-size", "2", "--device", "1", "--jobs", "2"]
    more += ["--peer-preset", "llama-7b", "--texts", "t", "--no-fp16"]
    file = tmp_path / "mine.yaml"
    file.write_text(
        "{data: {kind: zsre}, preset: gone, fp16: true, methods: [{name: +x, method: BaFT}]}"
    )
    assert main(["bench", str(file), *options, *more]) == 1  # nothing could be run
    ((config, out),) = seen
    assert str(out) == "runs/mine"
    assert [(m.name, m.method) for m in config.methods] == [("MEND", "MEND"), ("+x", "BaFT")]
    data = (str(tmp_path / "d"), 3)
    assert (config.model, config.data.path, config.data.limit) == ("m", *data)
    assert (config.T, config.batch_size, config.device, config.jobs) == ((5,), (2,), 1, 2)
    assert (config.texts, config.fp16) == (str(tmp_path / "t"), False)
    assert (config.preset, config.peer_preset) == (None, "llama-7b")
    captured = capsys.readouterr()
    assert "| MEND   | not run: x |" in captured.out
    assert captured.err == "baft-easyedit: no method could be run; the tables say why\n"


def test_runs_are_reported_and_diagnosed(tmp_path, capsys, refused):
    write_run(tmp_path / "run", methods=("BaFT", "FT-L"), num_cases=10)
    assert main(["report", str(tmp_path / "run")]) == 0
    assert main(["diagnose", str(tmp_path / "run"), "--out", str(tmp_path / "found")]) == 0
    out = capsys.readouterr().out
    assert f"{tmp_path}/run/report/report.md" in out
    assert "# Diagnosis of run" in out
    assert (tmp_path / "found/diagnosis.json").is_file()
    command = ["report", str(tmp_path), "--out", str(tmp_path / "none")]
    refused(command, "is not the directory of a finished run")
    assert not (tmp_path / "none").exists()


def test_import_brings_nothing_heavy():
    heavy = {"easyeditor", "transformers", "huggingface_hub", "safetensors", "torch._dynamo"}
    heavy |= {"peft", "matplotlib"}
    code = "import sys, baft_easyedit, baft_easyedit.engines.sglang; "
    code += f"print({heavy} & set(sys.modules)); "
    code += "import baft_easyedit.bench.report; print('matplotlib' in sys.modules)"
    root = Path(baft_easyedit.__file__).parents[1]
    run = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert run.stdout.split() == ["set()", "False"], run.stderr


@pytest.mark.parametrize("arguments", [[], ["--help"], ["nowhere"]])
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_scripts_without_a_directory_say_how_they_are_called(script, arguments):
    ended = subprocess.run(["bash", script, *arguments], capture_output=True, text=True)
    assert ended.returncode == 2
    assert f"{script.name} DATA_DIR [further options" in ended.stderr
