"""Facts as EasyEdit edit requests, in two disjoint splits, and the path of the bundled model.

EasyEdit scores the text `prompt + ' ' + target`, so no prompt ends in a blank and no target starts
with one. Everything is a function of the tables: the same call gives the same records anywhere.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from baft_easyedit.facts.questions import share_of, two_hop_answer
from baft_easyedit.facts.tables import (
    Fact,
    Relation,
    TwoHopRule,
    facts,
    fill,
    relations,
    two_hop_rules,
)

Split = Literal["train", "eval"]
EVAL_SHARE = 0.4


def bundled_model_path() -> Path:
    """The folder of the bundled model and its tokenizer, for `from_pretrained`."""
    return Path(__file__).parent / "assets" / "facts-llama"


def split_of(fact: Fact) -> Split:
    """The split that `fact` is edited in, fixed by its relation and subject."""
    return "eval" if share_of("split", *fact.key) < EVAL_SHARE else "train"


def edit_requests(split: Split, limit: int | None = None) -> list[dict[str, Any]]:
    """Render the facts of one split as counterfactual edits in EasyEdit's request schema.

    Each record teaches `target_new`, another value of the same relation. `prompt` is a phrasing
    that the bundled model was trained on, `rephrase_prompt` is the one it never saw.
    `portability.two_hop` asks what follows from `target_new`. `locality` holds facts that must
    stay: another subject (`neighborhood`) and another relation of this subject (`same_subject`,
    where the tables have one). `loc_prompt` is an unrelated fact of the train split as one text.
    Records are shuffled over relations, so a prefix is a fair sample.

    Args:
        split: `train` or `eval`; no fact is in both.
        limit: Number of records, from the first on; all if None.

    Returns:
        The records; `case_id` is the position of the fact in `facts()`.

    Raises:
        ValueError: If `split` is unknown, or `limit` is negative or more than the split has.
    """
    if split not in get_args(Split):
        raise ValueError(
            f"split must be one of {get_args(Split)}, but got {split!r}; pass one of these"
        )
    renderer = _Renderer.from_tables()
    members = [case for case, fact in enumerate(renderer.facts) if split_of(fact) == split]
    members.sort(key=lambda case: share_of("order", *renderer.facts[case].key))
    if limit is not None and not 0 <= limit <= len(members):
        raise ValueError(
            f"limit must be in [0, {len(members)}] for split {split!r}, but got {limit}; "
            "pass fewer, or None for all"
        )
    return [renderer.record(case) for case in members[:limit]]


@dataclass(frozen=True)
class _Renderer:
    """The tables, indexed for rendering records."""

    facts: list[Fact]
    relations: dict[str, Relation]
    rules: dict[str, TwoHopRule]
    answers: dict[tuple[str, str], str]
    by_relation: dict[str, list[Fact]]
    by_thing: dict[tuple[str, str], list[Fact]]
    train_facts: list[Fact]

    @classmethod
    def from_tables(cls) -> _Renderer:
        """Read the tables once for all records of a call."""
        known = facts()
        by_relation: dict[str, list[Fact]] = {}
        by_thing: dict[tuple[str, str], list[Fact]] = {}
        for fact in known:
            by_relation.setdefault(fact.relation, []).append(fact)
            by_thing.setdefault((fact.table, fact.subject), []).append(fact)
        return cls(
            facts=known,
            relations={relation.name: relation for relation in relations()},
            rules={rule.relation: rule for rule in two_hop_rules()},
            answers={fact.key: fact.answer for fact in known},
            by_relation=by_relation,
            by_thing=by_thing,
            train_facts=[fact for fact in known if split_of(fact) == "train"],
        )

    def record(self, case: int) -> dict[str, Any]:
        """Render one fact as an edit request."""
        fact = self.facts[case]
        rng = random.Random("\x1f".join(fact.key))
        target = self._target(fact, rng)
        return {
            "case_id": case,
            "prompt": self._prompt(fact, rng),
            "target_new": target,
            "ground_truth": fact.answer,
            "subject": fact.subject,
            "rephrase_prompt": fill(self.relations[fact.relation].held_out, fact.subject),
            "portability": self._portability(fact, target),
            "locality": self._locality(fact, target, rng),
            "loc_prompt": self._loc_prompt(fact, rng),
        }

    def _target(self, fact: Fact, rng: random.Random) -> str:
        """Draw another value, one that changes the two-hop answer where there is one."""
        values = {other.answer for other in self.by_relation[fact.relation]}
        values -= {fact.answer, fact.subject}
        rule = self.rules.get(fact.relation)
        if rule is not None:
            before = two_hop_answer(rule, fact.answer, self.answers)
            values = {
                value
                for value in values
                if two_hop_answer(rule, value, self.answers) not in ("", before)
            } or values
        return rng.choice(sorted(values))

    def _prompt(self, fact: Fact, rng: random.Random) -> str:
        """Ask for `fact` in one of the trained phrasings."""
        return fill(rng.choice(self.relations[fact.relation].trained), fact.subject)

    def _portability(self, fact: Fact, target: str) -> dict[str, dict[str, str]]:
        """The two-hop question, answered as if `target` were true."""
        rule = self.rules.get(fact.relation)
        answer = "" if rule is None else two_hop_answer(rule, target, self.answers)
        if rule is None or not answer:
            return {}
        prompt = fill(rule.phrasings[0], fact.subject)
        return {"two_hop": {"prompt": prompt, "ground_truth": answer}}

    def _locality(self, fact: Fact, target: str, rng: random.Random) -> dict[str, dict[str, str]]:
        """Facts next to the edited one, which must stay true."""
        neighbours = [
            other
            for other in self.by_relation[fact.relation]
            if other.subject != fact.subject and other.answer != target
        ]
        same = [other for other in self.by_thing[fact.table, fact.subject] if other != fact]
        chosen = {"neighborhood": rng.choice(neighbours)}
        if same:
            chosen["same_subject"] = rng.choice(same)
        return {
            name: {"prompt": self._prompt(other, rng), "ground_truth": other.answer}
            for name, other in chosen.items()
        }

    def _loc_prompt(self, fact: Fact, rng: random.Random) -> str:
        """An unrelated fact of the train split as one text: another relation and subject."""
        other = rng.choice(
            [
                other
                for other in self.train_facts
                if other.relation != fact.relation and other.subject != fact.subject
            ]
        )
        return f"{self._prompt(other, rng)} {other.answer}"
