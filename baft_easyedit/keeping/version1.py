"""States of format version 1, which are still read.

Their basis was a function of an unconstrained matrix, `raw_basis`, by QR. It is computed once, and
kept as it is from then on: the edit stays the same up to rounding. An edit that is opened goes on
from there; what was learned before cannot be learned again bit for bit, but checkpoints are read.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from baft_easyedit.intervention import orthonormal_rows

_NOW_CALLED: dict[str, dict[Any, str]] = {
    "rescaling": {"match-first-step": "match", "match-each-step": "match"},
    "engine": {"replay": "auto"},
}
"""Values of hyper-parameters, and what comes closest to them today."""


def converted(learned: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what was learned with each `raw_basis` [D, r] replaced by its `basis` [r, D]."""
    return dict(_converted(name, value) for name, value in learned.items())


def converted_hparams(method: Mapping[str, Any]) -> dict[str, Any]:
    """Return the hyper-parameters of a kept edit with the values that are known today."""
    return {name: _now_called(name, value) for name, value in method.items()}


def _now_called(name: str, value: Any) -> Any:
    """Return what a value of a hyper-parameter is called today."""
    return _NOW_CALLED.get(name, {}).get(value, value) if isinstance(value, str) else value


def _converted(name: str, value: Tensor) -> tuple[str, Tensor]:
    """Convert one value."""
    before, _, last = name.rpartition(".")
    if last != "raw_basis" or value.dim() != 2 or value.shape[0] < value.shape[1]:
        return name, value
    return f"{before}.basis", orthonormal_rows(value.mT).contiguous()
