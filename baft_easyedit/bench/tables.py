"""A table as plain data, and as Markdown or LaTeX.

A `Table` knows nothing of runs. Here is what is best in a column, how a number is written, and how
a missing score or a method that did not run is shown.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

LATEX_PREAMBLE = r"""% The tables need these lines before \begin{document}:
%   \documentclass{article}
%   \usepackage[T1]{fontenc}
%   \usepackage{booktabs,graphicx}"""
_MISSING = "–"
_LONGEST_REASON = 50


class Column(NamedTuple):
    """A column of numbers."""

    title: str
    decimals: int = 2
    is_higher_better: bool | None = True
    """None: nothing is marked in this column."""
    unit: float = 1.0
    """What values are divided by to be shown."""


class Cell(NamedTuple):
    """One number, as exact as it was measured; a text is shown as it is, and is never best."""

    value: float | str | None = None
    """None is shown as missing."""
    se: float | None = None
    """Standard error of the value."""
    paper: str = ""
    """What the paper prints for this cell, if it does."""


@dataclass(frozen=True)
class Table:
    """A table that can be written out.

    In each column the best value is bold. Values that read the same are equal, and a column whose
    values are all equal has no best.
    """

    caption: str
    groups: Sequence[tuple[str, Sequence[Column]]]
    """Neighbouring columns under one heading, which may be empty."""
    rows: Mapping[str, Sequence[Cell] | str]
    """By label one cell for each column, or why there are none."""

    @property
    def columns(self) -> list[Column]:
        """The columns of all groups."""
        return [column for _, columns in self.groups for column in columns]


@dataclass(frozen=True)
class _Markup:
    """How texts are written in a markup language."""

    escapes: dict[int, str]
    best: str
    """Form of the best value."""
    behind: str
    """Form of what stands behind a value."""

    def text(self, text: str) -> str:
        """Return text on one line, with what would be markup escaped."""
        return " ".join(text.split()).translate(self.escapes)

    def rows(self, table: Table) -> list[tuple[str, Sequence[str] | str]]:
        """Return each row's label, and its cells or why it has none."""
        scored = {k: cells for k, cells in table.rows.items() if not isinstance(cells, str)}
        by_column = zip(table.columns, zip(*scored.values(), strict=True), strict=False)
        texts = [self._column(column, cells) for column, cells in by_column]
        written = dict(zip(scored, zip(*texts, strict=True), strict=False))
        return [
            (self.text(label), written.get(label) or self.text(f"not run: {_cut(str(cells))}"))
            for label, cells in table.rows.items()
        ]

    def _column(self, column: Column, cells: Sequence[Cell]) -> list[str]:
        """Return the texts of a column's cells."""
        best = _best(column, cells)
        written = []
        for cell in cells:
            value = self.text(text := _number(column, cell.value))
            extras = [f"± {cell.se:.{column.decimals}f}"] if cell.se is not None else []
            extras += [f"[{cell.paper}]"] if cell.paper else []
            behind = "".join(self.behind.format(self.text(extra)) for extra in extras)
            written.append((self.best.format(value) if text == best else value) + behind)
        return written


def _best(column: Column, cells: Sequence[Cell]) -> str | None:
    """Return how the best value of a column reads; None if there is none."""
    numbers = [cell.value for cell in cells if not isinstance(cell.value, str | None)]
    shown = {_number(column, value): value for value in numbers}
    if column.is_higher_better is None or len(shown) < 2:
        return None
    return (max if column.is_higher_better else min)(shown, key=shown.__getitem__)


def _number(column: Column, value: float | str | None) -> str:
    """Return a value as text."""
    if value is None:
        return _MISSING
    return value if isinstance(value, str) else f"{value / column.unit:,.{column.decimals}f}"


def _cut(reason: str) -> str:
    """Shorten a reason to the width of a table."""
    reason = " ".join(reason.split())
    return (
        reason if len(reason) <= _LONGEST_REASON else reason[: _LONGEST_REASON - 1].rstrip() + "…"
    )


_MARKDOWN = _Markup(
    str.maketrans({character: "\\" + character for character in "\\|*<>`"}),
    "**{}**",
    " {}",
)
_LATEX = _Markup(
    str.maketrans(
        {
            **{character: "\\" + character for character in "&%$#_{}"},
            "\\": r"\textbackslash{}",
            "~": r"\textasciitilde{}",
            "^": r"\textasciicircum{}",
            "<": r"\textless{}",
            ">": r"\textgreater{}",
            "–": "--",
            "…": r"\ldots{}",
            "±": r"$\pm$",
        }
    ),
    r"\textbf{{{}}}",
    r" {{\scriptsize {}}}",
)
markdown_text = _MARKDOWN.text
latex_text = _LATEX.text


def to_markdown(table: Table) -> str:
    """Write a table in GitHub's Markdown, padded so that it reads as plain text too."""
    titles = [
        markdown_text(f"{heading}: {column.title}" if heading else column.title)
        for heading, columns in table.groups
        for column in columns
    ]
    rows = _MARKDOWN.rows(table)
    scored = [(label, *cells) for label, cells in rows if not isinstance(cells, str)]
    widths = [max(map(len, column)) for column in zip(("method", *titles), *scored, strict=True)]
    widths[0] = max(widths[0], *(len(label) for label, _ in rows))
    rule = [":" + "-" * (widths[0] - 1), *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = [["method", *titles], rule]
    for label, cells in rows:
        reason = [cells, *[""] * (len(titles) - 1)] if isinstance(cells, str) else cells
        lines.append([label, *reason])
    padded = [
        f"| {' | '.join([label.ljust(widths[0]), *map(str.rjust, cells, widths[1:])])} |"
        for label, *cells in lines
    ]
    return "\n".join([f"**{markdown_text(table.caption)}**", "", *padded])


def to_latex(table: Table) -> str:
    r"""Write a table in LaTeX, with booktabs, shrunk to the width of the line if it is wider.

    What it needs before `\begin{document}` is in `LATEX_PREAMBLE`.
    """
    count = len(table.columns)
    lines = []
    for label, cells in _LATEX.rows(table):
        if isinstance(cells, str):  # stands across all columns
            cells = [rf"\multicolumn{{{count}}}{{l}}{{\scriptsize {cells}}}"]
        lines.append(" & ".join([label, *cells]) + r" \\")
    titles = ["method", *(latex_text(column.title) for column in table.columns)]
    return "\n".join(
        [
            r"\begin{table}[ht]",
            r"\centering",
            rf"\caption{{{latex_text(table.caption)}}}",
            r"\medskip",
            r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
            rf"\begin{{tabular}}{{l{'r' * count}}}",
            r"\toprule",
            *_latex_headings(table),
            " & ".join(titles) + r" \\",
            r"\midrule",
            *lines,
            r"\bottomrule",
            r"\end{tabular}}",
            r"\end{table}",
        ]
    )


def _latex_headings(table: Table) -> list[str]:
    """Return the line of the groups' headings and the rules under them."""
    if not any(heading for heading, _ in table.groups):
        return []
    headings, rules, first = [""], [], 2
    for heading, columns in table.groups:
        headings.append(rf"\multicolumn{{{len(columns)}}}{{c}}{{{latex_text(heading)}}}")
        if heading:
            rules.append(rf"\cmidrule(lr){{{first}-{first + len(columns) - 1}}}")
        first += len(columns)
    return [" & ".join(headings) + r" \\", "".join(rules)]
