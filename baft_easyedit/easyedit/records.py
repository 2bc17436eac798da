"""What a protocol run returns: one record per method, and EasyEdit's metrics averaged into it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, median
from typing import Any

import numpy as np


@dataclass(frozen=True)
class RunResult:
    """Scores and cost of one method under one protocol.

    Scores are means over the probes of a case, then over cases.
    """

    method: str
    protocol: str
    """`single`, or `continual-T`: scored after the T-th edit."""
    n: int = 0
    """Cases scored."""
    rewrite_acc: float | None = None
    """Reliability; None if no case has this score (so for all scores)."""
    rephrase_acc: float | None = None
    """Generality."""
    locality_acc: float | None = None
    """Agreement with the unedited model on irrelevant prompts."""
    portability_acc: float | None = None
    edit_time_s: float | None = None
    """Median seconds of one edit, the method alone, without scoring."""
    edit_time_mean_s: float | None = None
    trainable_parameters: int | None = None
    """Numbers the method learned (BaFT, ReFT, LoRA) or weights it changed; None if not known."""
    num_restored: int | None = None
    """Times the model was bit-equal to the unedited one after EasyEdit's own restore."""
    num_restores: int | None = None
    """Times it was restored."""
    notes: tuple[str, ...] = ()
    """What differs from plain EasyEdit in this run."""
    cases: tuple[Mapping[str, Any], ...] = ()
    """EasyEdit's `pre` and `post` metrics of each case, and its `edit_time_s`."""
    error: str | None = None
    """Why the method did not run; the scores are None then."""

    def to_dict(self) -> dict[str, Any]:
        """Return the record as plain data for JSON."""
        return plain(asdict(self))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "RunResult":
        """Read what `to_dict` returned."""
        return cls(**{**data, "notes": tuple(data["notes"]), "cases": tuple(data["cases"])})


def plain(value: Any) -> Any:
    """Turn numpy values and arrays, tuples and mappings into what JSON can hold."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value


def summarise(cases: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Average the `post` metrics and the edit times of cases.

    Returns:
        The score and time fields of `RunResult`.
    """
    post = [case["post"] for case in cases]
    times = [case["edit_time_s"] for case in cases]
    return {
        "rewrite_acc": _mean(_values(m.get("rewrite_acc")) for m in post),
        "rephrase_acc": _mean(_values(m.get("rephrase_acc")) for m in post),
        "locality_acc": _mean(_key_means(m.get("locality", {})) for m in post),
        "portability_acc": _mean(_key_means(m.get("portability", {})) for m in post),
        "edit_time_s": median(times) if times else None,
        "edit_time_mean_s": fmean(times) if times else None,
    }


def _values(score: Any) -> list[float]:
    """Return all numbers in a score, which EasyEdit nests in lists."""
    return [] if score is None else [float(x) for x in np.ravel(np.asarray(score, dtype=float))]


def _key_means(section: Mapping[str, Any]) -> list[float]:
    """Return the mean of each accuracy of a section such as locality."""
    scores = [_values(score) for key, score in section.items() if key.endswith("_acc")]
    return [fmean(score) for score in scores if score]


def _mean(cases: Iterable[Sequence[float]]) -> float | None:
    """Average over the cases that have a score; None if none has."""
    means = [fmean(values) for values in cases if values]
    return fmean(means) if means else None
