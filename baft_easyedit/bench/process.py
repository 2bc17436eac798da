"""Run one method's chunks in a process of its own, and hear how it goes."""

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import baft_easyedit
from baft_easyedit.bench.config import BenchConfig
from baft_easyedit.bench.plan import Unit
from baft_easyedit.bench.store import SCHEMA, RunDirectory, write_json
from baft_easyedit.files.resources import model_location

Progress = Callable[[int], None]
"""Called with a number of edits that are done, or will not be."""
_TAIL = 300
_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Workers:
    """The worker processes that run now, so that an interrupted run can leave none behind."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[str]] = set()
        self.is_stopped = False

    @contextmanager
    def started(self, command: Sequence[str], **options: Any) -> Iterator["subprocess.Popen[str]"]:
        """Start a process; wait for its end, or kill it if there is an error."""
        with self._lock:
            if self.is_stopped:
                raise InterruptedError("the run was stopped")
            # In a session of its own: an interrupt from the keyboard is for the run to handle.
            process = subprocess.Popen(command, start_new_session=True, **options)
            self._running.add(process)
        try:
            with process:
                try:
                    yield process
                except BaseException:
                    process.kill()
                    raise
        finally:
            with self._lock:
                self._running.discard(process)

    def stop(self) -> None:
        """Kill all that run, and start no more."""
        with self._lock:
            self.is_stopped = True
            for process in self._running:
                process.kill()


def run_units(
    directory: RunDirectory,
    config: BenchConfig,
    units: Sequence[Unit],
    depends_on: Mapping[str, Any],
    device: int | str,
    workers: Workers,
    progress: Progress | None = None,
) -> None:
    """Run chunks of one method; those that fail get a record that says why.

    Args:
        directory: The run, with its `config.yaml` and `requests.json`.
        config: The run's configuration.
        units: Chunks of one row.
        depends_on: What scores of the unedited model depend on.
        device: EasyEdit's device.
        workers: Where the processes are entered; once they are stopped, nothing is written.
        progress: Called as edits are done.

    Raises:
        InterruptedError: If the workers were stopped.
    """
    listener = _Listener(directory, {unit.key: unit for unit in units}, progress)
    while listener.todo:
        job = _job(directory, list(listener.todo.values()), depends_on, device)
        listener.begin()
        with tempfile.TemporaryDirectory(prefix="easyedit-") as scratch:
            (Path(scratch) / "job.json").write_text(json.dumps(job), encoding="utf-8")
            reason = _run_worker(Path(scratch), config, listener, workers)
        if workers.is_stopped:
            raise InterruptedError("the run was stopped")
        listener.blame(reason)


def _job(
    directory: RunDirectory,
    units: Sequence[Unit],
    depends_on: Mapping[str, Any],
    device: int | str,
) -> dict[str, Any]:
    """Describe what a worker is to do."""
    return {
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
        self._current: tuple[str, int, int, int] | None = None
        self._edited = 0  # edits of the current chunk

    def begin(self) -> None:
        """Forget what an earlier worker was at."""
        self.failure = self._current = None
        self._edited = 0

    def listen(self, events: IO[str]) -> None:
        """Read events until the worker closes its output."""
        for line in events:
            event = json.loads(line)
            if "started" in event:
                self._current, self._edited = tuple(event["started"]), 0
            elif "edited" in event:
                self._edited += event["edited"]
                self._advance(event["edited"])
            elif "chunk" in event:
                unit = self.todo.pop(tuple(event["chunk"]))
                if "error" in event:
                    self._give_up(unit, event["error"])
                self._current = None
            else:
                self.failure = event["failed"]

    def blame(self, reason: str) -> None:
        """Give up the chunk at which a worker ended, or all if it never came to one."""
        if self._current is not None:
            unit = self.todo.pop(self._current)
            # It may have ended after the chunk's record was written.
            if not self.directory.is_complete(unit):
                self._give_up(unit, reason)
            return
        for unit in self.todo.values():
            self._edited = 0
            self._give_up(unit, reason)
        self.todo.clear()

    def _give_up(self, unit: Unit, reason: str) -> None:
        """Write the record of a chunk that could not be run."""
        write_failure(self.directory, unit, reason)
        self._advance(len(unit.indices) - self._edited)

    def _advance(self, count: int) -> None:
        """Move the progress bar."""
        if self._progress is not None and count:
            self._progress(count)


def _run_worker(scratch: Path, config: BenchConfig, listener: _Listener, workers: Workers) -> str:
    """Start a worker and wait for it; return why it left chunks undone, if it did."""
    log_file = scratch / "log.txt"
    command = [sys.executable, "-m", "baft_easyedit.bench.worker", str(scratch / "job.json")]
    with (
        log_file.open("w", encoding="utf-8") as log,
        workers.started(
            command,
            cwd=scratch,  # EasyEdit writes ./logs
            env=_environment(config),
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            encoding="utf-8",
        ) as process,
    ):
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
    try:
        listener.listen(process.stdout)  # type: ignore[arg-type]
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
    if Path(model_location(config.model)).is_dir():
        # A peer that reaches for the Hugging Face hub anyway should fail at once.
        environment["HF_HUB_OFFLINE"] = "1"
    return environment
