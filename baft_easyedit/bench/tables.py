"""A table as plain data, and as Markdown or LaTeX.

A `Table` knows nothing of runs. Here is what is best in a column, how a number is written, and how
a missing score or a method that did not run is shown.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from textwrap import shorten
from typing import NamedTuple

LATEX_PREAMBLE = r"""% The tables need these lines before \begin{document}:
%   \documentclass{article}
%   \usepackage[T1]{fontenc}
%   \usepackage{booktabs,graphicx}"""
_MISSING = "–"
_LONGEST_REASON = 75


class Column(NamedTuple):
    """A column of numbers."""

    title: str
    decimals: int = 2
    is_higher_better: bool | None = True  # None: nothing is marked in this column
    unit: float = 1.0  # what values are divided by to be shown
    heading: str = ""  # what stands above this column and its neighbours with the same heading


class Cell(NamedTuple):
    """One number, as exact as it was measured; a text is shown as it is, and is never best."""

    value: float | str | None = None  # None is shown as missing
    se: float | None = None  # standard error of the value
    paper: str = ""  # what the paper prints for this cell, if it does


@dataclass(frozen=True)
class Table:
    """A table that can be written out.

    In each column the best value is bold. Values that read the same are equal, and a column whose
    values are all equal has no best.
    """

    caption: str
    columns: Sequence[Column]
    rows: Mapping[str, Sequence[Cell] | str]  # a cell for each column, or why none


@dataclass(frozen=True)
class _Markup:
    """How texts are written in a markup language."""

    escapes: dict[int, str]
    best: str  # form of the best value
    behind: str  # form of what stands behind a value

    def text(self, text: str) -> str:
        """Return text on one line, with what would be markup escaped."""
        return " ".join(text.split()).translate(self.escapes)

    def rows(self, table: Table) -> Iterator[tuple[str, Sequence[str] | str]]:
        """Yield each row's label, and its cells or why it has none."""
        scored = [cells for cells in table.rows.values() if not isinstance(cells, str)]
        best = list(map(_best, table.columns, zip(*scored, strict=True)))
        for label, cells in table.rows.items():
            if isinstance(cells, str):
                reason = shorten(cells, _LONGEST_REASON, placeholder="…")
                yield self.text(label), self.text(f"not run: {reason}")
            else:
                columns = zip(table.columns, best, cells, strict=True)
                yield self.text(label), [self._cell(*column) for column in columns]

    def _cell(self, column: Column, best: str | None, cell: Cell) -> str:
        value = _number(column, cell.value)
        form = self.best if value == best else "{}"
        extras = [f"± {cell.se:.{column.decimals}f}"] if cell.se is not None else []
        extras += [f"[{cell.paper}]"] if cell.paper else []
        behind = "".join(self.behind.format(self.text(extra)) for extra in extras)
        return form.format(self.text(value)) + behind


def _best(column: Column, cells: Sequence[Cell]) -> str | None:
    """Return how the best value of a column reads; None if there is none."""
    numbers = [cell.value for cell in cells if not isinstance(cell.value, str | None)]
    shown = {_number(column, value): value for value in numbers}
    if column.is_higher_better is None or len(shown) < 2:
        return None
    return (max if column.is_higher_better else min)(shown, key=shown.__getitem__)


def _number(column: Column, value: float | str | None) -> str:
    if value is None:
        return _MISSING
    return value if isinstance(value, str) else f"{value / column.unit:,.{column.decimals}f}"


_MARKDOWN = _Markup(
    str.maketrans({character: "\\" + character for character in "\\|*<>`"}), "**{}**", " {}"
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
        markdown_text(f"{column.heading}: {column.title}" if column.heading else column.title)
        for column in table.columns
    ]
    rows = list(_MARKDOWN.rows(table))
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
    """Return the line of the columns' headings and the rules under them."""
    if not any(column.heading for column in table.columns):
        return []
    line, rules, first = "", "", 2
    for heading, columns in groupby(table.columns, lambda column: column.heading):
        count = len(list(columns))
        line += rf" & \multicolumn{{{count}}}{{c}}{{{latex_text(heading)}}}"
        rules += rf"\cmidrule(lr){{{first}-{first + count - 1}}}"
        first += count
    return [line + r" \\", rules]
