"""Which tables the results of one model on one data set make.

Teacher-forced scores and scores of generated text never share a table, and each caption says which
they are and when they were taken.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

from baft_easyedit.bench.paper import PaperNumbers
from baft_easyedit.bench.protocol import Protocol
from baft_easyedit.bench.results import GENERATED, TEACHER_FORCED, Result
from baft_easyedit.bench.tables import Cell, Column, Table

_TITLES = {"rewrite": "Rel", "rephrase": "Gen", "locality": "Loc", "portability": "Por"}
_MOMENTS = {
    "single": "single edits, each of the unedited model",
    "continual": "T edits in a row, all scored after the T-th",
    "batched": "T edit calls in a row of B records each, all scored after the T-th",
}
_STYLES = {"single": "; as the paper's Table 1", "continual": "; as the paper's Table 2"}
_IMMEDIATE = (
    "T edits in a row, each scored right after itself, as EasyEdit's sequential_edit does; "
    "teacher forced; not the paper's protocol"
)
_ANY_ALIAS = (
    "portability with the best of all listed answers, where EasyEdit takes the first; teacher "
    "forced; not the paper's score"
)
_COST = (
    "cost: numbers learned or weights changed, median seconds of one record's edit without "
    "scoring, peak memory; as the paper's Table 3, whose seconds are a V100's"
)
_DOWNSTREAM = "PIQA accuracy before and after the edits; as the paper's Table 8"
_MEBIBYTE = 2**20

Columns = Mapping[str, Column]
"""By name of a number of a result."""
Printed = Callable[[Result, str], str]
"""What the paper prints for a number of a result; empty for nothing."""


def make_tables(results: Sequence[Result], paper: PaperNumbers) -> list[Table]:
    """Make all tables that results have something for.

    Args:
        results: At least one; all of the same model and data set.
        paper: What stands beside ours.
    """
    variants = [r for r in results if _is_ablation(r)]
    main = [r for r in results if not _is_ablation(r)]
    varied = {result.setting for result in variants}
    reft, baft = (
        [r for r in main if r.method == name and r.setting in varied] for name in ("ReFT", "BaFT")
    )
    return [
        *_score_tables(main, lambda r, name: paper.score(r, name, (1, 2)), "", _STYLES),
        *_score_tables(
            [*reft, *variants, *baft],
            lambda r, name: paper.score(r, name, (4,)),
            "ablation; ",
            dict.fromkeys(_MOMENTS, "; as the paper's Table 4"),
        ),
        *_more_scores(results),
        _cost_table(results, paper),
        *_downstream_table(results),
    ]


def make_notes(results: Sequence[Result]) -> list[str]:
    """Return why rows were not run and what else is to be told of some, each thing once."""
    rows: dict[str, list[Result]] = {}
    for result in results:
        told = [f"not run: {result.error}"] if result.error is not None else result.notes
        for note in told:
            rows.setdefault(note, []).append(result)
    return [f"{_named(found, results)}: {note}" for note, found in rows.items()]


def _named(found: Sequence[Result], results: Sequence[Result]) -> str:
    """Name some of the results as briefly as can be."""
    if len(found) == len([r for r in results if r.error is None or r in found]):
        return "All rows"
    names = []
    for method in dict.fromkeys(result.method for result in found):
        own = [r for r in found if r.method == method]
        others = [r for r in results if r.method == method and r.error is None and r not in found]
        titles = ", ".join(protocol_title(result.setting) for result in own)
        names.append(f"{method} ({titles})" if others else method)
    return ", ".join(names)


def protocol_title(protocol: Protocol) -> str:
    """Return what is written above the columns of a protocol."""
    batch = f"B = {protocol.batch_size}, " if protocol.name == "batched" else ""
    return f"{batch}T = {protocol.T}"


def in_order(results: Sequence[Result]) -> list[Result]:
    """Sort results from few edits to many."""
    return sorted(results, key=lambda r: (r.setting.batch_size, r.setting.T))


def _is_ablation(result: Result) -> bool:
    """Tell whether a row is an ablation of BaFT; the paper begins their names with a plus."""
    return result.method.startswith("+")


def _score_tables(
    results: Sequence[Result], printed: Printed, prefix: str, styles: Mapping[str, str]
) -> list[Table]:
    """Make two tables for each protocol: teacher forced, and of generated text."""
    made = []
    for protocol, moment in _MOMENTS.items():
        if protocol not in {result.setting.name for result in results}:
            continue
        # A row of continual scores begins with T = 1, which is single editing.
        wanted = ("single", "continual") if protocol == "continual" else (protocol,)
        shown = [result for result in results if result.setting.name in wanted]
        caption = f"{prefix}{moment}; teacher forced{styles.get(protocol, '')}"
        made.append(_table(caption, shown, _score_columns(shown, TEACHER_FORCED), printed))
        if _has(shown, GENERATED):
            caption = f"{prefix}{moment}; generated text: greedy, natural stop, exact match"
            made.append(_table(caption, shown, _score_columns(shown, GENERATED)))
    return made


def _more_scores(results: Sequence[Result]) -> list[Table]:
    """Make the tables of scores that the paper does not have."""
    continual = [result for result in results if result.setting.name == "continual"]
    asked = (
        (_IMMEDIATE, continual, ("immediate_rewrite_acc", "immediate_rephrase_acc")),
        (_ANY_ALIAS, results, ("any_alias_portability_acc",)),
    )
    return [
        _table(caption, shown, _score_columns(shown, names))
        for caption, shown, names in asked
        if _has(shown, names)
    ]


def _cost_table(results: Sequence[Result], paper: PaperNumbers) -> Table:
    """Make the table of parameters, time and memory."""
    columns = {
        "edit_time_s": Column("s/edit", is_higher_better=False),
        "peak_memory_bytes": Column("MiB", decimals=0, is_higher_better=False),
    }
    first = in_order(results)[0].setting  # the paper does not say under which it took the time
    table = _table(
        _COST, results, columns, lambda r, name: paper.cost(r, name) if r.setting == first else ""
    )
    rows = {
        label: cells if isinstance(cells, str) else [_parameters(label, results, paper), *cells]
        for label, cells in table.rows.items()
    }
    count = Column("parameters", decimals=0, is_higher_better=False)
    return Table(table.caption, [("", [count]), *table.groups], rows)


def _parameters(method: str, results: Sequence[Result], paper: PaperNumbers) -> Cell:
    """Return the cell of a method's parameters, a range if they differ between protocols."""
    rows = [r for r in results if r.method == method]
    counts = {r.number("trainable_parameters") for r in rows} - {None}
    known = sorted(count for count in counts if count is not None)
    printed = paper.cost(rows[0], "trainable_parameters")
    if len(known) > 1:
        return Cell(f"{known[0]:,.0f} to {known[-1]:,.0f}", paper=printed)
    return Cell(known[0] if known else None, paper=printed)


def _downstream_table(results: Sequence[Result]) -> list[Table]:
    """Make the table of a downstream task, with the protocols after which it was asked."""
    columns = {
        "downstream_pre_acc": Column("before", is_higher_better=None),
        "downstream_acc": Column("after"),
    }
    asked = {result.setting for result in results if _has([result], columns)}
    shown = [result for result in results if result.setting in asked]
    return [_table(_DOWNSTREAM, shown, columns)] if shown else []


def _table(
    caption: str,
    results: Sequence[Result],
    columns: Columns,
    printed: Printed | None = None,
) -> Table:
    """Make a table with a row for each method and the same columns for each protocol."""
    protocols = list(dict.fromkeys(result.setting for result in in_order(results)))
    found = {(result.method, result.setting): result for result in results}
    rows = {
        method: _row([found.get((method, p)) for p in protocols], columns, printed)
        for method in dict.fromkeys(result.method for result in results)
    }
    is_plain = protocols == [Protocol()]
    groups = [("" if is_plain else protocol_title(p), list(columns.values())) for p in protocols]
    where = f"{results[0].model} on {results[0].dataset}"
    return Table(f"{where}: {caption}; {_counted(results)}", groups, rows)


def _row(
    blocks: Sequence[Result | None], columns: Columns, printed: Printed | None
) -> Sequence[Cell] | str:
    """Return the cells of a method; None stands for a protocol that was not asked for."""
    reasons = {result.error for result in blocks if result is not None}
    if len(reasons) == 1 and (reason := reasons.pop()) is not None:
        return reason
    cells: list[Cell] = []
    for result in blocks:
        if result is None or result.error is not None:
            cells.append(Cell("not run" if result else None))
            cells += [Cell()] * (len(columns) - 1)
        else:
            cells += [
                Cell(
                    _shown(result, name),
                    result.number(f"{name}_se"),
                    printed(result, name) if printed else "",
                )
                for name in columns
            ]
    return cells


def _shown(result: Result, name: str) -> float | None:
    """Return a number of a result in the unit of its column."""
    number = result.number(name)
    return number / _MEBIBYTE if number is not None and name == "peak_memory_bytes" else number


def _has(results: Sequence[Result], names: Iterable[str]) -> bool:
    """Tell whether any result has one of some numbers."""
    return any(result.number(name) is not None for result in results for name in names)


def _score_columns(results: Sequence[Result], names: Sequence[str]) -> Columns:
    """Return a column for each score, without a fourth, portability, if no result has it."""
    used = names if _has(results, names[3:]) else names[:3]
    return {name: Column(_TITLES[name.split("_")[-2]]) for name in used}


def _counted(results: Sequence[Result]) -> str:
    """Return of how many records the scores of a table are means."""
    counts: dict[str, int] = {}
    for result in in_order(results):
        if result.error is None:
            title = protocol_title(result.setting)
            counts[title] = max(counts.get(title, 0), result.values["n"])
    if len(set(counts.values())) == 1:
        return f"n = {next(iter(counts.values()))} records"
    return f"n = {', '.join(f'{n} ({title})' for title, n in counts.items()) or 0} records"
