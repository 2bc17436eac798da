"""The facts that SmolLM2 knows, in `data/known.json`, written by `scripts/find_known_facts.py`.

The file holds only indices of facts and phrasings, and a hash of the tables that they index.
"""

import hashlib
import json
from collections.abc import Iterator
from typing import NamedTuple

from baft_easyedit.facts.tables import DATA, facts, fill, relations
from baft_easyedit.files.paths import read_text


class Asked(NamedTuple):
    """A fact in one phrasing: a prompt to complete, and the answer."""

    case: int
    """Index of the fact in `facts()`."""
    phrasing: int
    """Index of the phrasing in `Relation.all`."""
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
