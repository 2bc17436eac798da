"""Methods in processes of their own; a method that fails is a row."""

import os

import pytest

from baft_easyedit.easyedit import runner
from baft_easyedit.easyedit.runner import run_methods

pytestmark = pytest.mark.easyedit


def test_methods_run_apart_and_failures_are_rows(host, model_path, requests):
    calls = []
    settings = {"layers": [1, 2], "rank": 4, "lr": 5e-2, "num_steps": 40}
    ours, unknown = run_methods(
        ["BaFT", "NoSuch"],
        model_path,
        requests[:2],
        hparams={"BaFT": settings},
        progress=lambda *call: calls.append(call[:3]),
    )
    assert ours.error is None
    assert (ours.method, ours.protocol, ours.n, ours.num_restored) == ("BaFT", "single", 2, 2)
    assert calls == [("BaFT", 1, 2), ("BaFT", 2, 2)]
    assert (unknown.method, unknown.n) == ("NoSuch", 0)
    assert unknown.error.startswith("ValueError: method must be one of BaFT, ReFT, FT-L")


@pytest.fixture
def worker(tmp_path, monkeypatch):
    """Let shell commands stand in for the worker."""

    def replace(commands):
        script = tmp_path / "worker.sh"
        script.write_text(f"#!/bin/sh\n{commands}\n")
        script.chmod(0o755)
        monkeypatch.setattr(runner.sys, "executable", str(script))

    return replace


def test_a_process_that_dies_is_a_row(model_path, requests, worker):
    worker("echo out of luck >&2; exit 3")
    (result,) = run_methods(["BaFT"], model_path, requests)
    assert result.error == "its process ended with exit code 3: out of luck\n"


def test_an_interrupt_leaves_no_process_behind(model_path, requests, worker, tmp_path):
    event = '{"done": 1, "total": 2, "case": {}}'
    worker(f"echo $$ > {tmp_path}/pid; echo '{event}'; exec sleep 60")

    def interrupt(*call):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_methods(["BaFT"], model_path, requests[:1], progress=interrupt)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_a_slow_method_is_killed(model_path, requests, worker):
    worker("exec sleep 60")
    (result,) = run_methods(["BaFT"], model_path, requests, T=2, timeout_s=0.2)
    assert (result.error, result.protocol) == ("took more than 0.2 s", "continual-2")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"names": []}, "names must hold at least one method"),
        ({"requests": []}, "requests must hold at least one request"),
        ({"T": 0}, "T must be at least 1; got 0"),
    ],
)
def test_empty_runs_are_refused(model_path, requests, change, message):
    arguments = {"names": ["BaFT"], "model_path": model_path, "requests": requests, **change}
    with pytest.raises(ValueError, match=message):
        run_methods(**arguments)
