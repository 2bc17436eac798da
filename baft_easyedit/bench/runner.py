"""Run a benchmark: every method under every protocol, shared among processes, continued if killed.

accelerate says which of how many processes this is; each takes its share of the chunks and runs
one method after another (or `jobs` at once), each in a process of its own. All that is computed
lies in the run's directory; a chunk whose record is there is never run again.
"""

import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import yaml

from baft_easyedit.bench import provenance
from baft_easyedit.bench.config import BenchConfig
from baft_easyedit.bench.datasets import Dataset, load_dataset
from baft_easyedit.bench.plan import Protocol, Unit, protocols, units_of
from baft_easyedit.bench.process import run_units, write_failure
from baft_easyedit.bench.scores import row_costs, row_scores
from baft_easyedit.bench.settings import check_methods, statistics_texts
from baft_easyedit.bench.store import SCHEMA, RunDirectory, read_json, write_json, write_text
from baft_easyedit.easyedit import find_host
from baft_easyedit.easyedit.peer_methods import why_not

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
        The rows of `summary.json`.

    Raises:
        ValueError: If a setting or a record is bad, or `out` holds another run.
        OSError: If a file is missing.
    """
    check_methods(config)
    config = _with_absolute_paths(config)
    statistics_texts(config)
    data = config.data
    dataset = load_dataset(data.kind, data.path, start=data.start, limit=data.limit, **data.options)
    state = _process_state()
    directory = RunDirectory(out)
    if state.is_main_process:
        _prepare(directory, config, dataset, command)
    state.wait_for_everyone()
    units = units_of(config.methods, protocols(config), len(dataset.requests))
    mine = units[state.process_index :: state.num_processes]
    _run_share(directory, config, mine, _device(config, state), start_progress)
    state.wait_for_everyone()
    rows = summarise(directory, config, dataset.kind)
    if state.is_main_process:
        write_json(directory.summary, rows)
        _set_status(directory, "success")
        _report(config, directory, rows)
    state.wait_for_everyone()
    return rows


def _process_state() -> Any:
    """Return accelerate's view of the processes that share this run; one if there is no other."""
    from accelerate import PartialState

    return PartialState()


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
            method.model_copy(update={"hparams": absolute(method.hparams)})
            for method in config.methods
        ),
    }
    if config.downstream is not None:
        path = absolute(config.downstream.path)
        changes["downstream"] = config.downstream.model_copy(update={"path": path})
    return config.model_copy(update=changes)


def _prepare(
    directory: RunDirectory, config: BenchConfig, dataset: Dataset, command: Sequence[str]
) -> None:
    """Write what a run begins with, or check that it is the run that is to go on.

    Raises:
        ValueError: If the directory holds another run.
    """
    _check_same_run(directory, config, dataset)
    write_text(directory.config, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    write_json(directory.requests, dataset.requests)
    write_json(
        directory.run,
        {
            "schema": SCHEMA,
            "status": "running",
            "command": list(command) or sys.argv,
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "seed": config.seed,
            "git": provenance.git_state(),
            "versions": provenance.versions(),
            "easyedit": provenance.easyedit_version(),
            "hardware": provenance.hardware(),
            "model": {"name": config.model, **provenance.model_fingerprint(config.model)},
            "data": {
                "kind": dataset.kind,
                "files": [vars(file) for file in dataset.files],
                "num_records": len(dataset.requests),
                "sha256": provenance.digest(dataset.requests),
                "notes": list(dataset.notes),
            },
        },
    )


_MAY_DIFFER = ("T", "batch_size", "device", "threads", "jobs", "timeout_s", "report_to", "verify")
"""Settings that change no score: a run may go on with others, and with further rows."""


def _check_same_run(directory: RunDirectory, config: BenchConfig, dataset: Dataset) -> None:
    """Raise ValueError if a directory holds a run with other settings, records or model."""
    if not directory.run.is_file():
        return
    then = _settings(yaml.safe_load(directory.config.read_text(encoding="utf-8")))
    for name, value in _settings(config.model_dump(mode="json")).items():
        if then.get(name, value) != value:
            raise ValueError(
                f"{directory.root} holds a run with {name} {then[name]!r}; got {value!r}: give "
                "another directory, or delete that one"
            )
    run = read_json(directory.run)
    same = {
        "records": run["data"]["sha256"] == provenance.digest(dataset.requests),
        "model": run["model"]["model"] == provenance.model_fingerprint(config.model)["model"],
        "EasyEdit": run["easyedit"] == provenance.easyedit_version(),
    }
    for what, is_same in same.items():
        if not is_same:
            raise ValueError(
                f"{directory.root} holds a run whose {what} was another under the same name: give "
                "another directory, or delete that one"
            )


def _settings(content: dict[str, Any]) -> dict[str, Any]:
    """Return what decides the scores of a run: its settings, and each row by its name."""
    settings = {k: v for k, v in content.items() if k not in (*_MAY_DIFFER, "methods")}
    return {**settings, **{f"the row {row['name']}": row for row in content["methods"]}}


def _run_share(
    directory: RunDirectory,
    config: BenchConfig,
    units: Sequence[Unit],
    device: int | str,
    start_progress: StartProgress | None,
) -> None:
    """Run this process's chunks that have no record yet, method by method."""
    units = [unit for unit in units if not _cannot_run(directory, config, unit)]
    todo = [unit for unit in units if not _is_complete(directory, unit)]
    total, left = (sum(len(u.indices) for u in some) for some in (units, todo))
    progress = start_progress(total, total - left) if start_progress is not None else None
    run = read_json(directory.run)
    depends_on = {
        "model": run["model"]["model"],
        "tokenizer": run["model"]["tokenizer"],
        "device": "cpu" if device == "cpu" else "cuda",
    }
    with ThreadPoolExecutor(config.jobs) as pool:
        shares = [
            pool.submit(run_units, directory, config, share, depends_on, device, progress)
            for share in _by_method(config, todo)
        ]
        for share in shares:
            share.result()


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


def _is_complete(directory: RunDirectory, unit: Unit) -> bool:
    """Tell whether a chunk has been run; one that failed is tried again."""
    file = directory.chunk(unit)
    return file.is_file() and read_json(file)["error"] is None


def summarise(directory: RunDirectory, config: BenchConfig, dataset: str) -> list[dict[str, Any]]:
    """Average a run's records into one row for each method and protocol.

    Args:
        directory: The run.
        config: Its configuration.
        dataset: What the records are called in the rows.

    Raises:
        ValueError: If a record cannot be read.
    """
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
    ]


def _row(directory: RunDirectory, method: str, protocol: Protocol) -> dict[str, Any]:
    """Average the records of one row."""
    chunks = list(directory.chunks_of(method, protocol))
    done = [chunk for chunk in chunks if chunk["error"] is None]
    numbers = {chunk["chunk"] for chunk in done}
    cases = [c for c in directory.cases_of(method, protocol) if c["chunk"] in numbers]
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


def _set_status(directory: RunDirectory, status: str) -> None:
    """Say how the run ended."""
    write_json(directory.run, {**read_json(directory.run), "status": status})


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
