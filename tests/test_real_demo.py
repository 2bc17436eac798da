"""The demo's first part, and what it runs on: the real model, and a clone of EasyEdit."""

import importlib.util
import subprocess
from pathlib import Path

import pytest

from baft_easyedit import demo
from baft_easyedit.cli import main
from baft_easyedit.easyedit import host
from baft_easyedit.gguf import smollm2
from tests.gguf_files import write_gguf

ROOT = Path(__file__).parent.parent


def test_demo_goes_on_without_a_real_model_and_fails_if_nothing_ran(monkeypatch, tmp_path, capsys):
    rows = [{"method": "SERAC", "T": 1, "error": "x"}]
    monkeypatch.setattr(demo, "show_edits", lambda device: ["bundled edits"])
    monkeypatch.setattr(demo, "compare", lambda *_: rows)
    monkeypatch.setattr("baft_easyedit.easyedit.find_host", lambda: host.Host("pypi", ROOT, "1"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: None)
    assert main(["demo", "--methods", "SERAC", "--cases", "1", "--device", "cpu"]) == 1
    shown, error = capsys.readouterr()
    first, *others = shown.splitlines()
    assert first.startswith(
        "No real model, only the bundled one: the model 'smollm2' needs the pac"
    )
    assert others[1:3] == ["The bundled model, of 3 million parameters:", "bundled edits"]
    assert others[4].startswith("Through EasyEdit (pypi, 1)")
    assert "**single edits; n = 0 records**" in others
    assert "| SERAC  | not run: x |" in shown
    assert error == "baft-easyedit: no method could be run; the tables say why\n"


@pytest.mark.slow
@pytest.mark.real
def test_real_edits_change_what_is_edited_and_are_undone(real_model):
    _, *lines = demo.show_real_edits(demo.real_settings("cpu"))
    edits = list(zip(*[iter(lines)] * 4, strict=True))
    assert len(edits) == 3
    is_general = []
    for headline, edited, rephrased, _ in edits:
        target = headline.partition("   ")[0].rpartition(" -> ")[2]
        assert f" -> {target}" in edited
        is_general.append(target in rephrased.rpartition(" -> ")[2])
    assert sum(is_general) >= 2  # a statement's state is hardly similar to a question's
    assert sum(neighbour.endswith("(as before)") for *_, neighbour in edits) >= 2


@pytest.fixture(scope="module")
def get_easyedit():
    spec = importlib.util.spec_from_file_location("get_easyedit", ROOT / "scripts/get_easyedit.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def origin(tmp_path):
    """A repository with two commits; return it and the hash of the first."""
    directory = tmp_path / "origin"

    def git(*command):
        author = ["-c", "user.name=a", "-c", "user.email=a@b"]
        done = subprocess.run(
            ["git", "-C", str(directory), *author, *command], check=True, capture_output=True
        )
        return done.stdout.decode().strip()

    (directory / "easyeditor").mkdir(parents=True)
    (directory / "figures").mkdir()
    (directory / "figures/large").write_text("x")
    try:
        git("init", "-q")
    except FileNotFoundError:
        pytest.skip("no git")
    for setting in ("allowAnySHA1InWant", "allowFilter"):
        git("config", f"uploadpack.{setting}", "true")
    for content in ("first", "second"):
        (directory / "easyeditor/__init__.py").write_text(content)
        git("add", "-A")
        git("commit", "-qm", content)
    return directory.as_uri(), git("rev-parse", "HEAD~1")


def test_the_pinned_commit_is_cloned_without_the_rest(get_easyedit, origin, tmp_path):
    target = tmp_path / "clone"
    assert get_easyedit.clone(target, 20, *origin) is None
    assert (target / "easyeditor/__init__.py").read_text() == "first"
    assert not (target / "figures").exists()
    assert get_easyedit.clone(target, 20, "nowhere", "0") is None  # it is there
    assert len(host.COMMIT) == 40


def test_without_git_network_or_time_there_is_no_clone(get_easyedit, origin, tmp_path, monkeypatch):
    target = tmp_path / "clone"
    assert "nowhere" in get_easyedit.clone(target, 20, (tmp_path / "nowhere").as_uri(), "0" * 40)

    def too_slow(command, timeout, **_):
        raise subprocess.TimeoutExpired(command, timeout)

    with monkeypatch.context() as patch:
        patch.setattr(get_easyedit.subprocess, "run", too_slow)
        assert get_easyedit.clone(target, 20, *origin) == "it took longer than 20 s"
    monkeypatch.setattr(get_easyedit.shutil, "which", lambda name: None)
    assert get_easyedit.clone(target, 20, *origin) == "there is no git"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("clone")]


def test_a_gguf_file_is_imported_from_the_command_line(tmp_path, capsys):
    pytest.importorskip("gguf", reason="the package gguf is not installed")
    write_gguf(tmp_path / "tiny.gguf")
    command = ["import-gguf", str(tmp_path / "tiny.gguf"), str(tmp_path / "model")]
    assert main([*command, "--dtype", "bfloat16"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "model")
    assert main(command) == 2
    assert "the directory must be new or empty" in capsys.readouterr().err
    edit = ["edit", "--model", str(tmp_path / "model"), "--device", "cpu", "--allow-unlearned"]
    assert main([*edit, "--prompt", "Ice is", "--target", "hot", "--num-steps", "2"]) == 0
