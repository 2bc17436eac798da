"""Run directories, read back: what was run, the summary's rows, and the cases behind them.

Reading is strict: a file that is missing, damaged or of another schema is an error that names it,
never a gap in a table.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baft_easyedit.bench.plan import Protocol
from baft_easyedit.bench.scores import SCORES
from baft_easyedit.bench.store import RunDirectory, read_json

TEACHER_FORCED = ("rewrite_acc", "rephrase_acc", "locality_acc", "portability_acc")
"""Reliability, generality, locality and portability by EasyEdit's evaluators."""
GENERATED = tuple(f"gen_{name}" for name in TEACHER_FORCED)
"""The same of generated text: greedy, natural stop, exact match."""
_SHARES = (*SCORES, "downstream_acc", "downstream_pre_acc")
_AMOUNTS = ("edit_time_s", "peak_memory_bytes", "trainable_parameters")


@dataclass(frozen=True)
class Result:
    """One row of a summary: scores and cost of one method under one protocol."""

    method: str
    model: str
    dataset: str
    setting: Protocol
    error: str | None
    """Why there are no scores; None if there are."""
    values: Mapping[str, Any]
    """The whole row."""
    directory: Path
    """The run's directory."""

    @property
    def cell(self) -> tuple[str, str, str, Protocol]:
        """What no two results of a report may share."""
        return self.model, self.dataset, self.method, self.setting

    @property
    def notes(self) -> tuple[str, ...]:
        """What differs from plain EasyEdit."""
        return tuple(self.values.get("notes") or ())

    def number(self, name: str) -> float | None:
        """Return a number of the row; None if it was not measured or the row has an error."""
        return None if self.error is not None else self.values[name]

    def standard_error(self, name: str) -> float | None:
        """Return the standard error of a score over the cases; None if it has none."""
        return None if self.error is not None else self.values.get(f"{name}_se")


@dataclass(frozen=True)
class Run:
    """A run directory."""

    directory: Path
    info: Mapping[str, Any]
    """The content of `run.json`."""
    results: tuple[Result, ...]


def read_run(directory: Path) -> Run:
    """Read a run directory.

    Raises:
        ValueError: If it is not a run directory, or a file of it is damaged, incomplete or of
            another schema.
    """
    paths = RunDirectory(directory)
    for file in (paths.run, paths.summary):
        if not file.is_file():
            raise ValueError(
                f"{directory} is not the directory of a finished run: it has no {file.name}; give "
                "one that `baft-easyedit bench` wrote, or run that to its end"
            )
    info, rows = read_json(paths.run), read_json(paths.summary)
    if not isinstance(info, dict):
        raise ValueError(f"{paths.run} must hold an object; got {_short(info)}; run it again")
    if not isinstance(rows, list) or not rows:
        raise ValueError(
            f"{paths.summary} must hold a list of rows; got {_short(rows)}; run it again"
        )
    return Run(directory, info, tuple(_result(paths, i, row) for i, row in enumerate(rows)))


def merge_results(runs: Sequence[Run]) -> list[Result]:
    """Return the results of several runs; those that are the same count once.

    Raises:
        ValueError: If two differ for the same model, data set, method and protocol.
    """
    seen: dict[tuple[str, str, str, Protocol], Result] = {}
    for result in (result for run in runs for result in run.results):
        first = seen.setdefault(result.cell, result)
        if first.values != result.values:
            files = [RunDirectory(r.directory).summary for r in (first, result)]
            raise ValueError(
                f"{files[0]} and {files[1]} must not have different numbers for {result.method}, "
                f"{result.setting.slug}, {result.model}, {result.dataset}; leave one out, or make "
                "a report of each"
            )
    return list(seen.values())


def read_cases(result: Result) -> list[dict[str, Any]]:
    """Read the cases behind a result, in order; empty if there are none.

    Raises:
        ValueError: If a file is damaged or of another schema.
    """
    return list(RunDirectory(result.directory).cases_of(result.method, result.setting))


def _result(paths: RunDirectory, index: int, row: Any) -> Result:
    """Check a row of a summary."""
    for name, problem in _problems(row):
        raise ValueError(f"{paths.summary}, row {index}: {name} {problem}; run the same again")
    return Result(
        method=row["method"],
        model=row["model"],
        dataset=row["dataset"],
        setting=Protocol(row["T"], row["batch_size"]),
        error=row["error"],
        values=row,
        directory=paths.root,
    )


def _problems(row: Any) -> Iterator[tuple[str, str]]:
    """Yield the fields of a row that break a rule, with the rule and the value."""
    if not isinstance(row, dict):
        yield "it", f"must be an object; got {_short(row)}"
        return
    for name in ("method", "model", "dataset"):
        if not isinstance(row.get(name), str):
            yield name, f"must be text; got {_short(row.get(name))}"
    for name in ("T", "batch_size"):
        if not isinstance(row.get(name), int) or row[name] < 1:
            yield name, f"must be an integer of at least 1; got {_short(row.get(name))}"
    if "error" not in row:
        yield "error", "must be there, null if the row has scores"
    elif row["error"] is None:
        yield from _bad_numbers(row)


def _bad_numbers(row: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the numbers of a scored row that are missing or out of range."""
    for name in ("n", *_SHARES, *_AMOUNTS):
        value, top = row.get(name), 1.0 if name in _SHARES else math.inf
        is_number = isinstance(value, (int, float)) and math.isfinite(value) and 0 <= value <= top
        if name not in row or (value is None and name == "n"):
            yield name, "must be there"
        elif value is not None and not is_number:
            yield name, f"must be null or a number from 0 to {top:g}; got {_short(value)}"


def _short(value: Any) -> str:
    """Return a value's beginning, for an error."""
    return repr(value)[:60]
