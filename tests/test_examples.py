"""The notebooks of `examples/`: their code runs in order, without Jupyter, and shows no path."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(name, tmp_path):
    """Run a notebook in a process of its own, as a reader would."""
    command = [sys.executable, str(ROOT / "examples/run.py"), str(ROOT / f"examples/{name}.ipynb")]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", ["edit_and_undo", "many_edits", "theorem"])
def test_code_runs(name, tmp_path):
    run(name, tmp_path)


@pytest.mark.slow
@pytest.mark.easyedit
def test_code_that_needs_easyedit_runs(tmp_path):
    run("side_by_side_easyedit", tmp_path)


@pytest.mark.parametrize(
    "name", ["edit_and_undo", "many_edits", "side_by_side_easyedit", "theorem"]
)
def test_outputs_are_plain_and_name_no_path(name):
    notebook = json.loads((ROOT / f"examples/{name}.ipynb").read_text(encoding="utf-8"))
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", ())]
    assert {output["name"] for output in outputs} == {"stdout"}
    text = "".join(line for output in outputs for line in output["text"])
    assert not [path for path in ("/home/", "/tmp/", "/usr/", ":\\") if path in text]
