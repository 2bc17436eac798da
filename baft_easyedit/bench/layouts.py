"""The tables that the field prints, made from the results of one model on one data set.

Teacher-forced scores and scores of generated text never share a table, and each caption says which
they are and when they were taken.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from baft_easyedit.bench.paper import ByMethod, PaperNumbers
from baft_easyedit.bench.protocol import Protocol
from baft_easyedit.bench.results import GENERATED, TEACHER_FORCED, Result
from baft_easyedit.bench.tables import Cell, Column, Group, Row, Table, make_table

_TITLES = {"rewrite": "Rel", "rephrase": "Gen", "locality": "Loc", "portability": "Por"}
_MOMENTS = {
    "single": "single edits, each of the unedited model",
    "continual": "T edits in a row, all scored after the T-th",
    "batched": "T edit calls in a row of B records each, all scored after the T-th",
}
_STYLES = {"single": "; as the paper's Table 1", "continual": "; as the paper's Table 2"}
_SCORES, _ABLATION = (1, 2), (4,)
"""Tables of the paper that have scores for all methods, and for the ablation."""
_NEEDS = {
    "single": "Table 1, single edits: T of 1 with batch size 1",
    "continual": "Table 2, edits in a row: T above 1 with batch size 1",
    "batched": "Batched edits: a batch size above 1",
    "ablation": "Table 4, the ablation: the rows of `bench/ablation`",
    "generated": "Scores of generated text: `generation: true`",
    "downstream": "Table 8, PIQA after the edits: `downstream`",
}
_MEBIBYTE = 2**20
_LONGEST_REASON = 50

CellsOf = Callable[[Result], list[Cell]]
"""What a scored result puts under the columns of its protocol."""


@dataclass
class Section:
    """One model on one data set: its results, and the tables made from them.

    Notes on rows are numbered through all tables of a section.
    """

    results: Sequence[Result]
    """At least one; all of the same model and data set."""
    paper: PaperNumbers
    paper_model: str | None = None
    """A model of the paper whose rows are added for orientation; None for none."""
    notes: list[str] = field(default_factory=list)
    """What the tables made so far refer to; the first has number 1."""

    def __post_init__(self) -> None:
        self.model = self.results[0].model
        self.dataset = self.results[0].dataset
        self._family = self.paper.family(self.model)
        if self.paper_model == self._family:
            self.paper_model = None  # its numbers stand beside ours already

    @property
    def common_notes(self) -> list[str]:
        """The notes that all scored results share; no row refers to them."""
        scored = [result for result in self.results if result.error is None]
        return [n for n in scored[0].notes if all(n in r.notes for r in scored)] if scored else []

    def tables(self) -> list[Table]:
        """Make all tables that the results have something for."""
        main = [r for r in self.results if not _is_ablation(r.method)]
        variants = [r for r in self.results if _is_ablation(r.method)]
        made = self._score_tables(main, _SCORES)
        varied = {result.setting for result in variants}
        reft, baft = (
            [r for r in main if r.method == name and r.setting in varied]
            for name in ("ReFT", "BaFT")
        )
        made += self._score_tables([*reft, *variants, *baft], _ABLATION)
        return [*made, *self._immediate(), *self._any_alias(), self._cost(), *self._downstream()]

    def gaps(self) -> list[str]:
        """Return for each kind of table that the results cannot make what it would need."""
        names = {result.setting.name for result in self.results}
        has = {
            "single": "single" in names,
            "continual": "continual" in names,
            "batched": "batched" in names,
            "ablation": any(_is_ablation(result.method) for result in self.results),
            "generated": _has(self.results, GENERATED),
            "downstream": _has(self.results, ("downstream_acc",)),
        }
        gaps = [need for kind, need in _NEEDS.items() if not has[kind]]
        printed = _SCORES + _ABLATION
        if self.paper_model is not None and not any(
            self._paper_scores(printed, self.paper_model, p) for p in _protocols(self.results)
        ):
            gaps.append(
                f"Scores of {self.paper_model} from the paper: none are known for {self.dataset} "
                "under these protocols"
            )
        return gaps

    def _score_tables(self, results: Sequence[Result], printed_in: Sequence[int]) -> list[Table]:
        """Make the tables of each protocol: teacher forced, and of generated text."""
        names = {result.setting.name for result in results}
        made = []
        for protocol in _MOMENTS:
            # A row of continual scores begins with T = 1, which is single editing.
            wanted = ("single", "continual") if protocol == "continual" else (protocol,)
            if protocol in names:
                shown = [result for result in results if result.setting.name in wanted]
                made += self._both_kinds(protocol, shown, printed_in)
        return made

    def _both_kinds(
        self, protocol: str, results: Sequence[Result], printed_in: Sequence[int]
    ) -> list[Table]:
        """Make a protocol's teacher-forced table, and that of generated text if there is any."""
        is_ablation = printed_in == _ABLATION
        moment = ("ablation; " if is_ablation else "") + _MOMENTS[protocol]
        style = "; as the paper's Table 4" if is_ablation else _STYLES.get(protocol, "")
        names = _used(results, TEACHER_FORCED)

        def cells_of(result: Result) -> list[Cell]:
            printed = self._paper_scores(printed_in, self._family, result.setting)
            numbers = printed.get(result.method, {})
            return [replace(_score(result, name), paper=_printed(numbers, name)) for name in names]

        made = [
            self._table(
                f"{moment}; teacher forced{style}",
                results,
                _score_columns(names),
                cells_of,
                self._reference_scores(printed_in, results, names),
            )
        ]
        if _has(results, GENERATED):
            caption = f"{moment}; generated text: greedy, natural stop, exact match"
            made.append(self._plain_scores(caption, results, _used(results, GENERATED)))
        return made

    def _paper_scores(
        self, printed_in: Sequence[int], family: str | None, protocol: Protocol
    ) -> ByMethod:
        """Return the paper's scores on this section's data set."""
        return self.paper.scores(printed_in, family, self.dataset, protocol)

    def _reference_scores(
        self, printed_in: Sequence[int], results: Sequence[Result], names: Sequence[str]
    ) -> list[Row]:
        """Return the rows that the paper prints of another model under the same protocols."""
        blocks = [self._paper_scores(printed_in, self.paper_model, p) for p in _protocols(results)]
        return [
            self._reference(
                method, [_printed(b.get(method, {}), name) for b in blocks for name in names]
            )
            for method in dict.fromkeys(method for block in blocks for method in block)
        ]

    def _reference(self, method: str, texts: Sequence[str | None]) -> Row:
        """Return a row of the paper's numbers for another model."""
        label = f"{method}: paper, {self.paper_model}"
        return Row(label, tuple(Cell(text=text) for text in texts))

    def _immediate(self) -> list[Table]:
        """Make the table of scores taken right after each edit."""
        names = ("immediate_rewrite_acc", "immediate_rephrase_acc")
        caption = (
            "T edits in a row, each scored right after itself, as EasyEdit's sequential_edit does; "
            "teacher forced; not the paper's protocol"
        )
        shown = [result for result in self.results if result.setting.name == "continual"]
        return [self._plain_scores(caption, shown, names)] if _has(shown, names) else []

    def _any_alias(self) -> list[Table]:
        """Make the table of portability with any listed answer counted as right."""
        names = ("any_alias_portability_acc",)
        caption = (
            "portability with the best of all listed answers, where EasyEdit takes the first; "
            "teacher forced; not the paper's score"
        )
        shown = self.results
        return [self._plain_scores(caption, shown, names)] if _has(shown, names) else []

    def _plain_scores(self, caption: str, results: Sequence[Result], names: Sequence[str]) -> Table:
        """Make a table of scores that the paper does not have."""

        def cells_of(result: Result) -> list[Cell]:
            return [_score(result, name) for name in names]

        return self._table(caption, results, _score_columns(names), cells_of)

    def _cost(self) -> Table:
        """Make the table of parameters, time and memory."""
        first = _protocols(self.results)[0]

        def cells_of(result: Result) -> list[Cell]:
            # The paper does not say under which protocol it took the time: it stands in the first.
            numbers = self.paper.costs(self._family).get(result.method, {})
            printed = _printed(numbers, "edit_time_s") if result.setting == first else None
            memory = result.number("peak_memory_bytes")
            mebibytes = None if memory is None else memory / _MEBIBYTE
            return [Cell(result.number("edit_time_s"), paper=printed), Cell(mebibytes)]

        columns = (
            Column("s/edit", is_higher_better=False),
            Column("MiB", decimals=0, is_higher_better=False),
        )
        caption = (
            "cost: numbers learned or weights changed, median seconds of one record's edit without "
            "scoring, peak memory; as the paper's Table 3, whose seconds are a V100's"
        )
        table = self._table(caption, self.results, columns, cells_of)
        rows = [
            row if row.error else replace(row, cells=(self._parameters(row.label), *row.cells))
            for row in table.rows
        ]
        rows += self._reference_costs(num_others=len(table.columns) - 1)
        count = Group("", (Column("parameters", decimals=0, is_higher_better=False),))
        return make_table(table.caption, [count, *table.header], rows)

    def _parameters(self, method: str) -> Cell:
        """Return the cell of a method's parameters, a range if they differ between protocols."""
        counts = [r.number("trainable_parameters") for r in self.results if r.method == method]
        known = sorted({count for count in counts if count is not None})
        numbers = self.paper.costs(self._family).get(method, {})
        printed = _printed(numbers, "trainable_parameters")
        if len(known) > 1:
            return Cell(text=f"{known[0]:,.0f} to {known[-1]:,.0f}", paper=printed)
        return Cell(known[0] if known else None, paper=printed)

    def _reference_costs(self, num_others: int) -> list[Row]:
        """Return the costs that the paper prints of another model, and empty cells behind them."""
        names = ("trainable_parameters", "edit_time_s")
        return [
            self._reference(
                method, [*(_printed(cost, name) for name in names), *[None] * num_others]
            )
            for method, cost in self.paper.costs(self.paper_model).items()
        ]

    def _downstream(self) -> list[Table]:
        """Make the table of a downstream task before and after the edits."""
        names = ("downstream_pre_acc", "downstream_acc")
        if not _has(self.results, names):
            return []
        asked = {r.setting for r in self.results if _has([r], names)}
        shown = [r for r in self.results if r.setting in asked]
        columns = (Column("before", is_higher_better=None), Column("after"))
        caption = "PIQA accuracy before and after the edits; as the paper's Table 8"

        def cells_of(result: Result) -> list[Cell]:
            return [_score(result, name) for name in names]

        return [self._table(caption, shown, columns, cells_of)]

    def _table(
        self,
        caption: str,
        results: Sequence[Result],
        columns: tuple[Column, ...],
        cells_of: CellsOf,
        references: Sequence[Row] = (),
    ) -> Table:
        """Make a table with a row for each method and the same columns for each protocol."""
        protocols = _protocols(results)
        found = {(result.method, result.setting): result for result in results}
        rows = [
            self._row(method, [found.get((method, p)) for p in protocols], len(columns), cells_of)
            for method in dict.fromkeys(result.method for result in results)
        ]
        is_plain = protocols == [Protocol()]
        header = [Group("" if is_plain else protocol_title(p), columns) for p in protocols]
        where = f"{self.model} on {self.dataset}"
        return make_table(f"{where}: {caption}; {_counted(results)}", header, [*rows, *references])

    def _row(
        self, method: str, blocks: Sequence[Result | None], width: int, cells_of: CellsOf
    ) -> Row:
        """Return the row of a method; None stands for a protocol that was not asked for."""
        present = [result for result in blocks if result is not None]
        marks = [self._mark(note) for result in present for note in self._notes_on(result)]
        reasons = {result.error for result in present}
        if reasons != {None} and len(reasons) == 1:
            reason = " ".join(str(present[0].error).split())
            if len(reason) > _LONGEST_REASON:
                marks.append(self._mark(f"not run: {reason}"))
                reason = reason[: _LONGEST_REASON - 1].rstrip() + "…"
            return Row(method, (), _unique(marks), reason)
        cells: list[Cell] = []
        for result in blocks:
            if result is None:
                cells += [Cell()] * width
            elif result.error is not None:
                mark = self._mark(f"not run: {result.error}")
                cells += [Cell(text="not run", marks=(mark,)), *[Cell()] * (width - 1)]
            else:
                cells += cells_of(result)
        return Row(method, tuple(cells), _unique(marks))

    def _notes_on(self, result: Result) -> list[str]:
        """Return a result's own notes, with its protocol unless the method always has them."""
        others = [r for r in self.results if r.method == result.method and r.error is None]
        return [
            note
            if all(note in other.notes for other in others)
            else f"{protocol_title(result.setting)}: {note}"
            for note in result.notes
            if note not in self.common_notes
        ]

    def _mark(self, note: str) -> int:
        """Return the number of a note."""
        if note not in self.notes:
            self.notes.append(note)
        return self.notes.index(note) + 1


def protocol_title(protocol: Protocol) -> str:
    """Return what is written above the columns of a protocol."""
    batch = f"B = {protocol.batch_size}, " if protocol.name == "batched" else ""
    return f"{batch}T = {protocol.T}"


def _is_ablation(method: str) -> bool:
    """Tell whether a method is an ablation of BaFT; the paper begins their names with a plus."""
    return method.startswith("+")


def _protocols(results: Sequence[Result]) -> list[Protocol]:
    """Return the protocols of results, from few edits to many."""
    return sorted({result.setting for result in results}, key=lambda p: (p.batch_size, p.T))


def _has(results: Sequence[Result], names: Sequence[str]) -> bool:
    """Tell whether any result has one of some numbers."""
    return any(result.number(name) is not None for result in results for name in names)


def _used(results: Sequence[Result], names: Sequence[str]) -> Sequence[str]:
    """Return the names of four scores, without portability if no result has it."""
    return names if _has(results, names[3:]) else names[:3]


def _score_columns(names: Sequence[str]) -> tuple[Column, ...]:
    """Return a column for each score."""
    return tuple(Column(_TITLES[name.split("_")[-2]]) for name in names)


def _score(result: Result, name: str) -> Cell:
    """Return the cell of a score."""
    return Cell(result.number(name), result.standard_error(name))


def _printed(numbers: Mapping[str, float], name: str) -> str | None:
    """Return a number of the paper as it is printed there; None if it is not known."""
    if name not in numbers:
        return None
    number = numbers[name]
    return f"{number:,.2f}" if name in TEACHER_FORCED else f"{number:,}"


def _unique(marks: Sequence[int]) -> tuple[int, ...]:
    """Return the numbers of notes, each once."""
    return tuple(sorted(set(marks)))


def _counted(results: Sequence[Result]) -> str:
    """Return of how many records the scores of a table are means."""
    counts: dict[Protocol, int] = {}
    for result in results:
        if result.error is None:
            counts[result.setting] = max(counts.get(result.setting, 0), result.values["n"])
    if len(set(counts.values())) == 1:
        return f"n = {next(iter(counts.values()))} records"
    parts = [f"{counts[p]} ({protocol_title(p)})" for p in _protocols(results) if p in counts]
    return f"n = {', '.join(parts) or 0} records"
