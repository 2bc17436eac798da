"""Which figures the results of one model on one data set make, and what others would need."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from baft_easyedit.bench.curves import Case, basis_weights, retention, update_shares
from baft_easyedit.bench.figures import (
    Style,
    batch_figure,
    cost_figure,
    retention_figure,
    update_figure,
    weight_figure,
)
from baft_easyedit.bench.layouts import protocol_title
from baft_easyedit.bench.results import TEACHER_FORCED, Result, read_cases

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MIN_RETENTION_T = 10
"""Fewest edits in a row whose retention is drawn."""

_TITLES = dict(
    zip(TEACHER_FORCED, ("Reliability", "Generality", "Locality", "Portability"), strict=True)
)
_NEEDS = {
    "figure1": "Figure 1, the bases of a ReFT update: a row ReFT, and `basis: true`",
    "figure2": "Figure 2, the basis weights of BaFT: a row BaFT, and `basis: true`",
    "figure3": "Figure 3, scores against batch size: two batch sizes or more for the same T",
    "retention": f"Retention of old edits: T of {MIN_RETENTION_T} or more with batch size 1",
    "cost": "Quality against time: rows with scores and edit times",
}

Found = TypeVar("Found")


@dataclass(frozen=True)
class Illustration:
    """A figure and what has to be said of it."""

    name: str
    """Beginning of its file's name."""
    caption: str
    figure: "Figure"


def illustrations(
    results: Sequence[Result], styles: Mapping[str, Style]
) -> tuple[list[Illustration], list[str]]:
    """Draw all figures that there are numbers for.

    Args:
        results: Results of one model on one data set.
        styles: How each method is drawn.

    Returns:
        The figures, and for each kind that is not drawn what it would need.

    Raises:
        ValueError: If a case's file is damaged.
    """
    scored = sorted(
        (result for result in results if result.error is None),
        key=lambda result: (result.setting.batch_size, result.setting.T),
    )
    drawn = [
        *_updates(scored),
        *_weights(scored),
        *_batches(scored, styles),
        *_retentions(scored, styles),
        *_costs(scored, styles),
    ]
    missing = [
        need for name, need in _NEEDS.items() if not any(i.name.startswith(name) for i in drawn)
    ]
    return drawn, missing


def _updates(results: Sequence[Result]) -> Iterator[Illustration]:
    """Draw the bases of ReFT's updates."""
    for result, count, shares in _first(results, "ReFT", update_shares):
        caption = (
            f"Figure 1. Redundant bases of ReFT's updates, {protocol_title(result.setting)}. Bars: "
            "the share of a basis in the update's size, |v_k - (R h)_k| added up over the bases, "
            f"on the edit prompts, sorted within each case, mean of {count} cases. Blue line: the "
            "shares added up. Dotted: the same if all bases moved h alike; the further the blue "
            "line lies above it, the fewer bases carry the update."
        )
        yield Illustration("figure1-reft-update", caption, update_figure(shares))


def _weights(results: Sequence[Result]) -> Iterator[Illustration]:
    """Draw the basis weights of BaFT."""
    for result, count, weights in _first(results, "BaFT", basis_weights):
        caption = (
            f"Figure 2. Basis weights of BaFT, {protocol_title(result.setting)}, after the last "
            "edit, on the edit prompt, on its rephrasing and on unrelated prompts: mean and "
            f"standard deviation over {count} cases."
        )
        yield Illustration("figure2-baft-weights", caption, weight_figure(weights))


def _first(
    results: Sequence[Result], method: str, extract: Callable[[Sequence[Case]], Found]
) -> Iterator[tuple[Result, int, Found]]:
    """Yield the first result of a method whose cases have something to extract, if any has."""
    for result in results:
        if result.method == method:
            cases = read_cases(result)
            if found := extract(cases):
                yield result, len(cases), found
                return


def _batches(results: Sequence[Result], styles: Mapping[str, Style]) -> Iterator[Illustration]:
    """Draw scores against batch size, a figure for each T."""
    for T in sorted({result.setting.T for result in results}):
        shown = [result for result in results if result.setting.T == T]
        if len({result.setting.batch_size for result in shown}) < 2:
            continue
        scores: dict[str, dict[str, dict[int, float]]] = {}
        for result, title, score in _scores(shown):
            by_size = scores.setdefault(title, {}).setdefault(result.method, {})
            by_size[result.setting.batch_size] = score
        caption = (
            f"Figure 3. Teacher-forced scores against the number of records of an edit call, T = "
            f"{T}, all scored after the last call."
        )
        yield Illustration(f"figure3-batch-size-T{T}", caption, batch_figure(scores, styles))


def _scores(results: Sequence[Result]) -> Iterator[tuple[Result, str, float]]:
    """Yield the teacher-forced scores that there are, with their titles."""
    for name, title in _TITLES.items():
        for result in results:
            if (score := result.number(name)) is not None:
                yield result, title, score


def _retentions(results: Sequence[Result], styles: Mapping[str, Style]) -> Iterator[Illustration]:
    """Draw scores against the age of the edit, a figure for each T."""
    in_a_row = [r for r in results if r.setting.batch_size == 1 and r.setting.T >= MIN_RETENTION_T]
    for T in sorted({result.setting.T for result in in_a_row}):
        cases = {r.method: read_cases(r) for r in in_a_row if r.setting.T == T}
        curves = {
            _TITLES[name]: {
                method: bins
                for method, found in cases.items()
                if (bins := retention(found, name, T))
            }
            for name in ("rewrite_acc", "rephrase_acc")
        }
        curves = {title: by_method for title, by_method in curves.items() if by_method}
        if curves:
            caption = (
                f"Retention, T = {T}: teacher-forced scores after the last edit, by the number of "
                "edits made after a case's own; means of the cases counted below the axis."
            )
            yield Illustration(f"retention-T{T}", caption, retention_figure(curves, styles))


def _costs(results: Sequence[Result], styles: Mapping[str, Style]) -> Iterator[Illustration]:
    """Draw scores against seconds, for the most edits in a row without batches."""
    timed = [result for result in results if result.number("edit_time_s")]
    if not timed:
        return
    chosen = max((r.setting for r in timed), key=lambda p: (p.batch_size == 1, p.T))
    points: dict[str, dict[str, tuple[float, float]]] = {}
    for result, title, score in _scores([r for r in timed if r.setting == chosen]):
        points.setdefault(title, {})[result.method] = (result.number("edit_time_s") or 0.0, score)
    if points:
        caption = (
            "Quality against time: teacher-forced scores after the last edit and median seconds of "
            f"one record's edit, {protocol_title(chosen)}."
        )
        yield Illustration("cost-quality", caption, cost_figure(points, styles))
