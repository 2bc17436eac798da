"""Edits on a device other than the CPU, in a process of its own, which knows of that device."""

import pytest
import torch.utils.backend_registration as registration

from tests.new_process import new_processes


@pytest.mark.skipif(
    not hasattr(registration, "_setup_privateuseone_for_python_backend"),
    reason="torch knows of no devices that are made in Python",
)
@pytest.mark.slow
def test_edits_on_another_device_are_those_on_the_cpu_and_no_step_waits_for_it():
    from tests.elsewhere import main

    with new_processes() as pool:
        pool.submit(main).result()
