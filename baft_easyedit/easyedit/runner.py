"""Run several methods, each in a process of its own, and collect one `RunResult` per method."""

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import baft_easyedit
from baft_easyedit.easyedit.records import RunResult
from baft_easyedit.resources import model_location

Progress = Callable[[str, int, int, Mapping[str, Any]], None]
"""Called with the method, the number of cases done, the number in all, and the case's record."""
_TAIL = 300


def run_methods(
    names: Sequence[str],
    model_path: str,
    requests: Sequence[Mapping[str, Any]],
    *,
    T: int | None = None,
    device: int | str = "cpu",
    texts: Sequence[str] = (),
    presets: Mapping[str, str] | None = None,
    hparams: Mapping[str, Mapping[str, Any]] | None = None,
    seed: int = 0,
    threads: int = 1,
    timeout_s: float = 3600.0,
    progress: Progress | None = None,
) -> list[RunResult]:
    """Run methods under one of EasyEdit's generations and one protocol.

    Args:
        names: `BaFT`, `ReFT` or names of `peers.PEERS`; they run one after another.
        model_path: A model's directory, or `bundled` for our own.
        requests: EasyEdit's request dicts.
        T: Edits in a row of the continual protocol; None for single edits.
        device: EasyEdit's `device`.
        texts: Ordinary texts, for the statistics of MEMIT and AlphaEdit.
        presets: YAML files or bundled names for `BaFT` and `ReFT`, such as `BaFT/llama-2-7b`.
            Without one, that of the bundled model, with the paper's layers scaled to the depth.
        hparams: Values that replace those of the preset or YAML, by method.
        seed: Seed of everything random in a method.
        threads: Torch's CPU threads.
        timeout_s: Longest time of one method.
        progress: Called after each case, from this process.

    Returns:
        One result per name, in that order; a method that fails, dies or takes too long has `error`.

    Raises:
        ValueError: If there are no names or requests, or T is below 1.
    """
    if not names:
        raise ValueError("names must hold at least one method; got none")
    if not requests:
        raise ValueError("requests must hold at least one request; got none")
    if T is not None and T < 1:
        raise ValueError(f"T must be at least 1; got {T}")
    job: dict[str, Any] = {
        "model_path": _absolute(model_location(model_path)),
        "requests": [dict(request) for request in requests],
        "protocol": "single" if T is None else f"continual-{T}",
        "device": device,
        "texts": list(texts),
        "presets": dict(presets or {}),
        "seed": seed,
        "threads": threads,
    }
    return [
        _run_in_process(
            {**job, "method": name, "hparams": dict((hparams or {}).get(name, {}))},
            timeout_s,
            progress,
        )
        for name in names
    ]


def _run_in_process(
    job: Mapping[str, Any], timeout_s: float, progress: Progress | None
) -> RunResult:
    """Run one method in its process, and wait for it."""
    with tempfile.TemporaryDirectory(prefix="easyedit-") as directory:
        job_file, log_file = Path(directory) / "job.json", Path(directory) / "log.txt"
        job_file.write_text(json.dumps(job), encoding="utf-8")
        with log_file.open("w", encoding="utf-8") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "baft_easyedit.easyedit.worker", str(job_file)],
                cwd=directory,  # EasyEdit writes ./logs
                env=_environment(job),
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                encoding="utf-8",
            )
            result, timed_out = _wait(process, job["method"], timeout_s, progress)
        if result is not None:
            return result
        tail = log_file.read_text(encoding="utf-8", errors="replace")[-_TAIL:]
        reason = f"its process ended with exit code {process.returncode}: {tail}"
        if timed_out:
            reason = f"took more than {timeout_s:g} s"
        return RunResult(method=job["method"], protocol=job["protocol"], error=reason)


def _wait(
    process: "subprocess.Popen[str]", method: str, timeout_s: float, progress: Progress | None
) -> tuple[RunResult | None, bool]:
    """Return a worker's result, and whether it was killed for taking too long."""
    timer = threading.Timer(timeout_s, process.kill)
    timer.start()
    with process:
        try:
            result = _listen(process.stdout, method, progress)  # type: ignore[arg-type]
            timed_out = not timer.is_alive()
        except BaseException:  # such as an interrupt: leave no process behind
            process.kill()
            raise
        finally:
            timer.cancel()
    return result, timed_out


def _listen(events: IO[str], method: str, progress: Progress | None) -> RunResult | None:
    """Pass a worker's progress on, and return its result; None if it ended without one."""
    for line in events:
        event = json.loads(line)
        if "result" in event:
            return RunResult.from_dict(event["result"])
        if progress is not None:
            progress(method, event["done"], event["total"], event["case"])
    return None


def _absolute(model_path: str) -> str:
    """Return a directory's absolute path; a Hugging Face name as it is."""
    return str(Path(model_path).absolute()) if Path(model_path).is_dir() else model_path


def _environment(job: Mapping[str, Any]) -> dict[str, str]:
    """Return the environment of a worker: this package importable, no tokenizer threads."""
    root = str(Path(baft_easyedit.__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    environment = {
        **os.environ,
        "PYTHONPATH": path,
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": str(job["threads"]),
    }
    if Path(job["model_path"]).is_dir():
        # A peer that reaches for the Hugging Face hub anyway should fail at once.
        environment["HF_HUB_OFFLINE"] = "1"
    return environment
