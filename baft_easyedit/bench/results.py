"""Results: the rows of a run's summary, made from its cases and read back for reports.

Reading is strict: a file that is missing, damaged or of another schema raises an error that names
it, and never becomes a gap in a table.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import ConfigDict, Field, RootModel, create_model

from baft_easyedit.bench.config import read_config
from baft_easyedit.bench.protocol import Protocol
from baft_easyedit.bench.scores import FIELD_SCORES, SCORES, row_costs, row_scores
from baft_easyedit.bench.store import Amount, RunDirectory, read_json


def summarise(directory: RunDirectory) -> list[dict[str, Any]]:
    """Average a run's cases into one row for each method and protocol that was run."""
    config = read_config(directory.config)
    rows = []
    for method in config.methods:
        for protocol in config.protocols:
            chunks = list(directory.chunks_of(method.name, protocol))
            done = [chunk for chunk in chunks if chunk["error"] is None]
            failed = [chunk for chunk in chunks if chunk["error"] is not None]
            cases = list(directory.cases_of(method.name, protocol))
            row = {
                "method": method.name,
                "model": Path(config.model).name,
                "dataset": config.data.kind,
                "protocol": protocol.name,
                **asdict(protocol),
                "n": len(cases),
                "num_failed": sum(len(chunk["indices"]) for chunk in failed),
                **row_scores(cases),
                **row_costs(done),
                "notes": _notes(done, failed),
                "error": failed[0]["error"] if failed and not done else None,
            }
            rows += [row] if chunks else []
    return rows


def _notes(done: Sequence[Mapping[str, Any]], failed: Sequence[Mapping[str, Any]]) -> list[str]:
    """Collect the notes to be reported beside a row's scores, each once."""
    notes = [note for chunk in done for note in chunk["notes"]]
    inexact = sum(chunk["restored"] is False for chunk in done)
    if inexact:
        notes.append(f"EasyEdit's restore was not exact {inexact} times: replaced by a copy")
    lengths = [len(chunk["indices"]) for chunk in done]
    if lengths and min(lengths) < max(lengths):
        notes.append(f"the last run of edits has {min(lengths)} records, the others {max(lengths)}")
    if failed and done:
        total = len(failed) + len(done)
        notes.append(f"{len(failed)} of {total} runs failed: {failed[0]['error']}")
    return list(dict.fromkeys(notes))


Case = Mapping[str, Any]
"""The content of a case's file."""
_Amount = Amount | None
_Share = Annotated[float, Field(ge=0, le=1)] | None
_Number = Annotated[float, Field(ge=-1, allow_inf_nan=False)] | None


_ROW: dict[str, Any] = {
    **dict.fromkeys(("method", "model", "dataset"), (str, ...)),
    **dict.fromkeys(("T", "batch_size"), (int, Field(ge=1))),
    "n": (int, Field(ge=0)),
    **dict.fromkeys((*SCORES, "downstream_acc", "downstream_pre_acc"), (_Share, ...)),
    **{f"{name}_se": (_Amount, None) for name in (*SCORES, *FIELD_SCORES)},
    # Runs of before have none of these.
    **dict.fromkeys((*FIELD_SCORES, "harmonic_success", "pre_harmonic_success"), (_Number, None)),
    "more": (dict[str, _Number], {}),
    **dict.fromkeys(("edit_time_s", "peak_memory_bytes", "trainable_parameters"), (_Amount, ...)),
    "notes": (list[str], ...),
    "error": (str | None, ...),
}
_Row: Any = create_model("_Row", __config__=ConfigDict(strict=True), **_ROW)
"""Fields that every row of a summary has; null for what was not measured."""
_Rows = RootModel[Annotated[list[_Row], Field(min_length=1)]]


@dataclass(frozen=True)
class Result:
    """One row of a summary: scores and cost of one method under one protocol."""

    method: str
    model: str
    dataset: str
    setting: Protocol
    error: str | None  # why there are no scores; None if there are
    values: Mapping[str, Any]  # the whole row
    directory: RunDirectory

    def number(self, name: str) -> float | None:
        """Return a number of the row; None if there is none."""
        if self.error is not None:
            return None
        return self.values.get(name, self.values.get("more", {}).get(name))

    def cases(self) -> list[Case]:
        """Read the cases behind the result, in order; empty if there are none.

        Raises:
            ValueError: If one is damaged, or they are not those that the summary counts.
        """
        cases: list[Case] = list(self.directory.cases_of(self.method, self.setting))
        if len(cases) != self.values["n"]:
            raise ValueError(
                f"{self.directory.summary} must count the cases of {self.method}, "
                f"{self.setting.slug}, of which {len(cases)} are there; got n "
                f"{self.values['n']}: run the benchmark again, which makes it anew"
            )
        return cases


@dataclass(frozen=True)
class Run:
    """A finished run."""

    directory: RunDirectory
    info: Mapping[str, Any]  # the content of `run.json`
    results: Sequence[Result]


def read_run(directory: Path) -> Run:
    """Read a run directory.

    Raises:
        ValueError: If it is not a run directory, or a file of it is damaged, incomplete or of
            another schema.
    """
    paths = RunDirectory(directory)
    for file in (paths.config, paths.run, paths.summary):
        if not file.is_file():
            raise ValueError(
                f"{directory} is not the directory of a finished run: it has no {file.name}; give "
                "one that `baft-easyedit bench` wrote, or run that to its end"
            )
    results = []
    for row in read_json(paths.summary, _Rows):
        method, model, dataset = row["method"], row["model"], row["dataset"]
        setting = Protocol(row["T"], row["batch_size"])
        results.append(Result(method, model, dataset, setting, row["error"], row, paths))
    return Run(paths, paths.record(), results)


def merge_results(runs: Sequence[Run]) -> list[Result]:
    """Return the results of several runs; equal results count once.

    Raises:
        ValueError: If two differ for the same model, data set, method and protocol.
    """
    seen: dict[Any, Result] = {}
    for result in (result for run in runs for result in run.results):
        cell = result.model, result.dataset, result.method, result.setting
        first = seen.setdefault(cell, result)
        if first.values != result.values:
            raise ValueError(
                f"{first.directory.summary} and {result.directory.summary} must not have different "
                f"numbers for {result.method}, {result.setting.slug}, {result.model}, "
                f"{result.dataset}; leave one out, or make a report of each"
            )
    return list(seen.values())


def gate_records(cases: Iterable[Case], name: str, prompt: str) -> dict[int, np.ndarray]:
    """Return a gate's `basis`, w_k, or `update`, |w_k (v_k - (R h)_k)|, on a kind of prompt.

    By layer, [cases that have the record, r]; a kind is `rewrite`, `rephrase` or `locality`.
    """
    return by_layer((case.get(name) or {}).get(prompt) for case in cases)


def by_layer(records: Iterable[Mapping[str, Sequence[float]] | None]) -> dict[int, np.ndarray]:
    """Stack one number for each basis, by layer: [records that have the layer, r]."""
    rows: dict[int, list[Sequence[float]]] = defaultdict(list)
    for record in records:
        for layer, values in (record or {}).items():
            rows[int(layer)].append(values)
    return {layer: np.array(rows[layer]) for layer in sorted(rows)}
