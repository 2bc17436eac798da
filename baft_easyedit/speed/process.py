"""Processes that measure, one for each model in memory, and what they run."""

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from baft_easyedit.generation import load_model
from baft_easyedit.model.devices import as_device
from baft_easyedit.speed.methods import Method, OurMethod, Sample, measure, profiled
from baft_easyedit.speed.options import Row, SpeedOptions
from baft_easyedit.speed.prompts import random_requests
from baft_easyedit.speed.shapes import random_model

_LOG = "log.txt"
_TAIL = 300
_NOTES: dict[str, None] = {}
"""What this package has logged in this process, such as that a model cannot use a cached prefix."""


class WorkerError(ChildProcessError):
    """What a measuring process answered instead of a result."""


@dataclass(frozen=True)
class Job:
    """One loaded model, and the rows that are measured on it."""

    options: SpeedOptions
    rows: tuple[Row, ...]
    """Several of BaFT and ReFT, or one of EasyEdit's."""
    model: str | None
    """Where the model is; None for random weights."""

    @property
    def is_peer(self) -> bool:
        """Whether EasyEdit loads the model."""
        return self.rows[0].engine is None


@contextmanager
def worker(job: Job) -> Iterator[Callable[..., Any]]:
    """Start a process with a temporary working directory; end both with the context.

    Yields:
        What runs a function of the job and more arguments in the process. Raises WorkerError if the
        function fails, or the process ends.
    """
    with (
        TemporaryDirectory(prefix="easyedit-") as directory,
        ProcessPoolExecutor(
            1, get_context("spawn"), _start, (directory, job.options.threads)
        ) as pool,
    ):

        def ask(function: Callable[..., Any], *arguments: Any) -> Any:
            try:
                return pool.submit(_try, function, job, *arguments).result()
            except BrokenProcessPool:
                log = Path(directory, _LOG).read_text(encoding="utf-8", errors="replace")
                raise WorkerError(f"its process ended: {log[-_TAIL:].strip()}") from None

        yield ask


def _start(directory: str, threads: int | None) -> None:
    """Let what EasyEdit writes and prints go to a directory, and keep what this package logs."""
    os.chdir(directory)
    log = os.open(_LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for stream in (1, 2):
        os.dup2(log, stream)
    if threads is not None:
        torch.set_num_threads(threads)
    notes = logging.Handler(logging.WARNING)
    notes.emit = lambda record: _NOTES.update({record.getMessage(): None})  # type: ignore[method-assign]
    logging.getLogger("baft_easyedit").addHandler(notes)
    # Random words in a few steps are not meant to be learned.
    logging.getLogger("baft_easyedit.training.learner").setLevel(logging.ERROR)


def _try(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function; raise whatever it raises as a text, as not every error can be sent."""
    try:
        return function(*arguments)
    # A method of EasyEdit may raise anything: its asserts, and libraries' errors.
    except Exception as error:  # noqa: BLE001
        raise WorkerError(f"{type(error).__name__}: {error}") from None


def measure_row(
    job: Job, row: Row, repeat: int, requests: Sequence[Mapping[str, Any]]
) -> tuple[Sample, list[str], str | None]:
    """Measure a row once.

    Args:
        job: Its model is loaded by the first call.
        row: One of the job's.
        repeat: Number of the measurement, which seeds random words.
        requests: What is edited; random words if there are none.

    Returns:
        The sample, what is to be noted of the process so far, and, at the last repeat, where the
        time of an edit goes, if the options ask for that.
    """
    o, method = job.options, _load(job)[row.name]
    if not requests:
        requests = random_requests(method.tokenizer, o.prompt_length, o.batch_size, repeat)
    sample = measure(method, requests, o.new_tokens)
    where = profiled(method, requests) if o.profile and repeat == o.repeats else None
    return sample, list(_NOTES), where


@cache
def _load(job: Job) -> dict[str, Method]:
    """Load a job's model; return the method of each row by the row's name."""
    if job.is_peer:
        from baft_easyedit.speed.peers import PeerMethod

        (row,) = job.rows
        peer = PeerMethod(row.method, job.model or "", job.options)
        _NOTES.update(dict.fromkeys(peer.notes))
        return {row.name: peer}
    device, dtype = as_device(job.options.device), getattr(torch, job.options.dtype)
    if job.model is None:
        model, tokenizer = random_model(job.options.shape, device, dtype)
    else:
        model, tokenizer = load_model(job.model, str(device), dtype)
    with torch.no_grad():  # what a first forward loads is no part of an edit
        model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device))
    return {row.name: OurMethod(model, tokenizer, row, job.options) for row in job.rows}
