"""Run a benchmark: every method under every protocol, shared among processes, continued if killed.

The processes that accelerate has launched (one without it) divide the chunks among them. Each runs
its share method by method (`jobs` at once), a method in a worker process of its own. All results
are files in the run's directory, so a run that is started again skips chunks that are complete; a
chunk that failed left a file with the error, and is run again.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import timedelta
from math import ceil
from pathlib import Path
from typing import Any

import yaml

from baft_easyedit.bench.afterwards import add_scores
from baft_easyedit.bench.config import BenchConfig, with_absolute_paths
from baft_easyedit.bench.data import Dataset, load_dataset
from baft_easyedit.bench.data.files import find_file
from baft_easyedit.bench.methods import check_methods
from baft_easyedit.bench.process import Worker, WorkerError
from baft_easyedit.bench.protocol import Chunk, chunks_of
from baft_easyedit.bench.provenance import check_same_run, run_record, with_earlier
from baft_easyedit.bench.results import summarise
from baft_easyedit.bench.store import RunDirectory, write_json, write_text
from baft_easyedit.bench.worker import downstream_tasks, run_chunks
from baft_easyedit.easyedit import find_host
from baft_easyedit.easyedit.peers import why_not
from baft_easyedit.files.resources import model_location
from baft_easyedit.generation import model_depth
from baft_easyedit.model.devices import check_device

Progress = Callable[[int], None]
"""Called with the number of records that are newly edited, or that never will be."""
_LONG = 20
"""Chunks from which on a row is tried with one before it is run."""
StartProgress = Callable[[int, int], Progress]
"""Called with the number of records in this process's share, and of those that are complete
already; returns the `Progress` to call."""


def run_bench(
    config: BenchConfig,
    out: Path,
    start_progress: StartProgress | None = None,
    tell: Callable[[str], None] | None = None,
) -> list[dict[str, Any]]:
    """Run a benchmark, or continue one that was stopped.

    Args:
        config: What is to be run.
        out: Directory of the run; made if absent.
        start_progress: Makes a progress bar.
        tell: Called in the main process with what to know before a long run: how long it will take.

    Returns:
        The rows of `summary.json`; none in processes other than the main one.

    Raises:
        ValueError: If a setting or a record is bad, the device is not on this machine, or `out`
            holds another run.
        OSError: If a file is missing.
    """
    from accelerate import PartialState

    dataset = check(config)
    config, num_records = with_absolute_paths(config), len(dataset.requests)
    directory = RunDirectory(out)
    # A process may have to wait while another makes a thousand edits.
    state = PartialState(timeout=timedelta(days=30))
    check_same_run(directory, config, dataset)
    state.wait_for_everyone()
    if state.is_main_process:
        record = run_record(directory, config, dataset)
        whole = with_earlier(directory, config).model_dump(mode="json")
        write_text(directory.config, yaml.safe_dump(whole, sort_keys=False))
        write_json(directory.requests, dataset.requests)
        write_json(directory.run, record)
    state.wait_for_everyone()
    chunks = [
        chunk
        for method in config.methods
        for protocol in config.protocols
        for chunk in chunks_of(method.name, protocol, num_records)
    ]
    mine = chunks[state.process_index :: state.num_processes]
    device = config.device
    if state.num_processes > 1 and state.device.type == "cuda" and not config.model_parallel:
        device = int(state.local_process_index)
    _run_share(
        directory, config, mine, device, start_progress, tell if state.is_main_process else None
    )
    state.wait_for_everyone()
    if not state.is_main_process:
        return []
    add_scores(directory)
    rows = summarise(directory)
    write_json(directory.summary, rows)
    write_json(directory.run, {**directory.record(), "status": "success"})
    return rows


def check(config: BenchConfig) -> Dataset:
    """Check a benchmark as far as is possible without loading its model; return its records.

    Raises:
        ValueError: If a setting or a record is bad, or the device is not on this machine.
        OSError: If a file is missing.
    """
    check_methods(config)
    check_device(config.device)
    if config.downstream is not None:
        downstream_tasks(config)  # raises if there is no such task
    model_depth(config.model)  # raises if there is no such model
    if config.snippets is not None:
        find_file(Path(config.snippets), "attribute_snippets.json")
    if config.similarity_model is not None and not Path(config.similarity_model).is_dir():
        raise FileNotFoundError(
            f"similarity_model must be a directory; there is none at {config.similarity_model}"
        )
    data = config.data
    dataset = load_dataset(data.kind, data.path, start=data.start, limit=data.limit, **data.options)
    num_records = len(dataset.requests)
    for protocol in config.protocols:
        if protocol.length > num_records:
            raise ValueError(
                f"T times batch_size must be at most the number of records, {num_records}; got "
                f"{protocol.T} times {protocol.batch_size}"
            )
    return dataset


def _run_share(
    directory: RunDirectory,
    config: BenchConfig,
    chunks: Sequence[Chunk],
    device: int | str,
    start_progress: StartProgress | None,
    tell: Callable[[str], None] | None,
) -> None:
    """Run this process's chunks that are not complete yet, method by method.

    Long rows are tried with one chunk each at first, if there is somebody to tell how long all will
    take; their models are loaded twice for that.
    """
    methods = {method.name: method.method for method in config.methods}
    todo: dict[str, list[Chunk]] = {}
    generation = find_host().generation
    total = done = 0
    for chunk in chunks:
        reason = why_not(methods[chunk.method], generation)
        if reason is not None:
            directory.write_chunk(chunk, error=reason)
            continue
        total += len(chunk.indices)
        if directory.is_complete(chunk):
            done += len(chunk.indices)
        else:
            todo.setdefault(chunk.method, []).append(chunk)
    progress = start_progress(total, done) if start_progress is not None else lambda _: None
    share = _Share(directory, config, device, progress)
    if tell is not None:
        todo = _tried(share, todo, tell)
    share.run_all(list(todo.values()))


def _tried(
    share: "_Share", todo: Mapping[str, Sequence[Chunk]], tell: Callable[[str], None]
) -> dict[str, list[Chunk]]:
    """Run one chunk of each long row, tell how long the others will take, and return these."""
    first = {
        name: min(row, key=lambda chunk: len(chunk.indices))
        for name, row in todo.items()
        if len(row) >= _LONG
    }
    seconds = share.run_all([[chunk] for chunk in first.values()])
    rest = {name: [c for c in row if c != first.get(name)] for name, row in todo.items()}
    times = {
        name: taken / len(chunk.indices) * sum(len(other.indices) for other in rest[name])
        for (name, chunk), taken in zip(first.items(), seconds, strict=True)
        if share.directory.is_complete(chunk)
    }
    if times:
        whole = max(sum(times.values()) / share.config.jobs, *times.values())
        each = ", ".join(f"{name} {_spoken(time)}" for name, time in times.items())
        tell(f"about {_spoken(whole)} to go, by the first edit of each method: {each}")
    return rest


def _spoken(seconds: float) -> str:
    """Return a time in words, rounded up to minutes."""
    hours, minutes = divmod(ceil(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


class _Share:
    """Runs methods, each in a worker process of its own, and can stop all that are running."""

    def __init__(
        self, directory: RunDirectory, config: BenchConfig, device: int | str, progress: Progress
    ) -> None:
        self.directory, self.config, self._device = directory, config, device
        self._progress = progress
        self._workers: list[Worker] = []
        self._is_stopped = False

    def run_all(self, rows: Sequence[Sequence[Chunk]]) -> list[float]:
        """Run the chunks of several methods, `jobs` at once; return the seconds of each."""
        with ThreadPoolExecutor(self.config.jobs) as pool:
            running = [pool.submit(self.run, row) for row in rows]
            try:
                for row in as_completed(running):
                    row.result()
            except BaseException:  # an interrupt, or a full disk: leave no process behind
                self.stop()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return [row.result() for row in running]

    def run(self, chunks: Sequence[Chunk]) -> float:
        """Run chunks of one method; those that fail get a file that says why.

        If the worker process dies at a chunk, a new one continues with the chunk after it.

        Returns:
            The seconds since the (latest) model was loaded.

        Raises:
            InterruptedError: If the run was stopped; then nothing is written.
        """
        begun = time.monotonic()
        while chunks:
            at, num_edited = None, 0
            try:
                with self._worker(chunks) as worker:
                    for position, count in worker:
                        begun = time.monotonic() if at is None else begun
                        num_edited = count + (num_edited if position == at else 0)
                        at = position
                        self._progress(count)
                    return time.monotonic() - begun
            except WorkerError as error:
                if self._is_stopped:
                    raise InterruptedError("the run was stopped") from None
                # If it died before the first chunk, while loading, another process would too.
                for chunk in chunks if at is None else [chunks[at]]:
                    if not self.directory.is_complete(chunk):  # it may have died right after it
                        self.directory.write_chunk(chunk, error=str(error))
                        self._progress(len(chunk.indices) - num_edited)
            chunks = [] if at is None else chunks[at + 1 :]
        return time.monotonic() - begun

    def stop(self) -> None:
        """Kill all running workers, and those that are started later."""
        self._is_stopped = True
        for worker in tuple(self._workers):
            worker.process.kill()

    def _worker(self, chunks: Sequence[Chunk]) -> Worker:
        environment = {"OMP_NUM_THREADS": str(self.config.threads)}
        if Path(model_location(self.config.model)).is_dir() and self.config.downstream is None:
            # A peer that reaches for the Hugging Face hub anyway should fail at once.
            environment["HF_HUB_OFFLINE"] = "1"
        directory = RunDirectory(self.directory.root.absolute())
        worker = Worker(run_chunks, directory, chunks, self._device, **environment)
        self._workers.append(worker)
        if self._is_stopped:  # `stop` did not see this one
            worker.process.kill()
        return worker
