"""Which tables the results of one model on one data set make.

Teacher-forced scores and scores of generated text never share a table, and each caption says which
they are and when they were taken.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from baft_easyedit.bench.protocol import Protocol
from baft_easyedit.bench.results import Result
from baft_easyedit.bench.scores import SHORT, TEACHER_FORCED
from baft_easyedit.bench.tables import Cell, Column, Table

_FORCED = {name: Column(title) for name, title in zip(TEACHER_FORCED, SHORT.values(), strict=True)}
_GENERATED = {f"gen_{name}": column for name, column in _FORCED.items()}
_MOMENTS = {
    "single": "single edits, each of the unedited model",
    "continual": "T edits in a row, all scored after the T-th",
    "batched": "T edit calls in a row of B records each, all scored after the T-th",
}
_STYLES = {"single": "; as the paper's Table 1", "continual": "; as the paper's Table 2"}
_FIELD = {
    "harmonic_success": Column("S"),
    **{
        f"{part}_{kind}": Column(f"{letter}{kind[0].upper()}")
        for part, letter in (("rewrite", "E"), ("paraphrase", "P"), ("neighborhood", "N"))
        for kind in ("success", "magnitude")
    },
    "ngram_entropy": Column("GE"),
    "reference_score": Column("RS"),
}
_COUNTERFACT = (
    "CounterFact by probability, as ROME, MEMIT and AlphaEdit score it: success S and magnitude M "
    "of efficacy E, paraphrases P and neighbours N; S alone, harmonic mean; GE, fluency in bits; "
    "RS, consistency with ROME's reference texts"
)
_MORE = {
    f"{_COUNTERFACT}; after the edits": _FIELD,
    f"{_COUNTERFACT}; before the edits": {
        f"pre_{name}": column._replace(is_higher_better=None) for name, column in _FIELD.items()
    },
    "accuracy of locality prompts against the gold answers, before and after the edits; teacher "
    "forced; Spe of AlphaEdit and UltraEdit on ZsRE": {
        "pre_specificity_acc": Column("before", is_higher_better=None),
        "specificity_acc": Column("Spe"),
    },
    "T edits in a row, each scored right after itself, as EasyEdit's sequential_edit does; teacher "
    "forced; not the paper's protocol": {
        "immediate_rewrite_acc": Column("Rel"),
        "immediate_rephrase_acc": Column("Gen"),
    },
    "portability with the best of all listed answers, where EasyEdit takes the first; teacher "
    "forced; not the paper's score": {"any_alias_portability_acc": Column("Por")},
    "PIQA accuracy before and after the edits; as the paper's Table 8": {
        "downstream_pre_acc": Column("before", is_higher_better=None),
        "downstream_acc": Column("after"),
    },
}
"""By caption the numbers that only some protocols have."""
_BY_KIND = {
    "forced": "locality and portability by kind of probe; teacher forced",
    "exact": "locality and portability by kind of probe; generated text, exact match",
    "probes": "further probes by kind; generated text, exact match, or the same as before",
    "contained": "further probes by kind; generated text that contains the target",
    "wild": "generated text as WILD scores it: asked in its context, cut at the first full stop; "
    "EM of normalised texts (Loc: same as before), target contained, or judged by a language model",
    "long": "long answers as EasyEdit scores UnKE: recall of ROUGE, BLEU of letters",
}
"""Captions of the tables whose columns the records ask for, by what begins their names."""
_COST = (
    "cost: numbers learned or weights changed, median seconds of one record's edit without "
    "scoring, peak memory; as the paper's Table 3, whose seconds are a V100's, of an unnamed T"
)
_COSTS = {
    "trainable_parameters": Column("parameters", decimals=0, is_higher_better=False),
    "edit_time_s": Column("s/edit", is_higher_better=False),
    "peak_memory_bytes": Column("MiB", decimals=0, is_higher_better=False, unit=2**20),
}

_SUMMARY = {
    **_FORCED,
    "edit_time_s": Column("s/edit", is_higher_better=None),
    "trainable_parameters": Column("parameters", 0, None),
}

Printed = Callable[[Result, str], str]
"""What the paper prints for a number of a result; empty for nothing."""


class PaperNumbers:
    """Numbers printed in the paper (Liu et al. 2025), of `paper.yaml`, which are shown beside ours.

    They are looked up for the same model, data set, protocol and method.
    """

    def __init__(self) -> None:
        text = Path(__file__).with_name("paper.yaml").read_text(encoding="utf-8")
        content = yaml.safe_load(text)
        self.citation: str = content["citation"]
        self._names = {name: model for model, names in content["models"].items() for name in names}
        self._scores = {
            (entry["table"], entry["model"], entry["dataset"], T): methods
            for entry in content["scores"]
            for T, methods in entry["by_T"].items()
        }
        self._costs = content["costs"]

    def _family(self, model: str) -> str | None:
        """Return the name in `paper.yaml` of a model such as `meta-llama/Llama-2-7b-hf`, if any."""
        return self._names.get(model.rsplit("/", 1)[-1].lower())

    def score(self, result: Result, name: str, tables: Sequence[int]) -> str:
        """Return the paper's teacher-forced score of a cell, as printed; empty if there is none.

        The first of `tables` that has one counts: the ablation prints other scores than Table 2 for
        the same methods and protocol.
        """
        if result.setting.batch_size > 1:
            return ""
        place = self._family(result.model), result.dataset, result.setting.T
        for table in tables:
            scores = self._scores.get((table, *place), {}).get(result.method, ())
            numbers = dict(zip(TEACHER_FORCED, scores, strict=False))  # ends before portability
            if name in numbers:
                return f"{numbers[name]:.2f}"
        return ""

    def cost(self, result: Result, name: str) -> str:
        """Return `trainable_parameters` or `edit_time_s` (on a V100) as printed, if it is."""
        number = self._costs.get(self._family(result.model), {}).get(result.method, {}).get(name)
        return "" if number is None else f"{number:,}"


def make_tables(results: Sequence[Result], paper: PaperNumbers) -> list[Table]:
    """Make all tables that results of one model and data set have something for."""
    # As the paper's, names of rows of an ablation begin with a plus.
    variants = [r for r in results if r.method.startswith("+")]
    main = [r for r in results if not r.method.startswith("+")]
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
        *_tables_by_kind(results),
        _table(_COST, results, _COSTS, paper.cost),
        *(
            _table(caption, shown, columns)
            for caption, columns in _MORE.items()
            if (shown := _asked(results, columns))
        ),
    ]


def summary_table(caption: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """Make the table that is printed after a run, of rows of a summary under one protocol."""
    cells = {row["method"]: row["error"] or [Cell(row[n]) for n in _SUMMARY] for row in rows}
    counted = _counted(("", row["method"], row["n"]) for row in rows if row["error"] is None)
    return Table(f"{caption}; {counted}", list(_SUMMARY.values()), cells)


def make_notes(results: Sequence[Result]) -> list[str]:
    """Return why rows were not run and what else is to be told of some, each thing once."""
    rows: dict[str, list[Result]] = {}
    for result in results:
        told = [f"not run: {result.error}"] if result.error is not None else result.values["notes"]
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
        made.append(_table(caption, shown, _FORCED, printed))
        if _asked(shown, _GENERATED):
            caption = f"{prefix}{moment}; generated text: greedy, natural stop, exact match"
            made.append(_table(caption, shown, _GENERATED))
    return made


def _tables_by_kind(results: Sequence[Result]) -> list[Table]:
    """Make the tables whose columns are in the records; none of kinds if each is all there is."""
    made = []
    for prefix, caption in _BY_KIND.items():
        names = dict.fromkeys(
            name
            for result in results
            for name in result.values.get("more", {})
            if name.startswith(f"{prefix}.") and not name.endswith("_se")
        )
        sections = [name.partition(":")[0] for name in names]
        is_told_apart = prefix not in ("forced", "exact") or len(set(sections)) < len(sections)
        titles = {name: name.removeprefix(f"{prefix}.") for name in names}
        # Rel, Gen, Loc and Por in order, whichever a record had first.
        ordered = sorted(names, key=lambda name: "RelGenLocPor".find(titles[name][:3]))
        columns = {name: Column(titles[name]) for name in ordered}
        if is_told_apart and (shown := _asked(results, columns)):
            made.append(_table(caption, shown, columns))
    return made


def _asked(results: Sequence[Result], names: Iterable[str]) -> list[Result]:
    """Return the results under the protocols of which some result has one of the numbers."""
    asked = {r.setting for r in results if any(r.number(name) is not None for name in names)}
    return [result for result in results if result.setting in asked]


def _table(
    caption: str,
    results: Sequence[Result],
    columns: Mapping[str, Column],
    printed: Printed | None = None,
) -> Table:
    """Make a table with a row for each method and the same columns for each protocol.

    A column, by the name of its number, is left out if no result has that.
    """
    columns = {name: c for name, c in columns.items() if _asked(results, [name])} or columns
    protocols = list(dict.fromkeys(result.setting for result in in_order(results)))
    found = {(result.method, result.setting): result for result in results}
    rows = {
        method: _row([found.get((method, p)) for p in protocols], list(columns), printed)
        for method in dict.fromkeys(result.method for result in results)
    }
    headings = ["" if protocols == [Protocol()] else protocol_title(p) for p in protocols]
    titled = [c._replace(heading=heading) for heading in headings for c in columns.values()]
    where = f"{results[0].model} on {results[0].dataset}"
    counted = _counted(
        (protocol_title(result.setting), result.method, result.values["n"])
        for result in in_order(results)
        if result.error is None
    )
    return Table(f"{where}: {caption}; {counted}", titled, rows)


def _row(
    blocks: Sequence[Result | None], names: Sequence[str], printed: Printed | None
) -> Sequence[Cell] | str:
    """Return the cells of a method; None stands for a protocol that was not asked for."""
    reasons = {result.error for result in blocks if result is not None}
    if len(reasons) == 1 and (reason := reasons.pop()) is not None:
        return reason
    cells: list[Cell] = []
    for result in blocks:
        if result is None or result.error is not None:
            told = ["not run" if result else None, *[None] * (len(names) - 1)]
            cells += map(Cell, told)
            continue
        for name in names:
            paper = printed(result, name) if printed else ""
            cells.append(Cell(result.number(name), result.number(f"{name}_se"), paper))
    return cells


def _counted(results: Iterable[tuple[str, str, int]]) -> str:
    """Return of how many records the scores of a table are means, and which rows have fewer.

    Args:
        results: Title of the protocol, method and number of records of each.
    """
    counts: dict[str, dict[str, int]] = {}
    for title, method, n in results:
        counts.setdefault(title, {})[method] = n
    most = {title: max(own.values()) for title, own in counts.items()}
    are_told_apart = len({*most.values()}) > 1
    shown = [f"{n} ({title})" if are_told_apart else str(n) for title, n in most.items()]
    fewer = [
        f"{method} {n} ({title})" if len(counts) > 1 else f"{method} {n}"
        for title, own in counts.items()
        for method, n in own.items()
        if n < most[title]
    ]
    but = f", but {', '.join(fewer)}" if fewer else ""
    return f"n = {', '.join(dict.fromkeys(shown)) or 0} records{but}"
