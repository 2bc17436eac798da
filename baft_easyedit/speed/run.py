"""Run a speed measurement: processes side by side, their rows in turn, over and over.

On CUDA, BaFT and ReFT share one process and one model, and each of EasyEdit's methods has its own.
On a CPU each row has its own, as memory is counted by process. Rows take turns in each repeat, so
that a machine that slows down slows all of them.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from baft_easyedit.bench.data import load_dataset
from baft_easyedit.generation import model_depth
from baft_easyedit.model.devices import as_device, check_device
from baft_easyedit.speed.options import SpeedOptions
from baft_easyedit.speed.process import Job, WorkerError, measure_row, worker
from baft_easyedit.speed.report import RowResult, SpeedReport
from baft_easyedit.speed.shapes import random_model

StartProgress = Callable[[int, int], Callable[[int], None]]
"""Makes a progress bar of a total and a number that is done; returns what moves it."""


def run_speed(options: SpeedOptions, start_progress: StartProgress | None = None) -> SpeedReport:
    """Measure what the options ask for, and write the files that they name.

    Args:
        options: What is measured.
        start_progress: Makes a progress bar over measurements.

    Returns:
        All samples; a row that failed has the error.

    Raises:
        ValueError: If the device is not on this machine, there are fewer records than are to be
            edited, or one breaks a rule.
        OSError: If the model, or the file of the records, is missing.
        WorkerError: If no row could be measured.
    """
    check_device(options.device)
    if options.model is not None:
        model_depth(options.model)  # raises if there is no such model
    records, size = _records(options), options.batch_size
    report = SpeedReport(options, [RowResult(row) for row in options.rows])
    total = len(report.rows) * (options.repeats + 1)
    advance = start_progress(total, 0) if start_progress else lambda _: None
    with ExitStack() as stack:
        asks: dict[str, Callable[..., Any]] = {}
        for job in _jobs(options, stack):
            ask = stack.enter_context(worker(job))
            asks.update({row.name: ask for row in job.rows})
        for repeat in range(options.repeats + 1):
            for result in report.rows:
                if result.error is None:
                    requests = records[repeat * size :][:size]
                    try:
                        result.add(
                            *asks[result.row.name](measure_row, result.row, repeat, requests)
                        )
                    except WorkerError as error:
                        result.error = str(error)
                advance(1)
    if all(result.error for result in report.rows):
        raise WorkerError(f"no method could be measured: {report.rows[0].error}")
    if options.out is not None:
        report.write(options.out)
    return report


def _records(options: SpeedOptions) -> Sequence[Mapping[str, Any]]:
    """Return the records to edit; none if the options name no data."""
    if options.data is None:
        return []
    kind, _, path = options.data.partition("=")
    count = (options.repeats + 1) * options.batch_size
    return load_dataset(kind, path or None, start=options.start, limit=count).requests


def _jobs(options: SpeedOptions, stack: ExitStack) -> list[Job]:
    """Return what each process does.

    EasyEdit loads models from files: random weights are written to a temporary directory (TMPDIR
    says where), which ends with the stack.
    """
    rows, model = options.rows, options.model
    if model is not None and Path(model).exists():
        model = str(Path(model).absolute())  # processes work in other directories
    ours = [row for row in rows if row.engine is not None]
    peers = [row for row in rows if row.engine is None]
    shared = as_device(options.device).type == "cuda"
    groups = [tuple(ours)] if ours and shared else [(row,) for row in ours]
    jobs = [Job(options, group, model) for group in groups]
    if model is None and peers:
        directory = stack.enter_context(TemporaryDirectory(prefix="easyedit-"))
        model = str(Path(directory) / options.shape)
        dtype = getattr(torch, options.dtype)
        for part in random_model(options.shape, torch.device("cpu"), dtype):
            part.save_pretrained(model)
    return [*jobs, *(Job(options, (row,), model) for row in peers)]
