"""Run a benchmark: every method under every protocol, shared among processes, continued if killed.

accelerate says which of how many processes this is; each takes its share of the chunks and runs
one method after another (or `jobs` at once), each in a process of its own. All that is computed
lies in the run's directory; a chunk whose file is there is never run again.
"""

import importlib.util
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import timedelta
from pathlib import Path
from typing import Any

import yaml

from baft_easyedit.bench.config import BenchConfig, with_absolute_paths
from baft_easyedit.bench.data import Dataset, load_dataset
from baft_easyedit.bench.methods import check_methods
from baft_easyedit.bench.process import Progress, Workers
from baft_easyedit.bench.protocol import Chunk, chunks_of
from baft_easyedit.bench.provenance import check_same_run, run_record, with_earlier
from baft_easyedit.bench.results import summarise
from baft_easyedit.bench.store import RunDirectory, read_json, write_json, write_text
from baft_easyedit.easyedit import find_host
from baft_easyedit.easyedit.peers import why_not
from baft_easyedit.generation import model_depth
from baft_easyedit.model.devices import check_device

StartProgress = Callable[[int, int], Progress]
"""Called with the number of edits in this process's share and how many of them are done already;
returns what is called with each number of further ones."""


def run_bench(
    config: BenchConfig,
    out: Path,
    start_progress: StartProgress | None = None,
    command: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Run a benchmark, or go on with one that was stopped.

    Args:
        config: What is to be run.
        out: Directory of the run; made if absent.
        start_progress: Makes a progress bar.
        command: What was typed, to be told in `run.json`.

    Returns:
        The rows of `summary.json`; none in a process that only shares the run.

    Raises:
        ValueError: If a setting or a record is bad, the device is not on this machine, or `out`
            holds another run.
        OSError: If a file is missing.
    """
    check_methods(config)
    check_device(config.device)
    _check_tracker(config)
    model_depth(config.model)  # raises if there is no such model
    config = with_absolute_paths(config)
    data = config.data
    dataset = load_dataset(data.kind, data.path, start=data.start, limit=data.limit, **data.options)
    _check_lengths(config, len(dataset.requests))
    directory, state = RunDirectory(out), _process_state()
    check_same_run(directory, config, dataset)
    state.wait_for_everyone()
    if state.is_main_process:
        _prepare(directory, config, dataset, command)
    state.wait_for_everyone()
    chunks = [
        chunk
        for method in config.methods
        for protocol in config.protocols
        for chunk in chunks_of(method.name, protocol, len(dataset.requests))
    ]
    mine = chunks[state.process_index :: state.num_processes]
    _run_share(directory, config, mine, _device(config, state), start_progress)
    state.wait_for_everyone()
    if not state.is_main_process:
        return []
    rows = summarise(directory, dataset.kind)
    write_json(directory.summary, rows)
    write_json(directory.run, {**read_json(directory.run), "status": "success"})
    _report(config, directory, rows)
    return rows


def _check_tracker(config: BenchConfig) -> None:
    """Raise ValueError if the tracker that is asked for is not installed."""
    name = config.report_to
    if name != "none" and importlib.util.find_spec(name) is None:
        raise ValueError(f"report_to needs the package {name}, which is not installed")


def _check_lengths(config: BenchConfig, num_records: int) -> None:
    """Raise ValueError if there are not enough records for one chunk of a protocol."""
    for protocol in config.protocols:
        if protocol.length > num_records:
            raise ValueError(
                f"T times batch_size must be at most the number of records, {num_records}; got "
                f"{protocol.T} times {protocol.batch_size}"
            )


def _process_state() -> Any:
    """Return accelerate's view of the processes that share this run; one if there is no other.

    One may wait for another as long as a method needs for a thousand edits.
    """
    from accelerate import PartialState

    return PartialState(timeout=timedelta(days=30))


def _device(config: BenchConfig, state: Any) -> int | str:
    """Return the device of this process: the one asked for, or that of its rank."""
    if state.num_processes > 1 and state.device.type == "cuda" and not config.model_parallel:
        return int(state.local_process_index)
    return config.device


def _prepare(
    directory: RunDirectory, config: BenchConfig, dataset: Dataset, command: Sequence[str]
) -> None:
    """Write what a run begins with, beside what it had before."""
    record = run_record(directory, config, dataset, command)
    whole = with_earlier(directory, config).model_dump(mode="json")
    write_text(directory.config, yaml.safe_dump(whole, sort_keys=False))
    write_json(directory.requests, dataset.requests)
    write_json(directory.run, record)


def _run_share(
    directory: RunDirectory,
    config: BenchConfig,
    chunks: Sequence[Chunk],
    device: int | str,
    start_progress: StartProgress | None,
) -> None:
    """Run this process's chunks that are not complete yet, method by method."""
    chunks = [chunk for chunk in chunks if not _cannot_run(directory, config, chunk)]
    todo: dict[str, list[Chunk]] = {}
    for chunk in chunks:
        if not directory.is_complete(chunk):
            todo.setdefault(chunk.method, []).append(chunk)
    total = sum(len(chunk.indices) for chunk in chunks)
    left = sum(len(chunk.indices) for share in todo.values() for chunk in share)
    model = read_json(directory.run)["model"]
    depends_on = {
        "model": model["model"],
        "tokenizer": model["tokenizer"],
        "device": "cpu" if device == "cpu" else "cuda",
    }
    progress = start_progress(total, total - left) if start_progress is not None else None
    workers = Workers(directory, config, device, depends_on, progress or _show_nothing)
    with ThreadPoolExecutor(config.jobs) as pool:
        shares = [pool.submit(workers.run, share) for share in todo.values()]
        try:
            for done in as_completed(shares):
                done.result()
        except BaseException:  # an interrupt, or a full disk: leave no process behind
            workers.stop()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _show_nothing(_count: int) -> None:
    """Stand in for a progress bar."""


def _cannot_run(directory: RunDirectory, config: BenchConfig, chunk: Chunk) -> bool:
    """Tell whether this EasyEdit lacks a chunk's method; the chunk's file says so then."""
    method = next(m.method for m in config.methods if m.name == chunk.method)
    reason = why_not(method, find_host().generation)
    if reason is not None:
        directory.write_chunk(chunk, error=reason)
    return reason is not None


def _report(config: BenchConfig, directory: RunDirectory, rows: Sequence[dict[str, Any]]) -> None:
    """Send the rows' numbers to a tracker, through accelerate, if one is asked for."""
    if config.report_to == "none":
        return
    from accelerate import Accelerator

    accelerator = Accelerator(log_with=config.report_to, project_dir=str(directory.root))
    accelerator.init_trackers("baft_easyedit")
    for row in rows:
        place = f"{row['method']}/{row['protocol']}-B{row['batch_size']}"
        numbers = {k: v for k, v in row.items() if isinstance(v, float)}
        accelerator.log({f"{place}/{k}": v for k, v in numbers.items()}, step=row["T"])
    accelerator.end_training()
