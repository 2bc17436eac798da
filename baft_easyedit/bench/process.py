"""Run one method's chunks in a process of its own, and hear how it goes.

`worker` is what runs there. It is told its job by a JSON file, and answers in lines of JSON:

    ["start", i]      it is at chunk i of the job
    ["edited", n]     n further records of this chunk are edited, or will not be
    ["end"]           the chunk's file is written
    ["failed", why]   it cannot go on
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import baft_easyedit
from baft_easyedit.bench.config import BenchConfig
from baft_easyedit.bench.protocol import Chunk
from baft_easyedit.bench.store import RunDirectory
from baft_easyedit.files.resources import model_location

Progress = Callable[[int], None]
"""Called with a number of edits that are done, or will not be."""
_TAIL = 300
"""Characters of a dead worker's output that its rows tell."""
_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass
class Workers:
    """Starts worker processes, and can stop all that run."""

    directory: RunDirectory
    """The run, with its `config.yaml` and `requests.json`."""
    config: BenchConfig
    device: int | str
    """EasyEdit's device."""
    depends_on: Mapping[str, Any]
    """What scores of the unedited model depend on."""
    progress: Progress
    is_stopped: bool = False
    _running: set["subprocess.Popen[str]"] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self, chunks: Sequence[Chunk]) -> None:
        """Run chunks of one method; those that fail get a file that says why.

        A worker that dies at a chunk is followed by another one for those after it.

        Raises:
            InterruptedError: If the workers were stopped; then nothing is written.
        """
        while chunks:
            heard = _Events(list(chunks), self.progress)
            with tempfile.TemporaryDirectory(prefix="easyedit-") as scratch:
                job = Path(scratch) / "job.json"
                job.write_text(json.dumps(self._job(chunks)), encoding="utf-8")
                reason = self._run_worker(job, heard)
            if self.is_stopped:
                raise InterruptedError("the run was stopped")
            # Without a chunk that it was at, it never came to one, and another one would not.
            for chunk in [heard.current] if heard.current else heard.left:
                if not self.directory.is_complete(chunk):  # it may have died right after it
                    self.directory.write_chunk(chunk, error=reason)
                    self.progress(len(chunk.indices) - heard.num_edited)
            chunks = [chunk for chunk in heard.left if heard.current and chunk != heard.current]

    def stop(self) -> None:
        """Kill all workers that run, and start no more."""
        with self._lock:
            self.is_stopped = True
            for process in self._running:
                process.kill()

    def _job(self, chunks: Sequence[Chunk]) -> dict[str, Any]:
        """Describe what a worker is to do."""
        return {
            "directory": str(self.directory.root.absolute()),
            "method": chunks[0].method,
            "device": self.device,
            "depends_on": dict(self.depends_on),
            "chunks": [
                [c.protocol.T, c.protocol.batch_size, c.number, c.indices.start, c.indices.stop]
                for c in chunks
            ],
        }

    def _run_worker(self, job: Path, heard: "_Events") -> str:
        """Start a worker and listen until it ends; return why it left chunks, if it did."""
        log_file = job.with_name("log.txt")
        with log_file.open("w", encoding="utf-8") as log:
            with self._lock:
                if self.is_stopped:
                    return "the run was stopped"
                process = subprocess.Popen(
                    [sys.executable, "-m", "baft_easyedit.bench.worker", str(job)],
                    cwd=job.parent,  # EasyEdit writes ./logs
                    env=_environment(self.config),
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    encoding="utf-8",
                    start_new_session=True,  # an interrupt from the keyboard is for the run
                )
                self._running.add(process)
            try:
                with process:
                    is_late = _listen(process, heard, self.config.timeout_s)
            finally:
                with self._lock:
                    self._running.discard(process)
        if is_late:
            return f"took more than {self.config.timeout_s:g} s"
        if heard.failure is not None:
            return heard.failure
        tail = log_file.read_text(encoding="utf-8", errors="replace")[-_TAIL:].strip()
        return f"its process ended with exit code {process.returncode}: {tail}"


@dataclass
class _Events:
    """What a worker has told of the chunks of its job."""

    chunks: list[Chunk]
    progress: Progress
    current: Chunk | None = None
    """The chunk that it is at."""
    num_edited: int = 0
    """Records of that chunk that are edited."""
    failure: str | None = None

    def __post_init__(self) -> None:
        self.left = list(self.chunks)

    def listen(self, lines: Iterable[str]) -> None:
        """Hear events until there are no more."""
        for line in lines:
            match json.loads(line):
                case ["start", number]:
                    self.current, self.num_edited = self.chunks[number], 0
                case ["edited", count]:
                    self.num_edited += count
                    self.progress(count)
                case ["end"] if self.current is not None:
                    self.left.remove(self.current)
                    self.current, self.num_edited = None, 0
                case ["failed", why]:
                    self.failure = why


def _listen(process: "subprocess.Popen[str]", heard: _Events, timeout_s: float | None) -> bool:
    """Listen to a worker until it ends; return whether it was killed for taking too long."""
    is_late = threading.Event()

    def kill() -> None:
        is_late.set()
        process.kill()

    timer = threading.Timer(timeout_s or 0, kill)
    if timeout_s is not None:
        timer.start()
    try:
        heard.listen(process.stdout or ())
        process.wait()
    except BaseException:
        process.kill()
        raise
    finally:
        timer.cancel()
    return is_late.is_set()


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
