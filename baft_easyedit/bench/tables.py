"""Tables as plain data, and as Markdown or LaTeX.

A `Table` knows nothing of runs: `bench.layouts` makes them. Here is what is best in a column, how a
number is written, and how a missing score or a method that did not run is shown.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

MISSING = "–"
"""What stands in a cell that has no number."""
LATEX_PREAMBLE = r"""% The tables need these lines before \begin{document}:
%   \documentclass{article}
%   \usepackage[T1]{fontenc}
%   \usepackage{booktabs,graphicx}"""

_LATEX_SPECIAL = str.maketrans(
    {
        **{character: "\\" + character for character in "&%$#_{}"},
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "–": "--",
        "—": "---",
        "…": r"\ldots{}",
        "±": r"$\pm$",
        "×": r"$\times$",
        "≥": r"$\geq$",
    }
)
_MARKDOWN_SPECIAL = str.maketrans({character: "\\" + character for character in "\\|*<>`"})

Style = Literal["plain", "best", "second"]


@dataclass(frozen=True)
class Column:
    """A column of numbers."""

    title: str
    decimals: int = 2
    is_higher_better: bool | None = True
    """None: nothing is marked in this column."""


@dataclass(frozen=True)
class Group:
    """Neighbouring columns under one heading, which may be empty."""

    title: str
    columns: tuple[Column, ...]


@dataclass(frozen=True)
class Cell:
    """One number, as exact as it was measured."""

    value: float | None = None
    """None is shown as missing."""
    se: float | None = None
    """Standard error of the value."""
    paper: str | None = None
    """What the paper prints for this cell."""
    text: str | None = None
    """Shown instead of the value; never best."""
    marks: tuple[int, ...] = ()
    """Numbers of the notes on this cell."""
    style: Style = "plain"


@dataclass(frozen=True)
class Row:
    """A method, or numbers to compare with."""

    label: str
    cells: tuple[Cell, ...]
    marks: tuple[int, ...] = ()
    """Numbers of the notes on this row."""
    error: str | None = None
    """Why the method has no number at all; shown in place of its cells."""


@dataclass(frozen=True)
class Table:
    """A table that can be written out."""

    caption: str
    header: tuple[Group, ...]
    rows: tuple[Row, ...]

    @property
    def columns(self) -> tuple[Column, ...]:
        """The columns of all groups."""
        return tuple(column for group in self.header for column in group.columns)


def make_table(caption: str, header: Sequence[Group], rows: Sequence[Row]) -> Table:
    """Build a table, with the best and the second value of each column marked.

    Values that read the same are equal: all that are best are marked so. Nothing is marked in a
    column whose values are all equal.

    Raises:
        ValueError: If a row without an error has not one cell for each column.
    """
    table = Table(caption, tuple(header), tuple(rows))
    for row in rows:
        if row.error is None and len(row.cells) != len(table.columns):
            raise ValueError(
                f"row {row.label!r} must have one cell for each of {len(table.columns)} columns; "
                f"got {len(row.cells)}"
            )
    styles = [_styles(table, i, column) for i, column in enumerate(table.columns)]
    marked = []
    for number, row in enumerate(rows):
        cells = [replace(cell, style=styles[i][number]) for i, cell in enumerate(row.cells)]
        marked.append(replace(row, cells=tuple(cells)))
    return replace(table, rows=tuple(marked))


def _styles(table: Table, index: int, column: Column) -> list[Style]:
    """Return the style of each row's cell in a column."""
    values = [row.cells[index].value if row.error is None else None for row in table.rows]
    shown = [None if value is None else round(value, column.decimals) for value in values]
    distinct = {value for value in shown if value is not None}
    if column.is_higher_better is None or len(distinct) < 2:
        return ["plain"] * len(shown)
    best, second, *_ = sorted(distinct, reverse=column.is_higher_better)
    ranks: dict[float | None, Style] = {best: "best", second: "second"}
    return [ranks.get(value, "plain") for value in shown]


def to_markdown(table: Table) -> str:
    """Write a table in GitHub's Markdown, padded so that it reads as plain text too."""
    titles = ["method"]
    for group in table.header:
        prefix = f"{group.title}: " if group.title else ""
        titles += [markdown_text(prefix + column.title) for column in group.columns]
    lines = [titles, *(_markdown_line(row, table) for row in table.rows)]
    columns = zip(*map(_measured, lines), strict=True)
    widths = [max(3, *map(len, column)) for column in columns]
    rule = [":" + "-" * (widths[0] - 1), *("-" * (width - 1) + ":" for width in widths[1:])]
    padded = []
    for line in (titles, rule, *lines[1:]):
        label, *cells = line
        texts = [label.ljust(widths[0]), *map(str.rjust, cells, widths[1:])]
        padded.append(f"| {' | '.join(texts)} |")
    return "\n".join([f"**{markdown_text(table.caption)}**", "", *padded])


def _measured(line: list[str]) -> list[str]:
    """Return what decides how wide columns are: not the reason why a method did not run."""
    return [text if not text.startswith("not run:") else "" for text in line]


def _markdown_line(row: Row, table: Table) -> list[str]:
    """Return the texts of a row's cells."""
    label = markdown_text(row.label) + _markdown_marks(row.marks)
    if row.error is not None:
        reason = markdown_text(f"not run: {row.error}")
        return [label, reason, *[""] * (len(table.columns) - 1)]
    cells = zip(row.cells, table.columns, strict=True)
    return [label, *(_markdown_cell(cell, column) for cell, column in cells)]


def _markdown_cell(cell: Cell, column: Column) -> str:
    """Return the text of one cell."""
    value, extras = _texts(cell, column)
    marked = {"plain": value, "best": f"**{value}**", "second": f"<u>{value}</u>"}[cell.style]
    return "".join([marked, *(f" {markdown_text(extra)}" for extra in extras)]) + _markdown_marks(
        cell.marks
    )


def _markdown_marks(marks: Sequence[int]) -> str:
    """Return the numbers of notes, raised."""
    return f"<sup>{', '.join(map(str, marks))}</sup>" if marks else ""


def _texts(cell: Cell, column: Column) -> tuple[str, list[str]]:
    """Return a cell's value as text, and what stands behind it."""
    if cell.text is not None:
        value = cell.text
    else:
        value = MISSING if cell.value is None else f"{cell.value:,.{column.decimals}f}"
    extras = []
    if cell.se is not None:
        extras.append(f"± {cell.se:.{column.decimals}f}")
    if cell.paper is not None:
        extras.append(f"[{cell.paper}]")
    return value, extras


def to_latex(table: Table) -> str:
    r"""Write a table in LaTeX, with booktabs, shrunk to the width of the line if it is wider.

    What it needs before `\begin{document}` is in `LATEX_PREAMBLE`.
    """
    titles = ["method", *(latex_text(column.title) for column in table.columns)]
    lines = [
        r"\begin{table}[ht]",
        r"\centering",
        rf"\caption{{{latex_text(table.caption)}}}",
        r"\medskip",
        r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
        rf"\begin{{tabular}}{{l{'r' * len(table.columns)}}}",
        r"\toprule",
        *_latex_headings(table.header),
        " & ".join(titles) + r" \\",
        r"\midrule",
        *(_latex_line(row, table) for row in table.rows),
        r"\bottomrule",
        r"\end{tabular}}",
        r"\end{table}",
    ]
    return "\n".join(lines)


def _latex_headings(header: Sequence[Group]) -> list[str]:
    """Return the line of the groups' headings and the rules under them."""
    if not any(group.title for group in header):
        return []
    headings, rules, first = [""], [], 2
    for group in header:
        last = first + len(group.columns) - 1
        headings.append(rf"\multicolumn{{{len(group.columns)}}}{{c}}{{{latex_text(group.title)}}}")
        if group.title:
            rules.append(rf"\cmidrule(lr){{{first}-{last}}}")
        first = last + 1
    return [" & ".join(headings) + r" \\", "".join(rules)]


def _latex_line(row: Row, table: Table) -> str:
    """Return the line of a row."""
    label = latex_text(row.label) + _latex_marks(row.marks)
    if row.error is not None:
        reason = latex_text(f"not run: {row.error}")
        return rf"{label} & \multicolumn{{{len(table.columns)}}}{{l}}{{\scriptsize {reason}}} \\"
    cells = zip(row.cells, table.columns, strict=True)
    return " & ".join([label, *(_latex_cell(cell, column) for cell, column in cells)]) + r" \\"


def _latex_cell(cell: Cell, column: Column) -> str:
    """Return the text of one cell."""
    value, extras = _texts(cell, column)
    value = latex_text(value)
    marked = {"plain": value, "best": rf"\textbf{{{value}}}", "second": rf"\underline{{{value}}}"}
    behind = "".join(rf" {{\scriptsize {latex_text(extra)}}}" for extra in extras)
    return marked[cell.style] + behind + _latex_marks(cell.marks)


def _latex_marks(marks: Sequence[int]) -> str:
    """Return the numbers of notes, raised."""
    return rf"\textsuperscript{{{', '.join(map(str, marks))}}}" if marks else ""


def markdown_text(text: str) -> str:
    """Return text for Markdown, on one line, with what would be markup escaped."""
    return " ".join(text.split()).translate(_MARKDOWN_SPECIAL)


def latex_text(text: str) -> str:
    """Return text for LaTeX, on one line, with special characters escaped."""
    return " ".join(text.split()).translate(_LATEX_SPECIAL)
