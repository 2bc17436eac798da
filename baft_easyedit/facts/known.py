"""Which facts SmolLM2 knows: `data/known.json`, written by `scripts/find_known_facts.py`.

It holds numbers of facts and of phrasings only, with a hash of the tables that they count in.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from baft_easyedit.facts.tables import facts, fill, relations
from baft_easyedit.files.paths import read_text

FILE = "known.json"


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


def known_phrasings(file: Path | None = None) -> dict[int, list[int]]:
    """Return the numbers of the facts that SmolLM2 knows, with those of their phrasings.

    Args:
        file: Where they are; the package's own if None.

    Raises:
        ValueError: If it was written for other tables.
    """
    file = file or Path(__file__).parent / "data" / FILE
    content = json.loads(read_text(file))
    if content["tables"] != tables_hash():
        raise ValueError(
            f"{file} must be of these tables of facts, and is of others: run "
            "scripts/find_known_facts.py"
        )
    return {int(case): numbers for case, numbers in content["known"].items()}


def write_known(known: Mapping[int, list[int]], model: str, file: Path | None = None) -> None:
    """Write what `known_phrasings` reads.

    Args:
        known: Numbers of phrasings by that of the fact.
        model: Which model knows them: the SHA-256 of its GGUF file.
        file: Where to; the package's own if None.
    """
    file = file or Path(__file__).parent / "data" / FILE
    content = {"model": model, "tables": tables_hash(), "known": known}
    file.write_text(json.dumps(content, separators=(",", ":")) + "\n", encoding="utf-8")


def tables_hash() -> str:
    """Hash all prompts and answers, in the order that numbers count in."""
    digest = hashlib.sha256()
    for asked in prompts_to_complete():
        digest.update("\x1f".join(map(str, asked)).encode())
    return digest.hexdigest()
