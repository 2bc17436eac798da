"""Edits on a device other than the CPU, in a process of its own, which knows of that device."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch.utils.backend_registration as registration


@pytest.mark.skipif(
    not hasattr(registration, "_setup_privateuseone_for_python_backend"),
    reason="torch knows of no devices that are made in Python",
)
def test_edits_on_another_device_are_those_on_the_cpu_and_no_step_waits_for_it():
    command = [sys.executable, "-m", "tests.elsewhere"]
    process = subprocess.run(
        command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr[-3000:]
