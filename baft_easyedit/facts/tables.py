"""The fact tables: facts, relations with their phrasings, and rules for two-hop questions.

A wide table `data/<table>.tsv` has one row per subject and one column per relation; an empty cell
is no fact. `relations.tsv` lists the relations and their columns, `phrasings.tsv` their prompts,
and `two_hop.tsv` the chains of two relations. `known.json`, by `scripts/find_known_facts.py`, has
the facts that SmolLM2 knows: indices of facts and phrasings, and a hash of what they index.
`questions` and `records` render them.
"""

import csv
import hashlib
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from baft_easyedit.files.paths import read_text

SUBJECT_SLOT = "{subject}"
DATA = Path(__file__).parent / "data"


@dataclass(frozen=True)
class Fact:
    """One true statement: `answer` is the value of `relation` for `subject`, as in a prompt."""

    relation: str
    subject: str
    answer: str
    table: str  # name of the table; facts of one table with equal subjects are about the same thing

    @property
    def key(self) -> tuple[str, str]:
        """Relation and subject, which no other fact has."""
        return self.relation, self.subject


@dataclass(frozen=True)
class Relation:
    """A column of a table, and how to ask for it."""

    name: str
    table: str
    subject: str  # column of the subject
    answer: str  # column of the answer
    trained: tuple[str, ...]  # phrasings the bundled model is trained on, each with one `{subject}`
    held_out: str  # the phrasing that the bundled model is never trained on

    @property
    def all(self) -> tuple[str, ...]:
        """All phrasings, the held-out one last."""
        return (*self.trained, self.held_out)


@dataclass(frozen=True)
class TwoHopRule:
    """A question for the relation `then` of what answers `relation` of the subject."""

    relation: str
    then: str
    phrasings: tuple[str, ...]

    def answer(self, first: str, known: Mapping[tuple[str, str], str]) -> str:
        """Return the answer, given that to the first relation; "" if the tables lack it.

        `known` are answers by `Fact.key`.
        """
        return known.get((self.then, first), "")


def facts() -> list[Fact]:
    """Read all facts, in the order of `relations.tsv` and then of each table."""
    return [
        Fact(relation.name, row[relation.subject], row[relation.answer], relation.table)
        for relation in relations()
        for row in _read(relation.table)
        if row[relation.answer]
    ]


def relations() -> list[Relation]:
    """Read all relations with their phrasings, in the order of `relations.tsv`."""
    texts: dict[tuple[str, str], list[str]] = {}
    for row in _read("phrasings"):
        texts.setdefault((row["relation"], row["use"]), []).append(row["phrasing"])
    return [
        Relation(
            row["relation"],
            row["table"],
            row["subject"],
            row["answer"],
            tuple(texts[row["relation"], "trained"]),
            *texts[row["relation"], "held_out"],
        )
        for row in _read("relations")
    ]


def two_hop_rules() -> list[TwoHopRule]:
    """Read the rules for two-hop questions, one per pair of relations, as in `two_hop.tsv`."""
    grouped: dict[tuple[str, str], list[str]] = {}
    for row in _read("two_hop"):
        grouped.setdefault((row["relation"], row["then"]), []).append(row["phrasing"])
    return [TwoHopRule(first, then, tuple(texts)) for (first, then), texts in grouped.items()]


def fill(phrasing: str, subject: str) -> str:
    """Put `subject` into the slot of `phrasing`."""
    return phrasing.replace(SUBJECT_SLOT, subject)


def _read(table: str) -> list[dict[str, str]]:
    """Read a TSV file with a header line."""
    lines = io.StringIO(read_text(DATA / f"{table}.tsv"), newline="")
    return list(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))


class Asked(NamedTuple):
    """A fact in one phrasing: a prompt to complete, and the answer."""

    case: int  # index of the fact in `facts()`
    phrasing: int  # index of the phrasing in `Relation.all`
    prompt: str
    answer: str


def prompts_to_complete() -> Iterator[Asked]:
    """Yield all facts in all phrasings that the answer completes, so not in questions."""
    named = {relation.name: relation for relation in relations()}
    for case, fact in enumerate(facts()):
        for number, phrasing in enumerate(named[fact.relation].all):
            if not phrasing.endswith("?"):
                yield Asked(case, number, fill(phrasing, fact.subject), fact.answer)


def known_phrasings() -> dict[int, list[int]]:
    """Return the facts that SmolLM2 knows, by index, each with its known phrasings, by index."""
    known = json.loads(read_text(DATA / "known.json"))["known"]
    return {int(case): numbers for case, numbers in known.items()}


def tables_hash() -> str:
    """Return a hash of all prompts and answers in their order, on which the indices depend."""
    digest = hashlib.sha256()
    for asked in prompts_to_complete():
        digest.update("\x1f".join(map(str, asked)).encode())
    return digest.hexdigest()
