"""The results of a speed run: samples, medians and ratios, as text and JSON."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from baft_easyedit.bench.provenance import git_state, hardware, versions
from baft_easyedit.speed.measure import Sample
from baft_easyedit.speed.options import MEASURED_ENGINES, Row, SpeedOptions

SCHEMA = 2
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
"""Columns of the table, by title: a column of `SpeedReport.summary`, and its number format."""


@dataclass
class RowResult:
    """The measurements of one row."""

    row: Row
    samples: list[Sample] = field(default_factory=list)  # warm edits: all but the first
    first: Sample | None = None  # the process's first edit of this row
    notes: Sequence[str] = ()
    error: str | None = None  # why there are not as many samples as there should be
    profile: str | None = None  # where the time of an edit goes, a kernel or operator a line

    def add(
        self, sample: Sample | None, error: str | None, notes: Sequence[str], profile: str | None
    ) -> None:
        """Keep the values that a process yielded; the first sample is kept apart."""
        self.error, self.notes, self.profile = error, notes, profile
        if sample is not None and self.first is None:
            self.first = sample
        elif sample is not None:
            self.samples.append(sample)


@dataclass
class SpeedReport:
    """All that a speed run measured."""

    options: SpeedOptions
    rows: list[RowResult]
    files: list[Path] = field(default_factory=list)  # the files that `write` has written

    def summary(self) -> pd.DataFrame:
        """Return each row's medians and ratios, by its name; NaN where nothing was measured.

        Returns:
            Medians of warm edits by `Sample`'s names, but `peak_bytes`, the most of all edits;
            `first_s`, the seconds of the first edit; `generation_ratio`, tokens per second with the
            edit over those without; `step_to_bound`; and `edit_ratio` and `step_ratio`, the row's
            times over those of BaFT's default engine.
        """
        names = [r.row.name for r in self.rows]
        first = _frame((r, [r.first] if r.first else []) for r in self.rows)
        warm = _frame((r, r.samples) for r in self.rows)
        found = warm.groupby(level=0).median().reindex(names)
        found["first_s"] = first["edit_s"]
        found["peak_bytes"] = pd.concat([first, warm]).groupby(level=0)["peak_bytes"].max()
        found["generation_ratio"] = found["edited_tokens_per_s"] / found["unedited_tokens_per_s"]
        found["step_to_bound"] = found["step_s"] / found["bound_s"]
        base = found.reindex([f"BaFT-{MEASURED_ENGINES[0]}"]).iloc[0]
        found["edit_ratio"] = found["edit_s"] / base["edit_s"]
        found["step_ratio"] = found["step_s"] / base["step_s"]
        return found

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
        found = self.summary().loc[[r.row.name for r in self.rows if r.samples]]
        cells = pd.DataFrame(
            {
                title: found[name].map(form, na_action="ignore").fillna("-")
                for title, (name, form) in _COLUMNS.items()
                if found[name].notna().any()
            },
            index=found.index,
        )
        return cells.to_string(index_names=False).splitlines() if len(cells) else []

    @property
    def _threads(self) -> int:
        """Torch's CPU threads."""
        return self.options.threads or torch.get_num_threads()

    def as_json(self) -> dict[str, Any]:
        """Return everything as plain data, without profiles."""
        summary = self.summary().astype(object)
        summary = summary.where(summary.notna(), None)
        rows = [{**asdict(r), "summary": summary.loc[r.row.name].to_dict()} for r in self.rows]
        return {
            "schema": SCHEMA,
            "versions": versions(),
            "hardware": {**hardware(), "torch_threads": self._threads},
            "git": git_state(),
            "options": asdict(self.options),
            "rows": [{k: v for k, v in row.items() if k != "profile"} for row in rows],
        }

    def write(self, out: Path) -> None:
        """Write the JSON, and beside it the profile of each row that has one."""
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(self.as_json(), indent=1, default=str) + "\n", encoding="utf-8")
        self.files = [out]
        for result in self.rows:
            if result.profile is not None:
                self.files.append(out.with_name(f"{out.stem}-{result.row.name}-profile.txt"))
                self.files[-1].write_text(result.profile, encoding="utf-8")


def _frame(samples: Iterable[tuple[RowResult, Sequence[Sample]]]) -> pd.DataFrame:
    """Make one table of the samples of several rows, indexed by the rows' names."""
    named = [(result.row.name, asdict(sample)) for result, found in samples for sample in found]
    names = [f.name for f in fields(Sample)]
    index = pd.Index([name for name, _ in named], dtype=object)
    return pd.DataFrame([s for _, s in named], index=index, columns=names).astype(float)
