"""Numbers from records: what a case scored, and the means of a row.

Teacher-forced scores come from EasyEdit's metrics, `gen_*` from greedy generation, `immediate_*`
from the moment after a case's own edit, `FIELD_SCORES` are those of other papers' tables: never
averaged with each other.
"""

from collections.abc import Iterable, Mapping, Sequence
from math import sqrt
from statistics import fmean, harmonic_mean, median, stdev
from typing import Any

import numpy as np

SHORT = {"rewrite": "Rel", "rephrase": "Gen", "locality": "Loc", "portability": "Por"}
"""Titles of the scores of each section."""
TEACHER_FORCED = ("rewrite_acc", "rephrase_acc", "locality_acc", "portability_acc")
"""Reliability, generality, locality and portability by EasyEdit's evaluators."""
SCORES = (
    *TEACHER_FORCED,
    "any_alias_portability_acc",
    *(f"gen_{name}" for name in TEACHER_FORCED),
    "immediate_rewrite_acc",
    "immediate_rephrase_acc",
)
"""Names of the scores of a case; each is a number in [0, 1] or None."""

SUCCESSES = ("rewrite_success", "paraphrase_success", "neighborhood_success")
"""CounterFact's ES, PS and NS; their harmonic mean over a row is S."""
FIELD_SCORES = tuple(
    f"{moment}{name}"
    for moment in ("", "pre_")
    for name in (
        *SUCCESSES,
        *("rewrite_magnitude", "paraphrase_magnitude", "neighborhood_magnitude"),
        *("ngram_entropy", "reference_score", "specificity_acc"),
    )
)
"""Names of `probabilities.field_scores` and CounterFact's RS, after the edits and before.

A case may lack any.
"""


def metric_scores(metrics: Mapping[str, Any]) -> dict[str, float | None]:
    """Average the accuracies in one half (`pre` or `post`) of EasyEdit's metrics.

    Locality and portability are means over keys of means over probes.
    """
    return {
        "rewrite_acc": _mean(_values(metrics.get("rewrite_acc"))),
        "rephrase_acc": _mean(_values(metrics.get("rephrase_acc"))),
        "locality_acc": _mean(list(_kind_means(metrics, "locality").values())),
        "portability_acc": _mean(list(_kind_means(metrics, "portability").values())),
    }


def kind_scores(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return the accuracy of each kind of probe in one half of EasyEdit's metrics."""
    return {
        f"forced.{SHORT[section]}: {kind}": mean
        for section in ("locality", "portability")
        for kind, mean in _kind_means(metrics, section).items()
    }


def _kind_means(metrics: Mapping[str, Any], section: str) -> dict[str, float]:
    """Return the mean accuracy of each kind of probe in a section, without kinds that have none."""
    return {
        key.removesuffix("_acc"): fmean(values)
        for key, score in metrics.get(section, {}).items()
        if key.endswith("_acc") and (values := _values(score))
    }


def _values(score: Any) -> list[float]:
    """Return all numbers in a score, which EasyEdit nests in lists."""
    return [] if score is None else [float(x) for x in np.ravel(np.asarray(score, dtype=float))]


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None


def row_scores(cases: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Average the scores of a row's cases.

    Returns:
        For each of `SCORES` and `FIELD_SCORES` the mean over the cases that have it, and under
        `<name>_se` its standard error; None where there are no, or less than two, such cases. Under
        `harmonic_success` CounterFact's S, the harmonic mean of the row's means as in ROME. Under
        `more` likewise the means of all other scores that a case has, which are named
        `<table>.<column>`.
    """
    scored = [case["scores"] for case in cases]
    known = (*SCORES, *FIELD_SCORES)
    others = dict.fromkeys(name for scores in scored for name in scores if "." in name)
    row, more = _means(scored, known), _means(scored, others)
    for moment in ("", "pre_"):
        parts = [row[f"{moment}{name}"] for name in SUCCESSES]
        there = [part for part in parts if part is not None]
        is_whole = len(there) == len(parts)
        row[f"{moment}harmonic_success"] = harmonic_mean(there) if is_whole else None
    return {**row, "more": more}


def _means(
    scored: Sequence[Mapping[str, float | None]], names: Iterable[str]
) -> dict[str, float | None]:
    """Average the cases' scores of these names, each with its standard error."""
    found: dict[str, float | None] = {}
    for name in names:
        values = [value for scores in scored if (value := scores.get(name)) is not None]
        found[name] = _mean(values)
        found[f"{name}_se"] = stdev(values) / sqrt(len(values)) if len(values) > 1 else None
    return found


def row_costs(chunks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Collect what a row cost, from its chunks.

    Returns:
        `edit_time_s`, the median seconds of an edit call per request; `peak_memory_bytes`;
        `trainable_parameters`; how often the model was restored, and how often exactly; and the
        mean accuracies on a downstream task.
    """
    times = [t for chunk in chunks for t in chunk["edit_times_s"]]
    verified = [chunk["restored"] for chunk in chunks if chunk["restored"] is not None]
    counts = [c["trainable_parameters"] for c in chunks if c["trainable_parameters"] is not None]
    memory = [chunk["peak_memory_bytes"] for chunk in chunks if chunk["peak_memory_bytes"]]
    tasks = [chunk["downstream"] for chunk in chunks if chunk["downstream"] is not None]
    return {
        "edit_time_s": median(times) if times else None,
        "peak_memory_bytes": max(memory, default=None),
        "trainable_parameters": max(counts, default=None),
        "num_restored": sum(verified) if verified else None,
        "num_restores": len(verified) if verified else None,
        "downstream_acc": _mean([task["post_acc"] for task in tasks]),
        "downstream_pre_acc": _mean([task["pre_acc"] for task in tasks]),
    }
