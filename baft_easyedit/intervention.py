"""The intervention on one layer's output (Liu et al. 2025, Eq. 1-3). Needs torch only.

Not here: where it applies (`positions`), how it reaches a model (`hooks`), how it is learned
(`objective`, `editor`). Shapes: B batch, T tokens, D hidden size, r rank.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from baft_easyedit.gates import make_gate, unit_rms


def orthonormal_rows(raw: Tensor) -> Tensor:
    """Turn any full-rank matrix into a basis by a thin QR decomposition.

    The signs are fixed so that the diagonal of the triangular factor is positive: the basis is then
    a continuous function of `raw`, and a `raw` with orthonormal columns is its own basis.

    Args:
        raw: Unconstrained matrix, [..., D, r], D >= r.

    Returns:
        R, [..., r, D], with R R^T = 1.
    """
    q, triangular = torch.linalg.qr(raw)  # [..., D, r], [..., r, r]
    diagonal = torch.diagonal(triangular, dim1=-2, dim2=-1)
    signs = torch.where(diagonal < 0, -1.0, 1.0)  # [..., r]
    return (q * signs[..., None, :]).mT


def basis_edit(hidden: Tensor, basis: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """Move `hidden` towards `target` along each basis, by that basis's weight.

    For one hidden state h: h' = h + R^T diag(w) (v - R h). (Liu et al. 2025, Eq. 3)

    Args:
        hidden: Hidden states h, [..., D].
        basis: Matrix R with orthonormal rows, [r, D].
        target: Wanted coordinates v = A h + b, [..., r].
        weights: Basis weights w(h), each in [0, 1], [..., r].

    Returns:
        Edited hidden states h', [..., D].

    Raises:
        ValueError: If a last dimension disagrees with `basis`.
    """
    rank, hidden_size = basis.shape
    if hidden.shape[-1] != hidden_size:
        raise ValueError(f"hidden has size {hidden.shape[-1]}, but the basis has {hidden_size}")
    if target.shape[-1] != rank:
        raise ValueError(f"target has {target.shape[-1]} coordinates, but the basis has {rank}")
    if weights.shape[-1] != rank:
        raise ValueError(f"weights has {weights.shape[-1]} entries, but the basis has {rank}")
    coords = hidden @ basis.mT  # [..., r]  R h
    return hidden + (weights * (target - coords)) @ basis  # [..., D]  h + R^T diag(w) (v - R h)


class _Folded(NamedTuple):
    """What forwards without gradients need of the parameters, multiplied out once."""

    basis: Tensor
    """R, [r, D]."""
    difference: Tensor
    """A - R, [r, D]: bit for bit 0 in a new intervention."""
    gate: Tensor
    """The gate's W, [n, D]."""


class BaFTIntervention(nn.Module):
    """Phi(h) = h + R^T diag(w(h)) (A h + b - R h), with orthonormal rows of R (Eq. 1-3).

    Parameters are fp32 and the edit is computed in fp32, whatever the dtype of the hidden states.
    A new intervention has A = R and b = 0 bit for bit, so it changes nothing (ours: the paper does
    not give the initial values).

    Args:
        hidden_size: D.
        rank: Number of bases r, in [1, D].
        gate: A name of `gates.GATES`; "one" is ReFT.
        generator: Source of the random basis; torch's default one if None.

    Raises:
        ValueError: If the rank is outside [1, D] or the gate is unknown.
    """

    def __init__(
        self,
        hidden_size: int,
        rank: int,
        gate: str = "rms-sigmoid",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= rank <= hidden_size:
            raise ValueError(f"rank must be in [1, {hidden_size}] (the hidden size); got {rank}")
        raw = nn.init.orthogonal_(torch.empty(hidden_size, rank), generator=generator)
        self.raw_basis = nn.Parameter(raw)
        self.source_weight = nn.Parameter(orthonormal_rows(raw.detach()).clone())
        self.source_bias = nn.Parameter(torch.zeros(rank))
        self.gate = make_gate(gate, hidden_size, rank)
        self._known: tuple[list[int], _Folded] | None = None

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        """Move or cast, with tensors that can be learned also where inference mode is on."""
        with torch.inference_mode(False):
            return super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def continue_from(self, smaller: "BaFTIntervention") -> None:
        """Take over what one of fewer bases has learned; the bases beyond change nothing (A = R).

        QR takes the columns in turn, so the first bases stay what they are, up to rounding.

        Raises:
            ValueError: If the gate cannot grow.
        """
        rank = smaller.raw_basis.shape[1]
        self.gate.continue_from(smaller.gate)
        self.raw_basis[:, :rank] = smaller.raw_basis
        self.source_weight.copy_(orthonormal_rows(self.raw_basis))
        self.source_weight[:rank] = smaller.source_weight
        self.source_bias[:rank] = smaller.source_bias

    def basis(self) -> Tensor:
        """Return R, [r, D], fp32, differentiable; without gradients it is computed once."""
        if torch.is_grad_enabled():
            return orthonormal_rows(self.raw_basis)
        return self._folded().basis

    def learned_source(self, hidden: Tensor) -> Tensor:
        """Return the wanted coordinates A h + b, [..., r], of hidden states [..., D]."""
        return F.linear(hidden, self.source_weight, self.source_bias)

    def forward(self, hidden: Tensor, basis: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Edit hidden states.

        Args:
            hidden: h, [..., D], any floating dtype.
            basis: R, [r, D], to take gradients with respect to it, and to compute without them by
                the same kernels; this module's own if None.

        Returns:
            Phi(h), [..., D], in the dtype of `hidden`; and the basis weights w(h), [..., r], fp32.
        """
        h, device = hidden.float(), hidden.device.type
        learns = torch.is_grad_enabled() or basis is not None
        edit = partial(self._edit, basis) if learns else self._edit_folded
        if torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                edited, weights = edit(h)
        else:
            edited, weights = edit(h)
        return edited.to(hidden.dtype), weights

    def _edit(self, basis: Tensor | None, h: Tensor) -> tuple[Tensor, Tensor]:
        """Return Phi(h) [..., D] and w(h) [..., r], differentiable."""
        weights = self.gate(h)
        basis = self.basis() if basis is None else basis
        return basis_edit(h, basis, self.learned_source(h), weights), weights

    def _edit_folded(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Return the same without gradients, as h + R^T diag(w) ((A - R) h + b): fewer products."""
        folded = self._folded()
        weights = self.gate.activate(F.linear(unit_rms(h), folded.gate))  # [..., r]  w(h)
        step = F.linear(h, folded.difference, self.source_bias)  # [..., r]  (A - R) h + b
        return h + (weights * step) @ folded.basis, weights

    def _folded(self) -> _Folded:
        """Return the parameters multiplied out; every token of a generation asks for them."""
        parameters = [*self._parameters.values(), *self.gate._parameters.values()]
        # A changed parameter has another version.
        key = [value for p in parameters if p is not None for value in (p.data_ptr(), p._version)]
        if self._known is None or self._known[0] != key:
            self._known = key, self._fold()
        return self._known[1]

    def _fold(self) -> _Folded:
        """Multiply the parameters out."""
        # On the CPU, where A was made of the same QR: another device's is equal but for rounding.
        basis = orthonormal_rows(self.raw_basis.cpu()).contiguous().to(self.raw_basis.device)
        return _Folded(basis, self.source_weight - basis, self.gate.matrix().to(basis))
