"""Questions on the facts: trained and held-out phrasings, one-hop and two-hop.

The kinds say what the bundled model has seen: it was trained on every fact in every trained
phrasing (`trained`) and on a part of the two-hop questions (`two_hop_trained`), and on no question
of the other two kinds.
"""

import hashlib
from dataclasses import dataclass
from typing import Literal, get_args

from baft_easyedit.facts.tables import Fact, facts, fill, relations, two_hop_rules

Kind = Literal["trained", "held_out", "two_hop_trained", "two_hop_held_out"]
TWO_HOP_TRAINED_SHARE = 0.7


@dataclass(frozen=True)
class Question:
    """A prompt with its true answer; the whole text is `prompt + ' ' + answer`."""

    prompt: str  # the question, or the text up to the answer; it does not end in a blank
    answer: str
    relation: str  # the first relation of a two-hop question
    subject: str


def questions(kind: Kind) -> list[Question]:
    """Render all questions of one kind, in the order of the tables.

    Raises:
        ValueError: If there is no such kind.
    """
    if kind not in get_args(Kind):
        raise ValueError(
            f"kind must be one of {get_args(Kind)}, but got {kind!r}; pass one of these"
        )
    known = facts()
    if kind in ("two_hop_trained", "two_hop_held_out"):
        return _two_hop_questions(known, is_trained=kind == "two_hop_trained")
    phrasings = {
        relation.name: relation.trained if kind == "trained" else (relation.held_out,)
        for relation in relations()
    }
    return [
        Question(fill(phrasing, fact.subject), fact.answer, *fact.key)
        for fact in known
        for phrasing in phrasings[fact.relation]
    ]


def share_of(*parts: str) -> float:
    """Hash strings to a number in [0, 1), the same on every machine, to split data by."""
    digest = hashlib.sha256("\x1f".join(parts).encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def _two_hop_questions(known: list[Fact], *, is_trained: bool) -> list[Question]:
    """Render the two-hop questions that are trained, or those that are held out."""
    answers = {fact.key: fact.answer for fact in known}
    found = []
    for rule in two_hop_rules():
        for fact in known:
            answer = rule.answer(fact.answer, answers)
            share = share_of("two-hop", rule.relation, rule.then, fact.subject)
            if fact.relation != rule.relation or not answer:
                continue
            if (share < TWO_HOP_TRAINED_SHARE) is is_trained:
                found += [
                    Question(fill(phrasing, fact.subject), answer, *fact.key)
                    for phrasing in rule.phrasings
                ]
    return found
