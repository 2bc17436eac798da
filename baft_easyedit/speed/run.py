"""Run a speed measurement: all rows are loaded side by side, and measured in turn in each repeat.

The turns make a machine that slows down slow all rows alike. Rows run in worker processes: on CUDA,
BaFT and ReFT share one process and one model, and each of EasyEdit's methods has its own; on a CPU
each row has its own, as memory is counted by process.
"""

import logging
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from baft_easyedit.bench.data import load_dataset
from baft_easyedit.bench.process import Worker, WorkerError
from baft_easyedit.bench.run import StartProgress
from baft_easyedit.generation import load_model, model_depth
from baft_easyedit.model.devices import as_device, check_device
from baft_easyedit.speed.inputs import random_model, random_requests
from baft_easyedit.speed.measure import OurMethod, PeerMethod, Requests, Sample, measure, profiled
from baft_easyedit.speed.options import Row, SpeedOptions
from baft_easyedit.speed.report import RowResult, SpeedReport

Job = tuple[tuple[Row, ...], str | None]
"""The rows of one process, several of BaFT and ReFT or one of EasyEdit's; and where their model
is, None for random weights."""


def run_speed(options: SpeedOptions, start_progress: StartProgress | None = None) -> SpeedReport:
    """Measure the rows of the options, and write the files that the options name.

    Returns:
        All samples; a row that failed holds its error.

    Raises:
        ValueError: If the device is not on this machine, there are fewer records than are to be
            edited, or one breaks a rule.
        OSError: If the model, or the file of the records, is missing.
        WorkerError: If no row could be measured.
    """
    check_device(options.device)
    if options.model is not None:
        model_depth(options.model)  # raises if there is no such model
    records = _records(options)
    report = SpeedReport(options, [RowResult(row) for row in options.rows])
    total = len(report.rows) * (options.repeats + 1)
    advance = start_progress(total, 0) if start_progress else lambda _: None
    with ExitStack() as stack:
        workers: dict[Row, Worker] = {}
        for rows, model in _jobs(options, stack):
            worker = stack.enter_context(Worker(measurements, options, rows, model, records))
            workers |= dict.fromkeys(rows, worker)
        for _ in range(options.repeats + 1):
            for result in report.rows:
                if result.error is None:
                    try:
                        result.add(*next(workers[result.row]))
                    except WorkerError as error:
                        result.error = str(error)
                advance(1)
    if all(result.error for result in report.rows):
        raise WorkerError(f"no method could be measured: {report.rows[0].error}")
    if options.out is not None:
        report.write(options.out)
    return report


def _records(options: SpeedOptions) -> Requests:
    """Return the records to edit; none if the options name no data."""
    if options.data is None:
        return []
    kind, _, path = options.data.partition("=")
    count = (options.repeats + 1) * options.batch_size
    return load_dataset(kind, path or None, start=options.start, limit=count).requests


def _jobs(options: SpeedOptions, stack: ExitStack) -> list[Job]:
    """Return the job of each process.

    EasyEdit loads models from files, so for its methods random weights are written to a temporary
    directory (TMPDIR says where), which the stack deletes when it closes.
    """
    rows, model = options.rows, options.model
    if model is not None and Path(model).exists():
        model = str(Path(model).absolute())  # processes work in other directories
    ours = [row for row in rows if row.engine is not None]
    peers = [row for row in rows if row.engine is None]
    shared = as_device(options.device).type == "cuda"
    groups = [tuple(ours)] if ours and shared else [(row,) for row in ours]
    jobs: list[Job] = [(group, model) for group in groups]
    if model is None and peers:
        directory = stack.enter_context(TemporaryDirectory(prefix="easyedit-"))
        model = str(Path(directory) / options.shape)
        dtype = getattr(torch, options.dtype)
        for part in random_model(options.shape, torch.device("cpu"), dtype):
            part.save_pretrained(model)
    return [*jobs, *(((row,), model) for row in peers)]


def measurements(
    options: SpeedOptions, rows: tuple[Row, ...], model: str | None, records: Requests
) -> Iterator[tuple[Sample | None, str | None, list[str], str | None]]:
    """Load a job's model and measure its rows in turn; one that fails is not measured again.

    Yields:
        For each measurement, the sample or None; the error or None; notes on the process so far;
        and, at the last repeat, the profile of an edit, if the options ask for it.
    """
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    notes: dict[str, None] = {}  # warnings, such as of a model that cannot use a cached prefix
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: notes.update({record.getMessage(): None})  # type: ignore[method-assign]
    logging.getLogger("baft_easyedit").addHandler(handler)
    # A few steps are not meant to learn random words, so no warning is due if they do not.
    logging.getLogger("baft_easyedit.training.learner").setLevel(logging.ERROR)
    methods = _load(options, rows, model)
    for repeat in range(options.repeats + 1):
        for row, method in tuple(methods.items()):
            requests = records[repeat * options.batch_size :][: options.batch_size]
            notes |= dict.fromkeys(getattr(method, "notes", ()))
            sample = error = where = None
            try:
                requests = requests or random_requests(
                    method.tokenizer, options.prompt_length, options.batch_size, repeat
                )
                sample = measure(method, requests, options.new_tokens)
                if options.profile and repeat == options.repeats:
                    where = profiled(method, requests)
            # A method of EasyEdit may raise anything: its asserts, and libraries' errors.
            except Exception as failure:  # noqa: BLE001
                error = f"{type(failure).__name__}: {failure}"
                del methods[row]
            yield sample, error, list(notes), where


def _load(
    options: SpeedOptions, rows: tuple[Row, ...], model: str | None
) -> dict[Row, OurMethod | PeerMethod]:
    """Load a job's model; return the method of each row."""
    if rows[0].engine is None:
        return {rows[0]: PeerMethod(rows[0].method, model or "", options)}
    device, dtype = as_device(options.device), getattr(torch, options.dtype)
    loaded: tuple[Any, Any] = (
        random_model(options.shape, device, dtype)
        if model is None
        else load_model(model, str(device), dtype)
    )
    with torch.no_grad():  # a first forward loads kernels, whose time is not an edit's
        loaded[0](input_ids=torch.zeros(1, 1, dtype=torch.long, device=device))
    return {row: OurMethod(*loaded, row, options) for row in rows}
