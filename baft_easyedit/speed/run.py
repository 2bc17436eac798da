"""Run a speed measurement: processes side by side, their rows in turn, over and over.

On CUDA, BaFT and ReFT share one process and one model, and each of EasyEdit's methods has its own.
On a CPU each row has its own, as memory is counted by process, except in a sweep, which counts
none. Rows take turns in each repeat, so that a machine that slows down slows all of them.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from baft_easyedit.generation import model_depth
from baft_easyedit.model.devices import as_device, check_device
from baft_easyedit.speed.measure import Sample
from baft_easyedit.speed.options import Row, SpeedOptions, make_rows
from baft_easyedit.speed.ours import load
from baft_easyedit.speed.process import Worker, WorkerError
from baft_easyedit.speed.prompts import records
from baft_easyedit.speed.report import RowResult, SpeedReport, environment

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
        ImportError: If charts are wanted and matplotlib is not installed.
        ValueError: If the device is not on this machine, there are fewer records than are to be
            edited, or one breaks a rule.
        OSError: If the model, or the file of the records, is missing.
        WorkerError: If no row could be measured.
    """
    check_device(options.device)
    if options.model is not None:
        model_depth(options.model)  # raises if there is no such model
    if options.out is not None:
        import matplotlib  # noqa: F401  # before an hour of measuring, not after it

    rows = make_rows(options)
    requests = records(options, (options.repeats + 1) * max(row.batch_size for row in rows))
    total = len(rows) * (options.repeats + 1)
    advance = start_progress(total, 0) if start_progress else lambda _: None
    report = SpeedReport(options, environment(options), [RowResult(row) for row in rows])
    with _weights(options, rows) as weights:
        groups = _groups(options, rows)
        for together in [[group] for group in groups] if options.one_by_one else [groups]:
            with ExitStack() as stack:
                jobs = [
                    _job(options, group, weights) | {"requests": requests} for group in together
                ]
                workers = [stack.enter_context(Worker(job)) for job in jobs]
                _Measurement(report, workers, advance).run()
    if all(result.error for result in report.rows):
        raise WorkerError(f"no method could be measured: {report.rows[0].error}")
    if options.out is not None:
        report.write(options.out)
    return report


def _groups(options: SpeedOptions, rows: Sequence[Row]) -> list[list[Row]]:
    """Return which rows share a process."""
    ours = [row for row in rows if row.is_ours]
    shared = as_device(options.device).type == "cuda" or bool(options.sweeps)
    own = [row for row in rows if not row.is_ours or not shared]
    return ([ours] if shared and ours else []) + [[row] for row in own]


def _job(options: SpeedOptions, rows: Sequence[Row], weights: str | None) -> dict[str, Any]:
    """Describe what a process does.

    Args:
        options: What is measured.
        rows: Those of the process.
        weights: Where EasyEdit finds the model; None if it is not needed.
    """
    keys = ("device", "dtype", "threads", "steps", "early_stop")
    return {
        **{key: getattr(options, key) for key in keys},
        "rows": [asdict(row) for row in rows],
        "model": _model_path(options) if rows[0].is_ours else weights,
        "shape": options.shape_name,
        "new_tokens": 0 if options.sweeps else options.new_tokens,
        "meters": len(rows) == 1 or as_device(options.device).type == "cuda",
    }


def _model_path(options: SpeedOptions) -> str | None:
    """Return the model so that processes in other directories find it."""
    name = options.model
    return str(Path(name).absolute()) if name is not None and Path(name).exists() else name


@contextmanager
def _weights(options: SpeedOptions, rows: Sequence[Row]) -> Iterator[str | None]:
    """Say where EasyEdit's methods find the model; write random weights there if need be."""
    if options.model is not None or all(row.is_ours for row in rows):
        yield _model_path(options)
        return
    with tempfile.TemporaryDirectory(prefix="easyedit-", dir=options.weights_dir) as directory:
        path = Path(directory) / options.shape_name
        dtype = getattr(torch, options.dtype)
        for part in load(None, options.shape_name, torch.device("cpu"), dtype):
            part.save_pretrained(path)
        yield str(path)


class _Measurement:
    """Fills a report by asking processes in turn."""

    def __init__(
        self, report: SpeedReport, workers: Sequence[Worker], advance: Callable[[int], None]
    ) -> None:
        self._report = report
        self._workers = workers
        self._advance = advance
        self._results = {result.row.name: result for result in report.rows}

    def run(self) -> None:
        """Measure every row `repeats` times, after one time that does not count."""
        for worker in self._workers:
            self._try(worker.rows, partial(self._describe, worker))
        for repeat in range(self._report.options.repeats + 1):
            self._measure_bandwidth()
            for worker in self._workers:
                for name in worker.rows:
                    self._try([name], partial(self._measure, worker, name, repeat))
                    self._advance(1)
        for worker in self._workers:  # again, for what has been logged since
            self._try(worker.rows, partial(self._describe, worker))
            for name in worker.rows if self._report.options.profile else ():
                self._try([name], partial(self._profile, worker, name))

    def _try(self, names: Sequence[str], action: Callable[[], None]) -> None:
        """Do something for rows that have not failed; they have if it fails."""
        results = [self._results[name] for name in names]
        if any(result.error for result in results):
            return
        try:
            action()
        except WorkerError as error:
            for result in results:
                result.error = str(error)

    def _describe(self, worker: Worker) -> None:
        """Note what a process says of its rows."""
        answer = worker.ask("describe")
        for name in worker.rows:
            self._results[name].notes = answer["notes"]
            self._results[name].step_bytes = answer["step_bytes"].get(name)

    def _measure(self, worker: Worker, name: str, repeat: int) -> None:
        """Take a sample; the first one warms up, and only its memory counts."""
        sample = Sample(**worker.ask("measure", name, repeat))
        result = self._results[name]
        if repeat == 0:
            result.warm_up = sample
        else:
            result.samples.append(sample)

    def _profile(self, worker: Worker, name: str) -> None:
        """Ask where the time of a row's edit goes."""
        self._results[name].profile = worker.ask("profile", name, 0)["profile"]

    def _measure_bandwidth(self) -> None:
        """Measure the device in the first process that works."""
        working = [w for w in self._workers if not self._results[w.rows[0]].error]
        for worker in working[:1]:
            self._try(worker.rows, partial(self._ask_bandwidth, worker))

    def _ask_bandwidth(self, worker: Worker) -> None:
        """Note how fast the device copies."""
        self._report.bandwidths.append(worker.ask("bandwidth")["bytes_per_s"])
