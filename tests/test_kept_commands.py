"""What the command line does with a kept edit, and with files of edits."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from baft_easyedit.cli import main
from baft_easyedit.cli.edits_file import read_requests
from baft_easyedit.hparams import scaled_layers
from baft_easyedit.storage.reading import read_history
from tests.conftest import make_model, make_tokenizer

EDITS = [
    {"prompt": "The capital of France is", "target_new": "Rome", "subject": "France"},
    {"prompt": "Water freezes into", "target_new": "sand", "loc_prompt": ["Ice is\u2028cold\x85"]},
]

APART = "min_similarity: 0.5\n"


@pytest.fixture(autouse=True)
def _settings(tmp_path, saved):
    """Settings with which the model learns in few steps."""
    text = f"model_name: {saved}\nlayers: [1, 3]\nrank: 8\nlr: 3.0e-2\nnum_steps: 60\ndevice: cpu\n"
    (tmp_path / "mine.yaml").write_text(text + APART)  # the second keeps the first


@pytest.fixture
def edits(tmp_path):
    file = tmp_path / "edits.json"
    file.write_text(json.dumps(EDITS))
    return file


@pytest.fixture
def kept(tmp_path, edits):
    """A directory to which the edits were applied."""
    assert run("apply", tmp_path / "kept", edits, "--hparams", tmp_path / "mine.yaml") == 0
    return tmp_path / "kept"


def run(*arguments):
    return main([str(argument) for argument in arguments])


def test_a_file_of_edits_is_applied_asked_and_taken_back(saved, kept, capsys, refused):
    model = ["--model", saved]
    assert run("ask", kept, *model, "--prompt", "Water freezes into") == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0] == "Water freezes into"
    assert told[1].startswith("  base:   ")
    assert "sand" not in told[1]
    assert told[2].startswith("  edited: sand")
    assert run("undo", kept, *model) == 0
    assert "undo     to 1" in capsys.readouterr().out
    assert run("rollback", kept, *model, "--to", "0") == 0
    refused(["undo", kept, *model], "there is no edit to undo: the state is that of entry 0")
    kinds = [entry.kind for entry in read_history(kept)]
    assert kinds == ["start", "edit", "edit", "undo", "rollback"]


def test_apply_goes_on_where_it_stopped(tmp_path, saved, edits, capsys):
    kept, more = tmp_path / "kept", ["--hparams", tmp_path / "mine.yaml"]
    (tmp_path / "first.json").write_text(json.dumps(EDITS[:1]))
    assert run("apply", kept, tmp_path / "first.json", *more) == 0
    assert run("apply", kept, edits, "--model", saved) == 0
    assert "edits made: 1; there before: 1" in capsys.readouterr().out
    assert run("undo", kept, "--model", saved) == 0
    assert run("apply", kept, edits, "--model", saved) == 0  # what was taken back is made again
    assert "edits made: 1; there before: 1" in capsys.readouterr().out
    assert run("apply", kept, edits, "--model", saved) == 0
    assert "edits made: 0; there before: 2" in capsys.readouterr().out


def test_apply_tells_what_does_not_hold_in_the_end(tmp_path, saved, edits, capsys, caplog):
    mine = tmp_path / "mine.yaml"
    mine.write_text(mine.read_text().replace("num_steps: 60", "num_steps: 1"))
    assert run("apply", tmp_path / "kept", edits, "--hparams", tmp_path / "mine.yaml") == 3
    capsys.readouterr()
    assert run("apply", tmp_path / "kept", edits, "--model", saved) == 3  # asked again
    told = capsys.readouterr().out
    assert "edits made: 0; there before: 2" in told
    assert "does not hold: 'The capital of France is' -> 'Rome'" in told
    assert not caplog.text


def test_a_kept_edit_is_asked_in_the_dtype_that_it_was_learned_in(tmp_path, saved, capsys):
    (tmp_path / "mine.yaml").open("a").write("bf16: true\n")
    (tmp_path / "one.json").write_text(json.dumps(EDITS[:1]))
    kept, more = tmp_path / "kept", ["--hparams", tmp_path / "mine.yaml"]
    assert run("apply", kept, tmp_path / "one.json", *more) in (0, 3)
    assert run("ask", kept, "--model", saved, "--prompt", "Ice is") == 0
    assert "edited:" in capsys.readouterr().out


def test_apply_makes_no_edit_if_one_cannot_be_made(tmp_path, saved, edits, capsys, refused):
    (tmp_path / "long.json").write_text(json.dumps([EDITS[0], {**EDITS[1], "prompt": "a" * 999}]))
    more = ["--hparams", tmp_path / "mine.yaml"]
    refused(["apply", tmp_path / "kept", tmp_path / "long.json", *more], "request 'aaa")
    one = ["edit", *more, "--prompt", "a" * 999, "--target", "b"]
    assert run(*one, "--save", tmp_path / "kept") == 2
    assert not (tmp_path / "kept").exists()
    assert run("apply", tmp_path / "kept", edits, *more) == 0
    assert "edits made: 2; there before: 0" in capsys.readouterr().out


def test_ask_reads_prompts_line_by_line(saved, kept, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("\ufeffSnow falls in\n\nIce is\n"))
    capsys.readouterr()
    assert run("ask", kept, "--model", saved) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[::3] == ["Snow falls in", "Ice is"]


def test_ask_uses_the_chat_template_that_is_asked_for(saved, kept, capsys, refused):
    model = ["--model", saved, "--max-new-tokens", "12"]
    prompt = ["--prompt", "Water freezes into"]
    refused(["ask", kept, *model, *prompt, "--chat"], "--chat needs a tokenizer with a chat temp")
    settings = json.loads((Path(saved) / "tokenizer_config.json").read_text())
    settings["chat_template"] = "{% for m in messages %}{{ m.content }} is not{% endfor %}"
    (Path(saved) / "tokenizer_config.json").write_text(json.dumps(settings))
    told = []
    for option in ("--chat", "--no-chat"):
        assert run("ask", kept, *model, *prompt, option) == 0
        told.append(capsys.readouterr().out.splitlines()[2])
    assert told[1].startswith("  edited: sand")
    assert not told[0].startswith("  edited: sand")


def test_entries_are_compared(tmp_path, saved, kept, capsys, refused):
    assert run("undo", kept, "--model", saved) == 0
    (tmp_path / "other.json").write_text(json.dumps([{**EDITS[0], "target_new": "Oslo"}]))
    assert run("apply", kept, tmp_path / "other.json", "--model", saved) == 0
    capsys.readouterr()
    assert run("diff", kept, "2") == 0
    france = "The capital of France is ->"
    assert capsys.readouterr().out.splitlines() == [
        f"- {france} Rome", "- Water freezes into -> sand", f"+ {france} Oslo",
    ]  # fmt: skip
    assert run("diff", kept, "0", "3") == 0  # 3 undid 2
    assert capsys.readouterr().out == f"+ {france} Rome\n"
    refused(["diff", kept, "9"], "A and B must be ids of entries, at most 4; got 9")


def test_records_of_a_benchmark_are_applied(tmp_path, saved, capsys, refused):
    records = [{"prompt": "Ice is", "target_new": t} for t in ("hot", "cold")] + EDITS
    (tmp_path / "records.json").write_text(json.dumps(records))
    more = ["--kind", "requests", "--limit", "2", "--hparams", tmp_path / "mine.yaml"]
    assert run("apply", tmp_path / "kept", tmp_path / "records.json", *more) == 0
    told = capsys.readouterr()
    assert "1 prompts are in several records with different targets: records 0, 1" in told.err
    _, first, _ = read_history(tmp_path / "kept")
    assert [(r["prompt"], r["target_new"]) for r in first.requests] == [("Ice is", "cold")]
    command = ["apply", tmp_path / "kept", tmp_path / "records.json", "--kind", "books"]
    refused(command, "kind must be one of ['akew', 'convsent'")


def test_files_are_checked_without_a_model(tmp_path, edits, capsys, refused):
    (tmp_path / "bench.yaml").write_text("data: {kind: requests}\nmethods: [BaFT, ReFT]\n")
    for file, told in (
        ([edits], "2 edits, all usable"),
        ([edits, "--kind", "requests"], "2 edits, all usable"),
        (["ReFT/llama-2-7b"], "settings of ReFT for meta-llama/Llama-2-7b-hf, all usable"),
        ([tmp_path / "bench.yaml", "--data", edits], "benchmark of 2 records by BaFT, ReFT; T ="),
    ):
        assert run("validate", *file) == 0
        assert told in capsys.readouterr().out
    (tmp_path / "mine-2.5").write_text("model_name: x\nlayers: auto\n")
    assert run("validate", tmp_path / "mine-2.5") == 0
    assert "settings of BaFT for x" in capsys.readouterr().out
    (tmp_path / "bad.yaml").write_text("model_name: x\nlayers: [1]\nrnak: 3\n")
    refused(["validate", tmp_path / "bad.yaml"], "rnak")
    refused(["validate", tmp_path], "is a directory: give --kind")
    for name in ("edits.txt", "edits.tsv"):
        edits.rename(tmp_path / name)
        refused(["validate", tmp_path / name], "says otherwise: convert or rename it")
        (tmp_path / name).rename(edits)


def test_what_there_is_is_listed(capsys):
    assert run("ls") == 0
    told = capsys.readouterr().out.splitlines()
    assert {"  BaFT/llama-2-7b", "  WISE", "  zsre", "  bundled"} < set(told)
    assert run("ls", "models") == 0
    assert capsys.readouterr().out.splitlines() == ["models:", "  bundled", "  smollm2"]


def test_a_model_is_asked_for_unless_the_package_has_it(kept, refused):
    for command in (["ask"], ["undo"], ["rollback", "--to", "0"]):
        refused([command[0], kept, *command[1:]], "--model must be given; the edit in")


def test_a_damaged_directory_is_repaired(saved, kept, capsys, refused):
    assert run("repair", kept) == 0
    assert capsys.readouterr().out.splitlines()[-2] == "nothing is damaged:"
    state = (kept / "baft.safetensors").read_bytes()
    assert run("rollback", kept, "--model", saved, "--to", "1") == 0
    (kept / "baft.safetensors").write_bytes(state)
    refused(["undo", kept, "--model", saved], "`baft-easyedit repair` or BaFTEditor.open")
    capsys.readouterr()
    assert run("repair", kept) == 0
    told = capsys.readouterr().out
    assert told.startswith("what was there is in before-repair-1; now:\n")
    assert "rollback to 2" in told
    assert f"`baft-easyedit rollback {kept} --to 3` brings back what followed" in told
    assert (kept / "before-repair-1/baft.safetensors").read_bytes() == state
    assert run("undo", kept, "--model", saved) == 0


def test_a_pipe_that_is_closed_early_ends_a_command_quietly(kept):
    command = f"{sys.executable} -m baft_easyedit history {kept} | true"
    ended = subprocess.run(
        ["bash", "-o", "pipefail", "-c", f"{command}; echo $?"], capture_output=True, text=True
    )
    assert ended.stderr == ""
    assert ended.stdout in ("0\n", "130\n")  # by which of both was first


def test_an_edit_is_not_gone_on_with_on_another_model(tmp_path, edits, kept, refused):
    small = make_model("gpt2")
    small.save_pretrained(tmp_path / "small")
    make_tokenizer().save_pretrained(tmp_path / "small")
    for command in (
        ["apply", kept, edits],
        ["edit", "--save", kept, "--prompt", "a", "--target", "b"],
    ):
        refused([*command, "--model", tmp_path / "small"], "the model must be the one that")


def test_an_edit_is_used_on_another_model_where_that_is_asked_for(
    saved, kept, capsys, refused, monkeypatch
):
    make_model(seed=1).save_pretrained(saved)
    ask = ["ask", kept, "--model", saved, "--prompt", "Water freezes into"]
    refused(ask, r"--allow-other-model of ask, eval and serve")
    assert run(*ask, "--allow-other-model") == 0
    assert "  edited: " in capsys.readouterr().out
    uvicorn = pytest.importorskip("uvicorn")
    monkeypatch.setattr(uvicorn, "run", lambda *_, **options: options)
    serve = ["serve", kept, "--model", saved, "--port", "0"]
    refused(serve, r"--allow-other-model of ask, eval and serve")
    assert run(*serve, "--allow-other-model") == 0


def test_a_benchmark_is_validated_for_the_model_that_is_named(tmp_path, saved, edits, refused):
    file = tmp_path / "bench.yaml"
    file.write_text(f"methods: [BaFT]\nT: [1]\ndata: {{kind: requests, path: {edits}}}\n")
    refused(["validate", file, "--model", tmp_path / "nowhere"], "nowhere")
    assert run("validate", file, "--model", saved) == 0


def test_of_emptied_files_no_history_is_told(kept, refused):
    for name in ("journal.jsonl", "baft.safetensors"):
        (kept / name).write_bytes(b"")
    refused(["history", kept], "baft.safetensors")


def test_the_bundled_model_needs_no_option(tmp_path, edits):
    assert run("apply", tmp_path / "kept", edits, "--device", "cpu", "--limit", "1") in (0, 3)
    assert run("undo", tmp_path / "kept", "--device", "cpu") == 0
    assert read_history(tmp_path / "kept")[0].content["hparams"]["learn_end"] is True


def test_any_model_gets_settings_for_edits_in_a_row(tmp_path, saved, edits, capsys):
    model = make_model()
    config = type(model.config)(**{**model.config.to_dict(), "hidden_size": 96, "head_dim": 24})
    type(model)(config).save_pretrained(saved)
    assert run("apply", tmp_path / "kept", edits, "--model", saved, "--device", "cpu") in (0, 3)
    settings = read_history(tmp_path / "kept")[0].content["hparams"]
    depth = model.config.num_hidden_layers
    assert settings["layers"] == scaled_layers(depth, [25, 26, 27, 28])
    assert settings["min_similarity"] == 0.6


def test_an_edit_that_a_later_one_replaced_is_made_again(tmp_path, saved, capsys):
    more = ["--hparams", tmp_path / "mine.yaml"]
    for number, target in enumerate(("Rome", "Oslo", "Rome")):
        file = tmp_path / f"{number}.json"
        file.write_text(json.dumps([{**EDITS[0], "target_new": target}]))
        assert run("apply", tmp_path / "kept", file, *more) == 0
        assert "edits made: 1; there before: 0" in capsys.readouterr().out


@pytest.mark.parametrize(
    "command",
    [
        *(["ask"], ["undo"], ["forget", "--prompt", "x"], ["eval", "--tasks", "x"]),
        *(["history"], ["repair"]),
    ],
)
@pytest.mark.parametrize("model", [[], ["--model", "bundled"]])
def test_a_directory_without_an_edit_is_refused(command, model, tmp_path, refused):
    more = [*command[1:], *(model if command[0] not in ("history", "repair") else [])]
    refused([command[0], tmp_path, *more], "must be a directory with an edit")


def test_a_blank_prompt_is_not_asked(tmp_path, refused):
    refused(["ask", tmp_path, "--prompt", " "], "--prompt must not be empty")
    refused(["ask", tmp_path, "--prompt", "a\udcff"], "a prompt must be UTF-8 text")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", json.dumps(EDITS)),
        ("a.jsonl", "\r\n".join(json.dumps(e, ensure_ascii=False) for e in EDITS) + "\n"),
        (
            "a.csv",
            "\ufeffprompt,target_new,subject,loc_prompt\n"
            "The capital of France is,Rome,France,\n"
            "Water freezes into,sand,,Ice is\u2028cold\x85\n",
        ),
    ],
)
def test_requests_are_read_from_each_format(name, text, tmp_path):
    (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    assert [request.to_dict() for request in read_requests(tmp_path / name)] == EDITS


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "{", r"a.json must be a JSON list, JSON lines \(.jsonl\) or CSV \(.csv\)"),
        ("a.json", '{"prompt": "a"}', "must hold a list of requests; got"),
        ("a.jsonl", "", "must hold a list of requests; got"),
        ("a.jsonl", "nothing", "must be a JSON list"),
        ("a.csv", "prompt,target_new\na,b,c\n", "has more cells than there are columns"),
        ("a.csv", 'prompt,target_new\n"a" b,c\n', "must be a JSON list, .* expected after"),
        ("a.json", '[{"prompt": "a", "target": "b"}]', "request 1 of .*: rename 'target'"),
        ("a.json", '[{"prompt": 1, "target_new": "b"}]', "request 1 of .*prompt must be a string"),
        ("a.csv", "prompt,prompt,target_new\na,b,c\n", "a column is there twice"),
        ("a.csv", "prompt;target_new\na;b\n", "save it with commas between columns; got 'prompt;"),
        (
            "a.csv",
            "prompt,target_new\na,b\na,c\n",
            "must hold one request for a prompt; 'a' has requests 1 and 2: keep one",
        ),
        (
            "a.json",
            '[{"prompt": "a", "target_new": "b"}, {"prompt": "a ", "target_new": "c"}]',
            "must hold one request for a prompt; 'a ' has requests 1 and 2: keep one",
        ),
        ("a.json", "[" * 10**5, "a.json must be a JSON list, .*: its text must be JSON"),
        ("a.jsonl", '{"prompt": "a"}\n{', "a.jsonl must be a JSON list, .*: line 2 must be JSON"),
        ("a.json", '[{"prompt": "a", "prompt": "b"}]', "the key 'prompt' comes twice"),
        ("a.json", b"\xff\xfe\x00", "must be UTF-8 text, and is not"),
    ],
)
def test_bad_files_of_requests_are_refused(name, text, message, tmp_path, refused):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises((TypeError, ValueError), match=message):
        read_requests(tmp_path / name)


def test_eval_says_how_to_get_the_harness(kept, refused, monkeypatch):
    monkeypatch.delitem(sys.modules, "baft_easyedit.harness", raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.evaluator", None)
    refused(["eval", kept, "--tasks", "piqa"], "pip install 'baft_easyedit[eval]'")
