"""Run one method's chunks in a process of its own, and hear how it goes."""

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
from baft_easyedit.bench.config import BenchConfig
from baft_easyedit.bench.plan import Unit
from baft_easyedit.bench.store import SCHEMA, RunDirectory, write_json

Progress = Callable[[int], None]
"""Called with a number of edits that are done, or will not be."""
_TAIL = 300
_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def run_units(
    directory: RunDirectory,
    config: BenchConfig,
    units: Sequence[Unit],
    depends_on: Mapping[str, Any],
    device: int | str,
    progress: Progress | None = None,
) -> None:
    """Run chunks of one method; those that fail get a record that says why.

    Args:
        directory: The run, with its `config.yaml` and `requests.json`.
        config: The run's configuration.
        units: Chunks of one row.
        depends_on: What scores of the unedited model depend on.
        device: EasyEdit's device.
        progress: Called as edits are done.
    """
    job = {
        "directory": str(directory.root.absolute()),
        "method": units[0].method,
        "device": device,
        "depends_on": dict(depends_on),
        "units": [
            {
                "T": unit.protocol.T,
                "batch_size": unit.protocol.batch_size,
                "chunk": unit.chunk,
                "range": [unit.indices.start, unit.indices.stop],
            }
            for unit in units
        ],
    }
    todo = {unit.key: unit for unit in units}
    listener = _Listener(directory, todo, progress)
    with tempfile.TemporaryDirectory(prefix="easyedit-") as scratch:
        (Path(scratch) / "job.json").write_text(json.dumps(job), encoding="utf-8")
        reason = _run_worker(Path(scratch), config, listener)
    for unit in todo.values():
        listener.give_up(unit, reason)


def write_failure(directory: RunDirectory, unit: Unit, reason: str) -> None:
    """Write the record of a chunk that could not be run."""
    nothing = dict.fromkeys(
        ("trainable_parameters", "peak_memory_bytes", "basis_usage", "downstream", "restored")
    )
    write_json(
        directory.chunk(unit),
        {
            "schema": SCHEMA,
            "chunk": unit.chunk,
            "indices": list(unit.indices),
            "edit_times_s": [],
            **nothing,
            "notes": [],
            "error": reason,
        },
    )


class _Listener:
    """Follows a worker's events; keeps what is still to be done up to date."""

    def __init__(
        self,
        directory: RunDirectory,
        todo: dict[tuple[str, int, int, int], Unit],
        progress: Progress | None,
    ) -> None:
        self.directory = directory
        self.todo = todo
        self.failure: str | None = None
        self._progress = progress
        self._edited = 0  # edits of the chunk that is being run

    def listen(self, events: IO[str]) -> None:
        """Read events until the worker closes its output."""
        for line in events:
            event = json.loads(line)
            if "edited" in event:
                self._edited += event["edited"]
                self._advance(event["edited"])
            elif "chunk" in event:
                unit = self.todo.pop(tuple(event["chunk"]))
                if "error" in event:
                    self.give_up(unit, event["error"])
                self._edited = 0
            else:
                self.failure = event["failed"]

    def give_up(self, unit: Unit, reason: str) -> None:
        """Write the record of a chunk that could not be run."""
        write_failure(self.directory, unit, reason)
        self._advance(len(unit.indices) - self._edited)
        self._edited = 0

    def _advance(self, count: int) -> None:
        """Move the progress bar."""
        if self._progress is not None and count:
            self._progress(count)


def _run_worker(scratch: Path, config: BenchConfig, listener: _Listener) -> str:
    """Start a worker and wait for it; return why it left chunks undone, if it did."""
    log_file = scratch / "log.txt"
    with log_file.open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "baft_easyedit.bench.worker", str(scratch / "job.json")],
            cwd=scratch,  # EasyEdit writes ./logs
            env=_environment(config),
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            encoding="utf-8",
        )
        timed_out = _wait(process, config.timeout_s, listener)
    if timed_out:
        return f"took more than {config.timeout_s:g} s"
    if listener.failure is not None:
        return listener.failure
    tail = log_file.read_text(encoding="utf-8", errors="replace")[-_TAIL:].strip()
    return f"its process ended with exit code {process.returncode}: {tail}"


def _wait(process: "subprocess.Popen[str]", timeout_s: float | None, listener: _Listener) -> bool:
    """Listen to a worker until it ends; return whether it was killed for taking too long."""
    killed = threading.Event()

    def kill() -> None:
        killed.set()
        process.kill()

    timer = threading.Timer(timeout_s or 0, kill)
    if timeout_s is not None:
        timer.start()
    with process:
        try:
            listener.listen(process.stdout)  # type: ignore[arg-type]
        except BaseException:  # such as an interrupt: leave no process behind
            process.kill()
            raise
        finally:
            timer.cancel()
    return killed.is_set()


def _environment(config: BenchConfig) -> dict[str, str]:
    """Return the environment of a worker: this package importable, nothing of a launcher."""
    root = str(Path(baft_easyedit.__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    environment = {
        **{key: value for key, value in os.environ.items() if key not in _LAUNCHER},
        "PYTHONPATH": path,
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": str(config.threads),
    }
    if Path(config.model).is_dir():
        # A peer that reaches for the Hugging Face hub anyway should fail at once.
        environment["HF_HUB_OFFLINE"] = "1"
    return environment
