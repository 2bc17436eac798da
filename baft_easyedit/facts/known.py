"""Which facts SmolLM2 knows: `data/known.json`, written by `scripts/find_known_facts.py`.

It holds numbers of facts and of phrasings only, with a hash of the tables that they count in.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import NamedTuple

from baft_easyedit.facts.tables import DATA, facts, fill, relations
from baft_easyedit.files.paths import read_text


class Asked(NamedTuple):
    """A text up to the answer, and the answer."""

    case: int
    """Number of the fact in `facts()`."""
    phrasing: int
    """Number of the phrasing in `Relation.all`."""
    prompt: str
    answer: str


def prompts_to_complete() -> Iterator[Asked]:
    """Yield all facts in all phrasings that a text goes on with the answer after: no questions."""
    named = {relation.name: relation for relation in relations()}
    for case, fact in enumerate(facts()):
        for number, phrasing in enumerate(named[fact.relation].all):
            if not phrasing.endswith("?"):
                yield Asked(case, number, fill(phrasing, fact.subject), fact.answer)


def known_phrasings() -> dict[int, list[int]]:
    """Return the numbers of the facts that SmolLM2 knows, with those of their phrasings.

    Raises:
        ValueError: If they were found for other tables.
    """
    content = json.loads(read_text(DATA / "known.json"))
    if content["tables"] != tables_hash():
        raise ValueError(
            "known.json must be of these tables of facts, and is of others: run "
            "scripts/find_known_facts.py"
        )
    return {int(case): numbers for case, numbers in content["known"].items()}


def tables_hash() -> str:
    """Hash all prompts and answers, in the order that numbers count in."""
    digest = hashlib.sha256()
    for asked in prompts_to_complete():
        digest.update("\x1f".join(map(str, asked)).encode())
    return digest.hexdigest()
