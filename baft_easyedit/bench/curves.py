"""What figures show, as plain numbers, from the cases of a run.

Shape: r bases of a layer.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from statistics import fmean, pstdev
from typing import Any

PROMPTS = ("rewrite", "rephrase", "locality")
"""The prompts on which a gate is recorded: the edit's, its rephrasing, an unrelated one."""

Case = Mapping[str, Any]
"""The content of a case's file."""


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation over cases, for each basis."""

    mean: list[float]
    deviation: list[float]

    @classmethod
    def of(cls, rows: Sequence[Sequence[float]]) -> "Spread":
        """Average over rows of r numbers."""
        columns = list(zip(*rows, strict=True))
        return cls([fmean(column) for column in columns], [pstdev(column) for column in columns])


@dataclass(frozen=True)
class Bin:
    """The cases whose edits are about as old."""

    youngest: int
    """Fewest edits made after a case's own."""
    oldest: int
    mean: float
    """Of their score."""
    count: int


def update_shares(cases: Iterable[Case]) -> dict[int, Spread]:
    """Return how the size of an update is shared among bases, the largest share first.

    Args:
        cases: Cases with an `update` record; others are passed over. The shares are sorted within
            each case, for different edits may use different bases.

    Returns:
        By layer, the shares of r bases on the edit prompts; they add up to 1.
    """
    shares: dict[int, list[list[float]]] = {}
    for case in cases:
        for layer, sizes in _recorded(case, "update", "rewrite").items():
            if (total := sum(sizes)) > 0:
                ranked = sorted((size / total for size in sizes), reverse=True)
                shares.setdefault(int(layer), []).append(ranked)
    return {layer: Spread.of(rows) for layer, rows in sorted(shares.items())}


def basis_weights(cases: Iterable[Case]) -> dict[int, dict[str, Spread]]:
    """Return the basis weights on each kind of prompt.

    Args:
        cases: Cases with a `basis` record; others are passed over.

    Returns:
        By layer and kind of prompt, the weights of r bases.
    """
    weights: dict[int, dict[str, list[list[float]]]] = {}
    for case in cases:
        for prompt in PROMPTS:
            for layer, values in _recorded(case, "basis", prompt).items():
                weights.setdefault(int(layer), {}).setdefault(prompt, []).append(values)
    return {
        layer: {prompt: Spread.of(rows) for prompt, rows in by_prompt.items()}
        for layer, by_prompt in sorted(weights.items())
    }


def _recorded(case: Case, name: str, prompt: str) -> Mapping[str, list[float]]:
    """Return a case's record of a gate by layer; empty if there is none."""
    return (case.get(name) or {}).get(prompt) or {}


def retention(cases: Iterable[Case], score: str, T: int, num_bins: int = 10) -> list[Bin]:
    """Return a score by the age of the edit: the number of edits made after it.

    Args:
        cases: Cases of T edits in a row.
        score: One of their scores; cases without it are passed over.
        T: Edits in a row, which is one more than the greatest age.
        num_bins: Number of equally wide bins, at most.
    """
    width = ceil(T / num_bins)
    values: dict[int, list[float]] = {}
    for case in cases:
        if (value := case["scores"].get(score)) is not None:
            age = case["chunk_length"] - 1 - case["position"]
            values.setdefault(age // width, []).append(value)
    return [
        Bin(i * width, min((i + 1) * width, T) - 1, fmean(found), len(found))
        for i, found in sorted(values.items())
    ]
