"""Run a benchmark: every method under every protocol, shared among processes, continued if killed.

accelerate says which of how many processes this is; each takes its share of the chunks and runs
one method after another (or `jobs` at once), each in a process of its own. All that is computed
lies in the run's directory; a chunk whose record is there is never run again.
"""

import importlib.util
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import timedelta
from pathlib import Path
from typing import Any

import yaml

from baft_easyedit.bench.config import BenchConfig, read_config
from baft_easyedit.bench.datasets import Dataset, load_dataset
from baft_easyedit.bench.identity import check_same_run, run_record, with_earlier
from baft_easyedit.bench.plan import Protocol, Unit, protocols, units_of
from baft_easyedit.bench.process import Workers, run_units, write_failure
from baft_easyedit.bench.scores import row_costs, row_scores
from baft_easyedit.bench.settings import check_methods
from baft_easyedit.bench.store import RunDirectory, read_json, write_json, write_text
from baft_easyedit.easyedit import find_host
from baft_easyedit.easyedit.peers import why_not
from baft_easyedit.files.resources import hparams_file
from baft_easyedit.generation import model_depth
from baft_easyedit.model.devices import check_device

StartProgress = Callable[[int, int], Callable[[int], None]]
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
        command: What was typed, for the record.

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
    config = _with_absolute_paths(config)
    data = config.data
    dataset = load_dataset(data.kind, data.path, start=data.start, limit=data.limit, **data.options)
    _check_lengths(config, len(dataset.requests))
    state = _process_state()
    directory = RunDirectory(out)
    check_same_run(directory, config, dataset)
    state.wait_for_everyone()
    if state.is_main_process:
        _prepare(directory, config, dataset, command)
    state.wait_for_everyone()
    units = units_of(config.methods, protocols(config), len(dataset.requests))
    mine = units[state.process_index :: state.num_processes]
    _run_share(directory, config, mine, _device(config, state), start_progress)
    state.wait_for_everyone()
    if not state.is_main_process:
        return []
    rows = summarise(directory, dataset.kind)
    write_json(directory.summary, rows)
    write_json(directory.run, {**read_json(directory.run), "status": "success"})
    _report(config, directory, rows)
    return rows


def _process_state() -> Any:
    """Return accelerate's view of the processes that share this run; one if there is no other.

    One may wait for another as long as a method needs for a thousand edits.
    """
    from accelerate import PartialState

    return PartialState(timeout=timedelta(days=30))


def _check_lengths(config: BenchConfig, num_records: int) -> None:
    """Raise ValueError if there are not enough records for one run of a protocol."""
    for protocol in protocols(config):
        length = protocol.T * protocol.batch_size
        if length > num_records:
            raise ValueError(
                f"T times batch_size must be at most the number of records, {num_records}; got "
                f"{protocol.T} times {protocol.batch_size}"
            )


def _device(config: BenchConfig, state: Any) -> int | str:
    """Return the device of this process: the one asked for, or that of its rank."""
    if state.num_processes > 1 and state.device.type == "cuda" and not config.model_parallel:
        return int(state.local_process_index)
    return config.device


def _with_absolute_paths(config: BenchConfig) -> BenchConfig:
    """Make the paths of a configuration independent of the working directory."""

    def absolute(path: str | None) -> str | None:
        return str(Path(path).absolute()) if path is not None and Path(path).exists() else path

    changes: dict[str, Any] = {
        "model": absolute(config.model),
        "texts": absolute(config.texts),
        "data": config.data.model_copy(update={"path": absolute(config.data.path)}),
        "methods": tuple(
            method.model_copy(update={"hparams": _absolute_yaml(method.hparams)})
            for method in config.methods
        ),
    }
    if config.downstream is not None:
        path = absolute(config.downstream.path)
        changes["downstream"] = config.downstream.model_copy(update={"path": path})
    return config.model_copy(update=changes)


def _absolute_yaml(path: str | None) -> str | None:
    """Return where a YAML of hyper-parameters lies."""
    return None if path is None else str(hparams_file(path).absolute())


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
    units: Sequence[Unit],
    device: int | str,
    start_progress: StartProgress | None,
) -> None:
    """Run this process's chunks that have no record yet, method by method."""
    units = [unit for unit in units if not _cannot_run(directory, config, unit)]
    todo = [unit for unit in units if not directory.is_complete(unit)]
    total, left = (sum(len(u.indices) for u in some) for some in (units, todo))
    progress = start_progress(total, total - left) if start_progress is not None else None
    run = read_json(directory.run)
    depends_on = {
        "model": run["model"]["model"],
        "tokenizer": run["model"]["tokenizer"],
        "device": "cpu" if device == "cpu" else "cuda",
    }
    workers = Workers()
    with ThreadPoolExecutor(config.jobs) as pool:
        shares = [
            pool.submit(run_units, directory, config, share, depends_on, device, workers, progress)
            for share in _by_method(config, todo)
        ]
        try:
            for share in as_completed(shares):
                share.result()
        except BaseException:  # an interrupt, or a full disk: leave no process behind
            workers.stop()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _cannot_run(directory: RunDirectory, config: BenchConfig, unit: Unit) -> bool:
    """Tell whether this EasyEdit lacks a chunk's method; its record says so then."""
    method = next(m.method for m in config.methods if m.name == unit.method)
    reason = why_not(method, find_host().generation)
    if reason is not None:
        write_failure(directory, unit, reason)
    return reason is not None


def _by_method(config: BenchConfig, units: Iterable[Unit]) -> list[list[Unit]]:
    """Group chunks by the row they belong to, in the order of the rows."""
    groups: dict[str, list[Unit]] = {method.name: [] for method in config.methods}
    for unit in units:
        groups[unit.method].append(unit)
    return [group for group in groups.values() if group]


def summarise(directory: RunDirectory, dataset: str) -> list[dict[str, Any]]:
    """Average a run's records into one row for each method and protocol that was run.

    Args:
        directory: The run.
        dataset: What the records are called in the rows.

    Raises:
        ValueError: If a record cannot be read.
    """
    config = read_config(directory.config)
    return [
        {
            "method": method.name,
            "model": Path(config.model).name,
            "dataset": dataset,
            "protocol": protocol.name,
            "T": protocol.T,
            "batch_size": protocol.batch_size,
            **_row(directory, method.name, protocol),
        }
        for method in config.methods
        for protocol in protocols(config)
        if any(directory.chunks_of(method.name, protocol))
    ]


def _row(directory: RunDirectory, method: str, protocol: Protocol) -> dict[str, Any]:
    """Average the records of one row."""
    chunks = list(directory.chunks_of(method, protocol))
    done = [chunk for chunk in chunks if chunk["error"] is None]
    cases = list(directory.cases_of(method, protocol))
    failed = [chunk for chunk in chunks if chunk["error"] is not None]
    return {
        "n": len(cases),
        "num_failed": sum(len(chunk["indices"]) for chunk in failed),
        **row_scores(cases),
        **_downstream(done),
        **row_costs(done),
        "notes": _notes(done, failed),
        "error": failed[0]["error"] if failed and not done else None,
    }


def _notes(done: Sequence[dict[str, Any]], failed: Sequence[dict[str, Any]]) -> list[str]:
    """Collect what is to be told beside a row's scores, each thing once."""
    notes = [note for chunk in done for note in chunk["notes"]]
    inexact = sum(chunk["restored"] is False for chunk in done)
    if inexact:
        notes.append(f"EasyEdit's restore was not exact {inexact} times: replaced by a copy")
    lengths = [len(chunk["indices"]) for chunk in done]
    if lengths and min(lengths) < max(lengths):
        notes.append(f"the last run of edits has {min(lengths)} records, the others {max(lengths)}")
    if failed and done:
        notes.append(
            f"{len(failed)} of {len(failed) + len(done)} runs failed: {failed[0]['error']}"
        )
    return list(dict.fromkeys(notes))


def _downstream(chunks: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """Average the downstream accuracies of a row's chunks."""
    asked = [chunk["downstream"] for chunk in chunks if chunk["downstream"] is not None]

    def mean(name: str) -> float | None:
        return sum(task[name] for task in asked) / len(asked) if asked else None

    return {"downstream_acc": mean("post_acc"), "downstream_pre_acc": mean("pre_acc")}


def _check_tracker(config: BenchConfig) -> None:
    """Raise ValueError if the tracker that is asked for is not installed."""
    name = config.report_to
    if name != "none" and importlib.util.find_spec(name) is None:
        raise ValueError(f"report_to needs the package {name}, which is not installed")


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
