"""Convert states of older format versions, which stay the same edits up to rounding.

Version 1 kept an unconstrained matrix `raw_basis`, whose QR gave the basis. Versions 1 and 2 kept
A itself in place of A - R. Before version 4, whitened statistics took in the states of past edits,
by a `past_weight`. A converted edit goes on; what was learned before cannot be learned again bit
for bit, and its checkpoints are read.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from baft_easyedit.method.intervention import orthonormal_rows

_RENAMED = {
    ("rescaling", "match-first-step"): "match",
    ("rescaling", "match-each-step"): "match",
    ("engine", "replay"): "auto",
}
"""Values of hyper-parameters, and what comes closest to them today."""
_ADDED = {"parametrisation": "direct", "basis_lr": None, "past_states": 0, "settle_steps": 100}

_GONE = (
    "consolidate_every",
    "consolidate_steps",
    "past_weight",
    "rehearsal_cache_mib",
    "rehearsal_policy",
    "rehearsal_spill_mib",
    "rank_growth",
    "rank_growth_every",
    "max_rank",
)


def converted(learned: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what was learned with `basis` [r, D] for each `raw_basis` [D, r], A - R for each A."""
    found = dict(learned)
    for name, value in learned.items():
        before, _, last = name.rpartition(".")
        if last == "raw_basis" and value.dim() == 2 and value.shape[0] >= value.shape[1]:
            found[f"{before}.basis"] = orthonormal_rows(found.pop(name).mT).contiguous()
    for name in list(found):
        before, _, last = name.rpartition(".")
        basis = found.get(f"{before}.basis")
        if last == "source_weight" and basis is not None and basis.shape == found[name].shape:
            found[f"{before}.difference"] = found.pop(name) - basis
    return found


def converted_hparams(method: Mapping[str, Any]) -> dict[str, Any]:
    """Return the hyper-parameters of a kept edit with the values that are known today."""
    known = {
        name: _RENAMED.get((name, value), value) if isinstance(value, str) else value
        for name, value in method.items()
        if name not in _GONE
    }
    return _ADDED | known
