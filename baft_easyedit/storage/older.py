"""States of older format versions, which are still read.

In version 1 the basis was a function of an unconstrained matrix, `raw_basis`, by QR. It is computed
once, and kept as it is from then on. Before version 3, A itself was kept, not A - R. The edit stays
the same up to rounding. One that is opened goes on from there; what was learned before cannot be
learned again bit for bit, but checkpoints are read. Before version 4, whitened statistics took in
the states of past edits, by a `past_weight`; they stay as they were left.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from baft_easyedit.method.intervention import orthonormal_rows

_NOW_CALLED: dict[str, dict[Any, str]] = {
    "rescaling": {"match-first-step": "match", "match-each-step": "match"},
    "engine": {"replay": "auto"},
}
"""Values of hyper-parameters, and what comes closest to them today."""

_GONE = (
    "past_weight",
    "rehearsal_policy",
    "rehearsal_spill_mib",
    "rank_growth",
    "rank_growth_every",
    "max_rank",
)


def converted(learned: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what was learned with `basis` [r, D] for each `raw_basis` [D, r], A - R for each A."""
    found = dict(_orthonormal(name, value) for name, value in learned.items())
    return dict(_difference(name, value, found) for name, value in found.items())


def converted_hparams(method: Mapping[str, Any]) -> dict[str, Any]:
    """Return the hyper-parameters of a kept edit with the values that are known today."""
    known = {name: _now_called(name, value) for name, value in method.items()}
    for name in _GONE:
        known.pop(name, None)
    added = {"parametrisation": "direct", "basis_lr": None, "past_states": 0, "settle_steps": 100}
    return added | known


def _now_called(name: str, value: Any) -> Any:
    """Return what a value of a hyper-parameter is called today."""
    return _NOW_CALLED.get(name, {}).get(value, value) if isinstance(value, str) else value


def _orthonormal(name: str, value: Tensor) -> tuple[str, Tensor]:
    """Convert a basis of version 1."""
    before, _, last = name.rpartition(".")
    if last != "raw_basis" or value.dim() != 2 or value.shape[0] < value.shape[1]:
        return name, value
    return f"{before}.basis", orthonormal_rows(value.mT).contiguous()


def _difference(name: str, value: Tensor, learned: Mapping[str, Tensor]) -> tuple[str, Tensor]:
    """Convert A."""
    before, _, last = name.rpartition(".")
    basis = learned.get(f"{before}.basis")
    if last != "source_weight" or basis is None or basis.shape != value.shape:
        return name, value
    return f"{before}.difference", value - basis
