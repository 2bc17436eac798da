"""Edit requests for EasyEdit, made of the facts: two disjoint splits, and two for SmolLM2.

EasyEdit scores the text `prompt + ' ' + target`, so no prompt ends in a blank and no target starts
with one. Random choices are seeded by the fact, so a call gives the same records anywhere.
"""

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from baft_easyedit.facts.questions import share_of
from baft_easyedit.facts.tables import Fact, facts, fill, known_phrasings, relations, two_hop_rules

Split = Literal["train", "eval", "known", "known_train"]
EVAL_SHARE = 0.4
NUM_LOC_PROMPTS = 4
MIN_TRAIN_FACTS = 8
"""Usable train-split facts that a relation needs for its facts to be edited, a trained one itself
included."""
_KNOWN: Mapping[str, Literal["train", "eval"]] = {"known": "eval", "known_train": "train"}
"""The splits of facts that SmolLM2 knows, and the split that each is a part of."""


def split_of(fact: Fact) -> Literal["train", "eval"]:
    """Return the split of a fact, which depends only on its relation and subject."""
    return "eval" if share_of("split", *fact.key) < EVAL_SHARE else "train"


def edit_requests(split: Split, limit: int | None = None) -> list[dict[str, Any]]:
    """Render the facts of one split as counterfactual edits in EasyEdit's request schema.

    Each record teaches `target_new`, another value of the same relation. `prompt` is a phrasing
    that the bundled model was trained on, `rephrase_prompt` is the one it never saw.
    `portability.two_hop` asks what follows from `target_new`. `locality` holds facts that must
    stay: the relation for another subject (`neighborhood`), another relation of this subject
    (`same_subject`, where the tables have one), and neither (`unrelated`). `loc_prompt` holds four
    facts of the relation about other subjects of the train split, as texts; none is probed.
    Records are shuffled over relations, so a prefix is a fair sample.

    `known` and `known_train` are the parts of `eval` and `train` that SmolLM2 knows. All their
    facts are known ones, and `prompt` and the probes are phrasings in which SmolLM2 answers
    correctly; so is `rephrase_prompt` if there is a second such phrasing, else it is the usual one.

    Args:
        split: `train`, `eval`, `known` or `known_train`; no fact is in both `train` and `eval`.
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
    renderer = _Renderer(known_phrasings() if split in _KNOWN else None)
    members = renderer.members(_KNOWN.get(split, split))
    members.sort(key=lambda case: share_of("order", *renderer.facts[case].key))
    if limit is not None and not 0 <= limit <= len(members):
        raise ValueError(
            f"limit must be in [0, {len(members)}] for split {split!r}, but got {limit}; "
            "pass fewer, or None for all"
        )
    return [renderer.record(case) for case in members[:limit]]


class _Renderer:
    """Renders records from the tables, which are read once for all records of a call.

    Args:
        known: Indices of the facts to use, each with the indices of its phrasings; if None, all
            facts and all trained phrasings.
    """

    def __init__(self, known: Mapping[int, Sequence[int]] | None) -> None:
        self.facts = facts()
        self.only_known = known is not None
        self.relations = {relation.name: relation for relation in relations()}
        self.rules = {rule.relation: rule for rule in two_hop_rules()}
        self.answers = {fact.key: fact.answer for fact in self.facts}
        if known is None:
            trained = {name: range(len(own.trained)) for name, own in self.relations.items()}
            known = {case: trained[fact.relation] for case, fact in enumerate(self.facts)}
        self.used = [self.facts[case] for case in known]
        self.trained = {fact for fact in self.used if split_of(fact) == "train"}
        self.prompts: dict[tuple[str, str], list[str]] = {}
        self.by_relation: dict[str, list[Fact]] = {}
        self.by_thing: dict[tuple[str, str], list[Fact]] = {}
        for fact, numbers in zip(self.used, known.values(), strict=True):
            phrasings = self.relations[fact.relation].all
            self.prompts[fact.key] = [fill(phrasings[i], fact.subject) for i in numbers]
            self.by_relation.setdefault(fact.relation, []).append(fact)
            self.by_thing.setdefault((fact.table, fact.subject), []).append(fact)

    def members(self, split: str) -> list[int]:
        """Return the indices of a split's facts whose relations have enough train-split facts."""
        counts = Counter(fact.relation for fact in self.trained)
        return [
            case
            for case, fact in enumerate(self.facts)
            if fact.key in self.prompts
            and split_of(fact) == split
            and counts[fact.relation] >= MIN_TRAIN_FACTS
        ]

    def record(self, case: int) -> dict[str, Any]:
        """Render one fact as an edit request."""
        fact = self.facts[case]
        rng = random.Random("\x1f".join(fact.key))
        target = self._target(fact, rng)
        prompt, locality = self._prompt(fact, rng), self._locality(fact, target, rng)
        known = [p for p in self.prompts[fact.key] if p != prompt and self.only_known]
        usual = self.relations[fact.relation].held_out
        return {
            "case_id": case,
            "prompt": prompt,
            "target_new": target,
            "ground_truth": fact.answer,
            "subject": fact.subject,
            "rephrase_prompt": known[0] if known else fill(usual, fact.subject),
            "portability": self._portability(fact, target),
            "locality": locality,
            "loc_prompt": self._loc_prompts(fact, target, locality, rng),
        }

    def _target(self, fact: Fact, rng: random.Random) -> str:
        """Draw another value of the relation; if possible, one that changes the two-hop answer."""
        values = {other.answer for other in self.by_relation[fact.relation]}
        values -= {fact.answer, fact.subject}
        rule = self.rules.get(fact.relation)
        if rule is not None:
            unchanged = ("", rule.answer(fact.answer, self.answers))
            changed = {v for v in values if rule.answer(v, self.answers) not in unchanged}
            values = changed or values
        return rng.choice(sorted(values))

    def _prompt(self, fact: Fact, rng: random.Random) -> str:
        """Draw a prompt for `fact` from its usable phrasings."""
        return rng.choice(self.prompts[fact.key])

    def _portability(self, fact: Fact, target: str) -> dict[str, dict[str, str]]:
        """Return the two-hop question, with its answer if `target` were true; {} if none."""
        rule = self.rules.get(fact.relation)
        answer = rule and rule.answer(target, self.answers)
        if not rule or not answer:
            return {}
        prompt = fill(rule.phrasings[0], fact.subject)
        return {"two_hop": {"prompt": prompt, "ground_truth": answer}}

    def _locality(self, fact: Fact, target: str, rng: random.Random) -> dict[str, dict[str, str]]:
        """Draw facts that must stay true: of the same relation, of the same subject, of neither."""
        same = [other for other in self.by_thing[fact.table, fact.subject] if other != fact]
        chosen = {"neighborhood": rng.choice(self._neighbours(fact, target))}
        if same:
            chosen["same_subject"] = rng.choice(same)
        chosen["unrelated"] = rng.choice(
            [f for f in self.used if f.relation != fact.relation and f.subject != fact.subject]
        )
        return {
            name: {"prompt": self._prompt(other, rng), "ground_truth": other.answer}
            for name, other in chosen.items()
        }

    def _loc_prompts(
        self, fact: Fact, target: str, probes: dict[str, dict[str, str]], rng: random.Random
    ) -> list[str]:
        """Draw train-split facts of the relation about other subjects, as texts; none is probed."""
        probed = {probe["prompt"] for probe in probes.values()}
        chosen = rng.sample(
            [
                other
                for other in self._neighbours(fact, target)
                if other in self.trained and not probed & set(self.prompts[other.key])
            ],
            NUM_LOC_PROMPTS,
        )
        return [f"{self._prompt(other, rng)} {other.answer}" for other in chosen]

    def _neighbours(self, fact: Fact, target: str) -> list[Fact]:
        """Return the relation's facts about other subjects whose answer is not the target."""
        return [
            other
            for other in self.by_relation[fact.relation]
            if other.subject != fact.subject and other.answer != target
        ]
