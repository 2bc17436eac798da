"""Processes that measure: one for each model in memory, asked one at a time."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import baft_easyedit

_TAIL = 300


class WorkerError(ChildProcessError):
    """What a measuring process answered instead of a result."""


class Worker:
    """A process of `worker`, with a temporary working directory; a context that ends it.

    Args:
        job: What `worker.Bench` reads.
    """

    def __init__(self, job: Mapping[str, Any]) -> None:
        self.rows: Sequence[str] = [row["name"] for row in job["rows"]]
        self._scratch = tempfile.TemporaryDirectory(prefix="easyedit-")
        directory = Path(self._scratch.name)
        (directory / "job.json").write_text(json.dumps(job), encoding="utf-8")
        self._log = directory / "log.txt"
        with self._log.open("w", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "baft_easyedit.speed.worker", str(directory / "job.json")],
                cwd=directory,  # EasyEdit writes ./logs
                env=_environment(job["threads"]),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                encoding="utf-8",
            )

    def __enter__(self) -> "Worker":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.communicate()
        self._scratch.cleanup()

    def ask(self, *command: Any) -> dict[str, Any]:
        """Send a command and wait for its answer.

        Raises:
            WorkerError: If the command failed, or the process has ended.
        """
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            stdin.write(json.dumps(command) + "\n")
            stdin.flush()
        except BrokenPipeError:
            raise WorkerError(self._last_words()) from None
        line = stdout.readline()
        if not line:
            raise WorkerError(self._last_words())
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer

    def _last_words(self) -> str:
        """Say how the process ended."""
        tail = self._log.read_text(encoding="utf-8", errors="replace")[-_TAIL:].strip()
        return f"its process ended with exit code {self._process.wait()}: {tail}"


def _environment(threads: int | None) -> dict[str, str]:
    """Return the environment of a worker: this package importable, and its number of threads."""
    root = str(Path(baft_easyedit.__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"}
    return environment if threads is None else {**environment, "OMP_NUM_THREADS": str(threads)}
