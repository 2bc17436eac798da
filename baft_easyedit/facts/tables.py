"""The fact tables: facts, relations with their phrasings, and rules for two-hop questions.

A wide table `data/<table>.tsv` has one row per subject and one column per relation; an empty cell
is no fact. `relations.tsv` names the columns, `phrasings.tsv` asks for them, and `two_hop.tsv`
chains two relations. Rendering to questions and records is not here.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from baft_easyedit.files.paths import read_text

SUBJECT_SLOT = "{subject}"
NUM_HELD_OUT = 1


@dataclass(frozen=True)
class Fact:
    """One true statement: `answer` is the value of `relation` for `subject`."""

    relation: str
    """Name of the relation, such as `country_capital`."""
    subject: str
    """What the fact is about, as it occurs in a prompt."""
    answer: str
    """The true value, one to a few words."""
    table: str
    """Table of the subject: facts of one table with equal subjects are about the same thing."""

    @property
    def key(self) -> tuple[str, str]:
        """What identifies the fact: (relation, subject)."""
        return self.relation, self.subject


@dataclass(frozen=True)
class Relation:
    """A column of a table, and how to ask for it."""

    name: str
    """Name of the relation."""
    table: str
    """Name of the table, without `.tsv`."""
    subject: str
    """Column of the subject; also the kind of thing the subject is."""
    answer: str
    """Column of the answer; also the kind of thing the answer is."""
    trained: tuple[str, ...]
    """Phrasings the bundled model is trained on, each with one `{subject}`."""
    held_out: str
    """The phrasing that is never trained on."""

    @property
    def all(self) -> tuple[str, ...]:
        """All phrasings, the held-out one last."""
        return (*self.trained, self.held_out)


@dataclass(frozen=True)
class TwoHopRule:
    """A question whose answer is the `then` relation of the answer to `relation`."""

    relation: str
    """First relation, asked of the subject in the prompt."""
    then: str
    """Second relation, asked of the first answer."""
    phrasings: tuple[str, ...]
    """Phrasings, each with one `{subject}`."""


def facts(data_dir: Path | None = None) -> list[Fact]:
    """Read all facts, in the order of `relations.tsv` and then of each table.

    Args:
        data_dir: Folder of the tables; the package's own if None.

    Returns:
        The facts; (relation, subject) is unique.

    Raises:
        ValueError: If a table repeats a subject, or a cell has blanks at an end.
    """
    found = []
    for relation in relations(data_dir):
        rows = _read(_folder(data_dir) / f"{relation.table}.tsv", relation.subject, relation.answer)
        subjects = [row[relation.subject] for row in rows]
        _check_unique(f"{relation.table}.tsv: {relation.subject}", subjects)
        found += [
            Fact(relation.name, row[relation.subject], row[relation.answer], relation.table)
            for row in rows
            if row[relation.answer]
        ]
    return found


def relations(data_dir: Path | None = None) -> list[Relation]:
    """Read all relations with their phrasings.

    Args:
        data_dir: Folder of the tables; the package's own if None.

    Returns:
        The relations, in the order of `relations.tsv`.

    Raises:
        ValueError: If a phrasing has no subject slot, or a relation has not exactly one held-out
            phrasing.
    """
    folder = _folder(data_dir)
    rows = _read(folder / "relations.tsv", "relation", "table", "subject", "answer")
    phrasings = _read(folder / "phrasings.tsv", "relation", "use", "phrasing")
    _check_unique("relations.tsv: relation", [row["relation"] for row in rows])
    _check_unique("phrasings.tsv: phrasing", [row["phrasing"] for row in phrasings])
    return [_relation(row, phrasings) for row in rows]


def two_hop_rules(data_dir: Path | None = None) -> list[TwoHopRule]:
    """Read the rules for two-hop questions.

    Args:
        data_dir: Folder of the tables; the package's own if None.

    Returns:
        One rule per pair of relations, in the order of `two_hop.tsv`.

    Raises:
        ValueError: If a phrasing has no subject slot.
    """
    grouped: dict[tuple[str, str], list[str]] = {}
    for row in _read(_folder(data_dir) / "two_hop.tsv", "relation", "then", "phrasing"):
        _check_slot("two_hop.tsv", row["phrasing"])
        grouped.setdefault((row["relation"], row["then"]), []).append(row["phrasing"])
    return [TwoHopRule(first, then, tuple(texts)) for (first, then), texts in grouped.items()]


def fill(phrasing: str, subject: str) -> str:
    """Put `subject` into the slot of `phrasing`."""
    return phrasing.replace(SUBJECT_SLOT, subject)


def _relation(row: dict[str, str], phrasings: list[dict[str, str]]) -> Relation:
    """Join a row of `relations.tsv` with the phrasings of that relation."""
    name = row["relation"]
    texts: dict[str, list[str]] = {"trained": [], "held_out": []}
    for phrasing in phrasings:
        if phrasing["relation"] != name:
            continue
        if phrasing["use"] not in texts:
            raise ValueError(
                f"phrasings.tsv: use must be trained or held_out, but {name} has "
                f"{phrasing['use']!r}; correct that row"
            )
        _check_slot("phrasings.tsv", phrasing["phrasing"])
        texts[phrasing["use"]].append(phrasing["phrasing"])
    if len(texts["held_out"]) != NUM_HELD_OUT:
        raise ValueError(
            f"phrasings.tsv: a relation needs {NUM_HELD_OUT} held_out phrasing, but {name} has "
            f"{len(texts['held_out'])}; mark one of its rows"
        )
    return Relation(
        name,
        row["table"],
        row["subject"],
        row["answer"],
        tuple(texts["trained"]),
        *texts["held_out"],
    )


def _folder(data_dir: Path | None) -> Path:
    """The folder of the tables."""
    return Path(__file__).parent / "data" if data_dir is None else data_dir


def _read(path: Path, *columns: str) -> list[dict[str, str]]:
    """Read a TSV file with a header line that has `columns`."""
    lines = io.StringIO(read_text(path), newline="")
    rows = list(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
    for number, row in enumerate(rows, start=2):
        for column in columns:
            cell = row.get(column)
            if cell is None:
                raise ValueError(
                    f"{path.name}: line {number} needs a cell for column {column}, but has "
                    f"{list(row.values())}; add the cell or the column to the header"
                )
            if cell != cell.strip():
                raise ValueError(
                    f"{path.name}: a cell must not start or end with a blank, but line {number} "
                    f"has {cell!r}; strip it"
                )
    return rows


def _check_unique(field: str, values: list[str]) -> None:
    """Raise if a value occurs twice."""
    repeated = sorted(value for value, count in Counter(values).items() if count > 1)
    if repeated:
        raise ValueError(f"{field} must be unique, but {repeated} repeat; remove one of each")


def _check_slot(file: str, phrasing: str) -> None:
    """Raise if `phrasing` has not exactly one subject slot."""
    if phrasing.count(SUBJECT_SLOT) != 1:
        raise ValueError(
            f"{file}: a phrasing needs {SUBJECT_SLOT} once, but there is {phrasing!r}; add it"
        )
