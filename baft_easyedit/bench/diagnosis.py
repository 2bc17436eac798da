"""What a run says about the paper's claims: the findings of `bench.diagnostics`, and their form.

Plain data, as JSON, Markdown and a figure.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import dist
from pathlib import Path
from statistics import fmean
from typing import Any

from baft_easyedit.bench.store import write_json, write_text
from baft_easyedit.bench.tables import Cell, Column, Group, Row, Table, markdown_text
from baft_easyedit.bench.tables import to_markdown as table_markdown

SIGNIFICANCE = 0.05
"""Share of false discoveries that is accepted among the bases said to tell prompts apart."""
LEAST_GAP = 0.01
"""Mean weights that are closer than this count as equal, however sure their order is: alpha, the
weight that R_loc lets irrelevant positions keep (Liu et al. 2025, Table 5)."""

_SAME_PLACE = 0.005
"""Points of the figure that are closer than this share a label."""
_BLUE, _GREY = "#0072B2", "#BBBBBB"
_SECTIONS = {
    "balance": (
        "Load balance",
        "How unevenly the bases of a layer are used after the last edit of a sequence: coefficient "
        "of variation of wbar_k over the bases (0: alike), mean over sequences, ± its standard "
        "error.",
    ),
    "sweeps": (
        "Reliability against Locality",
        "Rows that differ in the strength of R_loc alone. Front: no other row is better in one "
        "score and at least as good in the other.",
    ),
    "separation": (
        "Gate separation",
        "Basis weights on edit prompts against irrelevant ones. By layer: AUC, the chance that an "
        "edit prompt has the larger weight (0.5: no difference), mean over bases; in brackets the "
        f"bases that are open wider on edit prompts, by {LEAST_GAP} and beyond chance "
        f"(Mann-Whitney U, at most {SIGNIFICANCE:.0%} false discoveries by Benjamini and "
        "Hochberg). Reversed: bases open wider on irrelevant prompts.",
    ),
}


@dataclass(frozen=True)
class LayerBalance:
    """How one layer's bases are used."""

    layer: int
    usage: tuple[float, ...]
    """wbar_k after the last edit, mean over chunks."""
    coefficient_of_variation: float
    """Of wbar_k over the bases, mean over chunks; so are the next two."""
    entropy: float
    """Of the bases' shares, over its largest value."""
    top_share: float
    """Share of the weight on the largest quarter of the bases."""


@dataclass(frozen=True)
class RowFinding:
    """Something about one row: a method under a protocol."""

    method: str
    protocol: str

    @property
    def name(self) -> str:
        """The row in a sentence."""
        return f"{self.method}, {self.protocol}"


@dataclass(frozen=True)
class Balance(RowFinding):
    """How a row's bases are used by its sequences of edits."""

    num_chunks: int
    coefficient_of_variation: float
    """Mean over layers and chunks."""
    coefficient_of_variation_se: float | None
    """Its standard error over chunks; None for one chunk."""
    layers: tuple[LayerBalance, ...]


@dataclass(frozen=True)
class LocalityPoint:
    """A row that differs from the others of its sweep in R_loc alone."""

    method: str
    strength: float | None
    """`locality_coef`, 0 if `locality` is off; None if the preset decides."""
    rewrite_acc: float
    rewrite_acc_se: float | None
    locality_acc: float
    locality_acc_se: float | None
    is_on_front: bool
    """Whether no other row is better in one score and at least as good in the other."""

    @property
    def label(self) -> str:
        """The strength as text."""
        return "preset" if self.strength is None else f"{self.strength:g}"


@dataclass(frozen=True)
class LocalitySweep:
    """Reliability against Locality over the strength of R_loc, under one protocol."""

    protocol: str
    settings: str
    """What else the configuration sets for these rows; empty for nothing."""
    points: tuple[LocalityPoint, ...]

    @property
    def title(self) -> str:
        """The protocol and the settings."""
        return ", ".join(filter(None, (self.protocol, self.settings)))


@dataclass(frozen=True)
class BasisTest:
    """Is a basis open wider on edit prompts than on irrelevant ones?"""

    edit_weight: float
    """Mean weight on edit prompts."""
    irrelevant_weight: float
    auc: float
    """Chance that the weight on an edit prompt exceeds that on an irrelevant one, ties half: the
    effect size. The rank-biserial correlation is 2 AUC - 1."""
    p_value: float
    """Mann-Whitney U, two-sided."""
    adjusted_p_value: float
    """After Benjamini and Hochberg, over all layers and bases of the row."""

    @property
    def is_open(self) -> bool:
        """Whether the basis is open wider on edit prompts, visibly and beyond chance."""
        gap = self.edit_weight - self.irrelevant_weight
        return self.adjusted_p_value < SIGNIFICANCE and self.auc > 0.5 and gap >= LEAST_GAP

    @property
    def is_reversed(self) -> bool:
        """Whether the basis is open wider on irrelevant prompts, visibly and beyond chance."""
        gap = self.irrelevant_weight - self.edit_weight
        return self.adjusted_p_value < SIGNIFICANCE and self.auc < 0.5 and gap >= LEAST_GAP


@dataclass(frozen=True)
class LayerSeparation:
    """The tests of one layer."""

    layer: int
    bases: tuple[BasisTest, ...]


@dataclass(frozen=True)
class Separation(RowFinding):
    """The tests of one row.

    They take prompts as independent, which flatters a row of few chunks: the prompts of a chunk
    share one gate.
    """

    num_edit: int
    num_irrelevant: int
    layers: tuple[LayerSeparation, ...]

    @property
    def bases(self) -> tuple[BasisTest, ...]:
        """The bases of all layers."""
        return tuple(basis for layer in self.layers for basis in layer.bases)

    @property
    def mean_auc(self) -> float:
        """Mean AUC of all bases."""
        return fmean(basis.auc for basis in self.bases)


@dataclass(frozen=True)
class Diagnosis:
    """What a run says about the paper's claims."""

    run: str
    """Name of the run's directory."""
    warnings: tuple[str, ...]
    """Signs of failure, each with what to try."""
    balance: tuple[Balance, ...]
    sweeps: tuple[LocalitySweep, ...]
    separation: tuple[Separation, ...]
    remarks: Mapping[str, tuple[str, ...]]
    """What is missing or was skipped, under the name of the field that it concerns."""

    def to_dict(self) -> dict[str, Any]:
        """Return all figures as JSON values."""
        return json.loads(json.dumps(asdict(self)))

    def to_markdown(self) -> str:
        """Return the diagnosis as text: warnings first, then a section for each claim."""
        parts = [f"# Diagnosis of {markdown_text(self.run)}", "## Warnings"]
        parts += _items(self.warnings) or ["No sign of failure was found."]
        parts += _items(self.remarks["warnings"])
        tables = {
            "balance": _balance_tables(self.balance),
            "sweeps": [_sweep_table(sweep) for sweep in self.sweeps],
            "separation": _separation_tables(self.separation),
        }
        for name, (title, explanation) in _SECTIONS.items():
            parts.append(f"## {title}")
            if tables[name]:
                parts += [explanation, *map(table_markdown, tables[name])]
            parts += _items(self.remarks[name])
        return "\n\n".join(parts) + "\n"


def _items(texts: Iterable[str]) -> list[str]:
    """Return texts as one Markdown list; nothing for none."""
    items = "\n".join(f"- {markdown_text(text)}" for text in texts)
    return [items] if items else []


def _balance_tables(balance: Sequence[Balance]) -> list[Table]:
    """Return one table of all rows side by side."""
    if not balance:
        return []
    layers = sorted({layer.layer for row in balance for layer in row.layers})
    columns = (
        Column("sequences", 0),
        *(Column(f"layer {layer}") for layer in layers),
        Column("all layers"),
        Column("entropy"),
        Column("share of the largest quarter"),
    )
    rows = tuple(Row(row.name, _balance_cells(row, layers)) for row in balance)
    return [Table("Coefficient of variation of basis use", (Group("", columns),), rows)]


def _balance_cells(row: Balance, layers: Sequence[int]) -> tuple[Cell, ...]:
    """Return a row's figures of basis use; of entropy and share the mean over layers."""
    by_layer = {layer.layer: layer.coefficient_of_variation for layer in row.layers}
    return (
        Cell(row.num_chunks),
        *(Cell(by_layer.get(layer)) for layer in layers),
        Cell(row.coefficient_of_variation, row.coefficient_of_variation_se),
        Cell(fmean(layer.entropy for layer in row.layers)),
        Cell(fmean(layer.top_share for layer in row.layers)),
    )


def _sweep_table(sweep: LocalitySweep) -> Table:
    """Return the points of a sweep by strength."""
    columns = (Column("R_loc strength"), Column("Rel"), Column("Loc"), Column("front"))
    rows = tuple(
        Row(
            point.method,
            (
                Cell(text=point.label),
                Cell(point.rewrite_acc, point.rewrite_acc_se),
                Cell(point.locality_acc, point.locality_acc_se),
                Cell(text="yes" if point.is_on_front else "no"),
            ),
        )
        for point in sweep.points
    )
    return Table(sweep.title, (Group("", columns),), rows)


def _separation_tables(separation: Sequence[Separation]) -> list[Table]:
    """Return one table of all rows side by side."""
    if not separation:
        return []
    layers = sorted({layer.layer for row in separation for layer in row.layers})
    columns = (
        Column("edit prompts", 0),
        Column("irrelevant", 0),
        Column("edit weight", 3),
        Column("irrelevant weight", 3),
        *(Column(f"layer {layer}") for layer in layers),
        Column("all layers"),
        Column("reversed"),
    )
    rows = tuple(Row(row.name, _separation_cells(row, layers)) for row in separation)
    return [Table("AUC of edit against irrelevant prompts", (Group("", columns),), rows)]


def _separation_cells(row: Separation, layers: Sequence[int]) -> tuple[Cell, ...]:
    """Return a row's tests, by layer and over all of them."""
    by_layer = {layer.layer: layer.bases for layer in row.layers}
    return (
        Cell(row.num_edit),
        Cell(row.num_irrelevant),
        Cell(fmean(basis.edit_weight for basis in row.bases)),
        Cell(fmean(basis.irrelevant_weight for basis in row.bases)),
        *(_separation_cell(by_layer.get(layer, ())) for layer in layers),
        _separation_cell(row.bases),
        Cell(text=f"{sum(basis.is_reversed for basis in row.bases)} of {len(row.bases)}"),
    )


def _separation_cell(bases: Sequence[BasisTest]) -> Cell:
    """Return the mean AUC of bases and how many of them are open wider on edit prompts."""
    if not bases:
        return Cell()
    auc, num_open = fmean(basis.auc for basis in bases), sum(basis.is_open for basis in bases)
    return Cell(text=f"{auc:.2f} ({num_open} of {len(bases)})")


def write_diagnosis(diagnosis: Diagnosis, directory: Path) -> list[Path]:
    """Write `diagnosis.json`, `diagnosis.md` and, of a sweep, `locality.png` and `.pdf`.

    Args:
        diagnosis: What `diagnose` found.
        directory: Made if missing.

    Returns:
        The files.
    """
    files = [directory / "diagnosis.json", directory / "diagnosis.md"]
    write_json(files[0], diagnosis.to_dict())
    write_text(files[1], diagnosis.to_markdown())
    if diagnosis.sweeps:
        files += draw_locality(diagnosis.sweeps, directory)
    return files


def draw_locality(sweeps: Sequence[LocalitySweep], directory: Path) -> list[Path]:
    """Draw Reliability against Locality, a panel for each sweep, as PNG and PDF.

    Args:
        sweeps: At least one.
        directory: Where `locality.png` and `locality.pdf` go; it must exist.

    Returns:
        The files.
    """
    from matplotlib.figure import Figure

    num_columns = min(3, len(sweeps))
    num_lines = -(-len(sweeps) // num_columns)
    figure = Figure(figsize=(3.2 * num_columns, 2.8 * num_lines + 0.3), layout="constrained")
    figure.suptitle("Numbers: strength of R_loc. Filled: on the Pareto front.", fontsize=8)
    panels = figure.subplots(num_lines, num_columns, squeeze=False, sharex=True, sharey=True)
    for panel, sweep in zip(panels.flat, sweeps, strict=False):
        _draw_sweep(panel, sweep)
    for panel in panels.flat[len(sweeps) :]:
        panel.set_axis_off()
    files = [directory / f"locality.{kind}" for kind in ("png", "pdf")]
    for file in files:
        figure.savefig(file, dpi=200)
    return files


def _draw_sweep(panel: Any, sweep: LocalitySweep) -> None:
    """Draw one sweep: steps along its front, every place labelled with its strengths of R_loc."""
    labels: dict[tuple[float, float], list[str]] = {}
    for point in sweep.points:
        place = (point.locality_acc, point.rewrite_acc)
        nearby = next((p for p in labels if dist(p, place) < _SAME_PLACE), place)
        labels.setdefault(nearby, []).append(point.label)
        panel.errorbar(
            *place,
            xerr=point.locality_acc_se,
            yerr=point.rewrite_acc_se,
            fmt="o",
            markersize=5,
            color=_BLUE,
            ecolor=_GREY,
            elinewidth=0.8,
            markerfacecolor=_BLUE if point.is_on_front else "white",
        )
    for place, texts in labels.items():
        text = "\n".join(texts)
        panel.annotate(text, place, xytext=(4, 4), textcoords="offset points", fontsize=7)
    front = sorted((p.locality_acc, p.rewrite_acc) for p in sweep.points if p.is_on_front)
    panel.plot(*zip(*front, strict=True), color=_BLUE, linewidth=0.8, drawstyle="steps-pre")
    panel.set_title(sweep.title, fontsize=9, wrap=True)
    panel.set(xlabel="Locality", ylabel="Reliability")
    panel.margins(0.2)
    panel.grid(color="#EEEEEE")
    panel.tick_params(labelbottom=True, labelleft=True)
