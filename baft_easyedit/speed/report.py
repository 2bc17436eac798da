"""What a speed run found: samples, medians and ratios, as text and JSON."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from statistics import median
from typing import Any

import torch

from baft_easyedit.bench.provenance import git_state, hardware, versions
from baft_easyedit.speed.methods import Sample
from baft_easyedit.speed.options import MEASURED_ENGINES, Row, SpeedOptions

SCHEMA = 2


@dataclass
class RowResult:
    """What was measured of one row."""

    row: Row
    samples: list[Sample] = field(default_factory=list)
    """Warm edits."""
    first: Sample | None = None
    """The process's first edit of this row."""
    notes: Sequence[str] = ()
    error: str | None = None
    """Why there are not as many samples as there should be."""
    profile: str | None = None
    """Where the time of an edit goes, a kernel or operator a line."""

    def add(self, sample: Sample, notes: Sequence[str], profile: str | None) -> None:
        """Keep what a process answered; the first sample apart."""
        self.notes, self.profile = notes, profile
        if self.first is None:
            self.first = sample
        else:
            self.samples.append(sample)

    def median(self, name: str) -> float | None:
        """Return the median of one of `Sample`'s fields; None if it was not measured."""
        values = [getattr(sample, name) for sample in self.samples]
        return median(values) if values and None not in values else None


@dataclass
class SpeedReport:
    """All that a speed run measured."""

    options: SpeedOptions
    rows: list[RowResult]
    files: list[Path] = field(default_factory=list)
    """What was written."""

    def summary(self, result: RowResult) -> dict[str, Any]:
        """Return a row's medians and ratios; None where there is nothing to say.

        Returns:
            Medians of warm edits by `Sample`'s names, but `peak_bytes`, the most of all edits;
            `first_s`, the seconds of the first edit; `generation_ratio`, tokens per second with the
            edit over those without; `step_to_bound`; and `edit_ratio` and `step_ratio`, the row's
            times over those of BaFT's default engine.
        """
        found: dict[str, Any] = {f.name: result.median(f.name) for f in fields(Sample)}
        edits = [*result.samples, *([result.first] if result.first else [])]
        peaks = [edit.peak_bytes for edit in edits if edit.peak_bytes is not None]
        reference = ("BaFT", MEASURED_ENGINES[0])
        same = (r for r in self.rows if (r.row.method, r.row.engine) == reference)
        base = next(same, RowResult(result.row))
        return {
            **found,
            "first_s": result.first.edit_s if result.first else None,
            "peak_bytes": max(peaks, default=None),
            "generation_ratio": _ratio(
                found["edited_tokens_per_s"], found["unedited_tokens_per_s"]
            ),
            "step_to_bound": _ratio(found["step_s"], found["bound_s"]),
            "edit_ratio": _ratio(found["edit_s"], base.median("edit_s")),
            "step_ratio": _ratio(found["step_s"], base.median("step_s")),
        }

    def lines(self) -> list[str]:
        """Return the report as text: what was measured, and a table."""
        o = self.options
        model = o.model or f"{o.shape} with random weights"
        texts = f"prompt of {o.prompt_length} tokens"
        if o.data is not None:
            texts = f"{o.data.partition('=')[0]} records from {o.start} on"
        return [
            f"{model}, {o.dtype}, device {o.device}, CPU threads {self._threads}",
            f"{texts}, batch size {o.batch_size}, rank {o.rank}, {o.steps} steps of BaFT and ReFT; "
            f"medians of {o.repeats} after the first edit",
            "x bound: a step's time over that of reading the weights it must read, as fast as the "
            "device copies",
            "",
            *self._table(),
            *(f"{r.row.name}: {r.error}" for r in self.rows if r.error),
            *dict.fromkeys(note for r in self.rows for note in r.notes),
        ]

    def _table(self) -> list[str]:
        """Align the rows that have samples; leave out columns of nothing."""
        measured = [r for r in self.rows if r.samples]
        columns = [["", *(r.row.name for r in measured)]]
        for title, (name, form) in _COLUMNS.items():
            values = [self.summary(r)[name] for r in measured]
            if any(value is not None for value in values):
                cells = ["-" if value is None else form(value) for value in values]
                columns.append([title, *cells])
        widths = [max(map(len, column)) for column in columns]
        return [
            "  ".join([cells[0].ljust(widths[0]), *map(str.rjust, cells[1:], widths[1:])])
            for cells in zip(*columns, strict=True)
        ]

    @property
    def _threads(self) -> int:
        """Torch's CPU threads."""
        return self.options.threads or torch.get_num_threads()

    def as_json(self) -> dict[str, Any]:
        """Return everything as plain data, without profiles."""
        rows = [{**asdict(r), "summary": self.summary(r)} for r in self.rows]
        return {
            "schema": SCHEMA,
            "versions": versions(),
            "hardware": {**hardware(), "torch_threads": self._threads},
            "git": git_state(),
            "options": self.options.as_json(),
            "rows": [{k: v for k, v in row.items() if k != "profile"} for row in rows],
        }

    def write(self, out: Path) -> None:
        """Write the JSON, and beside it the profile of each row that has one."""
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(self.as_json(), indent=1) + "\n", encoding="utf-8")
        self.files = [out]
        for result in self.rows:
            if result.profile is not None:
                self.files.append(out.with_name(f"{out.stem}-{result.row.name}-profile.txt"))
                self.files[-1].write_text(result.profile, encoding="utf-8")


_COLUMNS: Mapping[str, tuple[str, Callable[[float], str]]] = {
    "first s": ("first_s", "{:.3f}".format),
    "s/edit": ("edit_s", "{:.3f}".format),
    "x BaFT": ("edit_ratio", "{:.2f}".format),
    "steps": ("num_steps", "{:.0f}".format),
    "ms/step": ("step_s", lambda value: f"{value * 1e3:.2f}"),
    "x BaFT/step": ("step_ratio", "{:.2f}".format),
    "x bound": ("step_to_bound", "{:.2f}".format),
    "peak MiB": ("peak_bytes", lambda value: f"{value / (1 << 20):.0f}"),
    "tokens/s": ("edited_tokens_per_s", "{:.1f}".format),
    "of unedited": ("generation_ratio", "{:.3f}".format),
}
"""Of the table, after the row's name: a name of `summary`, and how it is written."""


def _ratio(value: float | None, base: float | None) -> float | None:
    """Divide, if there is something to divide by."""
    return None if value is None or not base else value / base
