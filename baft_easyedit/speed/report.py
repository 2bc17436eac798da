"""What a speed run found: samples, medians, ratios, as text, JSON and charts."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch

from baft_easyedit.bench.provenance import easyedit_version, git_state, hardware, versions
from baft_easyedit.speed.measure import Sample
from baft_easyedit.speed.options import Row, SpeedOptions, make_rows

SCHEMA = 1
_MIB = 1 << 20


def environment(options: SpeedOptions) -> dict[str, Any]:
    """Return what the numbers of a run are made with and on."""
    threads = options.threads or torch.get_num_threads()
    made: dict[str, Any] = {
        "versions": versions(),
        "hardware": {**hardware(), "torch_threads": threads},
        "git": git_state(),
    }
    if not all(row.is_ours for row in make_rows(options)):
        try:
            made["easyedit"] = easyedit_version()
        except ImportError as error:  # its rows will say so too
            made["easyedit"] = {"error": str(error)}
    return made


@dataclass
class RowResult:
    """What was measured of one row."""

    row: Row
    samples: list[Sample] = field(default_factory=list)
    warm_up: Sample | None = None
    """The first time, which counts for memory only."""
    step_bytes: int | None = None
    """Bytes of weights that a step must read; BaFT and ReFT."""
    notes: Sequence[str] = ()
    error: str | None = None
    """Why there are not as many samples as there should be."""
    profile: str | None = None
    """Where the time of an edit goes, a kernel or operator a line."""

    def median(self, name: str) -> float | None:
        """Return the median of one of `Sample`'s fields; None if it was not measured."""
        values = [getattr(sample, name) for sample in self.samples]
        known = [value for value in values if value is not None]
        return median(known) if known else None

    @property
    def peak_bytes(self) -> int | None:
        """The highest peak of memory of all edits, that which warmed up too."""
        samples = [*self.samples, *([self.warm_up] if self.warm_up else [])]
        return max((s.peak_bytes for s in samples if s.peak_bytes is not None), default=None)

    @property
    def generation_ratio(self) -> float | None:
        """Median ratio of a sample's edited to its unedited tokens per second."""
        ratios = [
            s.edited_tokens_per_s / s.unedited_tokens_per_s
            for s in self.samples
            if s.edited_tokens_per_s is not None and s.unedited_tokens_per_s is not None
        ]
        return median(ratios) if ratios else None


@dataclass
class SpeedReport:
    """All that a speed run measured."""

    options: SpeedOptions
    environment: Mapping[str, Any]
    rows: list[RowResult]
    bandwidths: list[float] = field(default_factory=list)
    """Bytes per second that the device copies, once per repeat."""
    files: list[Path] = field(default_factory=list)
    """What was written."""

    @property
    def bandwidth(self) -> float | None:
        """Median of the bandwidths, in bytes per second."""
        return median(self.bandwidths) if self.bandwidths else None

    def summary(self, result: RowResult) -> dict[str, Any]:
        """Return a row's medians and ratios; None where there is nothing to say.

        Returns:
            Medians by `Sample`'s names; `bound_s`, the seconds in which the device reads the
            weights that a step must read; `step_to_bound`; and `edit_ratio` and `step_ratio`, the
            row's time over that of BaFT's default engine in the same setting.
        """
        names = ("edit_s", "num_steps", "step_s", "edited_tokens_per_s", "unedited_tokens_per_s")
        medians = {name: result.median(name) for name in names}
        reference = self._reference(result.row)
        bound_s = _ratio(result.step_bytes, self.bandwidth)
        return {
            **medians,
            "peak_bytes": result.peak_bytes,
            "generation_ratio": result.generation_ratio,
            "bound_s": bound_s,
            "step_to_bound": _ratio(medians["step_s"], bound_s),
            "edit_ratio": _ratio(medians["edit_s"], reference.median("edit_s")),
            "step_ratio": _ratio(medians["step_s"], reference.median("step_s")),
        }

    def _reference(self, row: Row) -> RowResult:
        """Return the row that one is compared with; one without samples if there is none."""
        same = (r for r in self.rows if r.row.setting == row.setting and r.row.is_reference)
        return next(same, RowResult(row))

    def lines(self) -> list[str]:
        """Return the report as text: what was measured, and a table."""
        rows = [self._cells(r) for r in self.rows if r.samples]
        failed = [f"{r.row.name}: {r.error}" for r in self.rows if r.error]
        notes = dict.fromkeys(note for r in self.rows for note in r.notes)
        return [*self._headline(), "", *_table(rows), *failed, *notes]

    def _headline(self) -> list[str]:
        """Say what was measured on what."""
        o, made_on = self.options, self.environment["hardware"]
        model = o.model or f"{o.shape_name} with random weights"
        steps = f"at most {o.steps} steps (early stop)" if o.early_stop else f"{o.steps} steps"
        gigabytes = "not measured" if self.bandwidth is None else f"{self.bandwidth / 1e9:.1f} GB/s"
        return [
            f"{model}, {o.dtype}, device {o.device}, CPU threads {made_on['torch_threads']}",
            f"{o.texts}, batch size {o.batch_size}, rank {o.rank}, {steps} of BaFT and ReFT; "
            f"medians of {o.repeats}",
            f"copy bandwidth {gigabytes}; x bound: a step's time over that of reading the weights "
            "it must read",
        ]

    def _cells(self, result: RowResult) -> list[str]:
        """Return a row of the table."""
        s = self.summary(result)
        return [result.row.name, *(_text(s[key], form) for key, form in _COLUMNS.values())]

    def as_json(self) -> dict[str, Any]:
        """Return everything as plain data."""
        return {
            "schema": SCHEMA,
            **self.environment,
            "options": self.options.as_json(),
            "bandwidth_bytes_per_s": {"median": self.bandwidth, "samples": self.bandwidths},
            "rows": [self._row_as_json(result) for result in self.rows],
        }

    def _row_as_json(self, result: RowResult) -> dict[str, Any]:
        """Return a row as plain data; its profile is a file of its own."""
        plain = {k: v for k, v in asdict(result).items() if k != "profile"}
        return {**plain, "summary": self.summary(result)}

    def write(self, out: Path) -> None:
        """Write the JSON, and beside it profiles and a bar chart, or a line plot for each sweep."""
        from baft_easyedit.speed.charts import write_charts

        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(self.as_json(), indent=1) + "\n", encoding="utf-8")
        self.files = [out, *self._write_profiles(out), *write_charts(self, out.with_suffix(""))]

    def _write_profiles(self, out: Path) -> list[Path]:
        """Write the profile of each row that has one."""
        files = []
        for result in self.rows:
            if result.profile is not None:
                name = result.row.name.replace(" ", "-")
                files.append(out.with_name(f"{out.stem}-{name}-profile.txt"))
                files[-1].write_text(result.profile, encoding="utf-8")
        return files


_COLUMNS: Mapping[str, tuple[str, Callable[[float], str]]] = {
    "s/edit": ("edit_s", "{:.3f}".format),
    "x BaFT": ("edit_ratio", "{:.2f}".format),
    "steps": ("num_steps", "{:.0f}".format),
    "ms/step": ("step_s", lambda value: f"{value * 1e3:.2f}"),
    "x BaFT/step": ("step_ratio", "{:.2f}".format),
    "x bound": ("step_to_bound", "{:.2f}".format),
    "peak MiB": ("peak_bytes", lambda value: f"{value / _MIB:.0f}"),
    "tokens/s": ("edited_tokens_per_s", "{:.1f}".format),
    "of unedited": ("generation_ratio", "{:.3f}".format),
}
"""Of the table, after the row's name: a name of `summary`, and how it is written."""
_NOTHING = "-"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Align rows under the columns' names, numbers to the right; leave out columns of nothing."""
    columns = list(zip(["", *_COLUMNS], *rows, strict=True))
    kept = [column for column in columns if set(column[1:]) != {_NOTHING}]
    aligned = [_aligned(column, to_the_right=i > 0) for i, column in enumerate(kept)]
    return ["  ".join(cells) for cells in zip(*aligned, strict=True)]


def _aligned(cells: Sequence[str], *, to_the_right: bool) -> list[str]:
    """Make cells of one width."""
    width = max(map(len, cells))
    return [cell.rjust(width) if to_the_right else cell.ljust(width) for cell in cells]


def _text(value: float | None, form: Callable[[float], str]) -> str:
    """Return a number as text."""
    return _NOTHING if value is None else form(value)


def _ratio(value: float | None, base: float | None) -> float | None:
    """Divide, if there is something to divide by."""
    return None if value is None or not base else value / base
