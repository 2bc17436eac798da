"""The intervention on one layer's output (Liu et al. 2025, Eq. 1-3). Needs torch only.

Other modules decide where it applies (`model.positions`), attach it to a model (`model.hooks`) and
train it (`objective`, `training`). Shapes: B batch, T tokens, D hidden size, r rank.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from baft_easyedit.method.gates import GATES


def orthonormal_rows(rows: Tensor) -> Tensor:
    """Turn any full-rank rows into an orthonormal basis by a thin QR decomposition.

    The signs of the basis vectors are chosen to make the diagonal of the triangular factor
    positive. So the basis is a continuous function of the rows, and orthonormal rows are returned
    as they are, up to rounding. After an optimiser step, this function is the retraction that makes
    R orthonormal again (Absil et al. 2008, Example 4.1.3).

    Args:
        rows: [..., r, D], r <= D.

    Returns:
        R, [..., r, D], with R R^T = 1, spanning the same subspace.
    """
    q, triangular = torch.linalg.qr(rows.mT)  # [..., D, r], [..., r, r]
    diagonal = torch.diagonal(triangular, dim1=-2, dim2=-1)
    signs = torch.where(diagonal < 0, -1.0, 1.0)  # [..., r]
    return (q * signs[..., None, :]).mT


def tangent(gradient: Tensor, basis: Tensor) -> Tensor:
    """Project a gradient on the directions along which a basis stays orthonormal, to first order.

    G - sym(G R^T) R, the gradient on the Stiefel manifold (Absil et al. 2008, Section 3.6.1).

    Args:
        gradient: G, the gradient for each entry of the basis, [..., r, D].
        basis: R, with orthonormal rows, [..., r, D].

    Returns:
        [..., r, D].
    """
    inner = gradient @ basis.mT  # [..., r, r]  G R^T
    return gradient - 0.5 * (inner + inner.mT) @ basis


def basis_edit(hidden: Tensor, basis: Tensor, step: Tensor, weights: Tensor) -> Tensor:
    """Move hidden states along each basis vector by a step times the basis's weight.

    For one hidden state h: h' = h + R^T diag(w) (A h + b - R h). (Liu et al. 2025, Eq. 3)

    Args:
        hidden: Hidden states h, [..., D].
        basis: Matrix R with orthonormal rows, [r, D].
        step: A h + b - R h, the wanted coordinates less the present ones, [..., r].
        weights: Basis weights w(h), each in [0, 1], [..., r].

    Returns:
        Edited hidden states h', [..., D].
    """
    return hidden + (weights * step) @ basis  # [..., D]


class BaFTIntervention(nn.Module):
    """Phi(h) = h + R^T diag(w(h)) (A h + b - R h), with orthonormal rows of R (Eq. 1-3).

    The parameter `basis` is R itself. After an optimiser step the rows of R are not orthonormal,
    so `ModelEdit.retract` makes them orthonormal again. (If R were a function of unconstrained
    parameters instead, their scale would grow from step to step and R would turn ever less.) The
    parameter `difference` is A - R; `training.coordinates` says how the optimiser moves both.

    Parameters are fp32, and the edit is computed in fp32, whatever the dtype of the hidden states.
    A new intervention has A = R and b = 0 bit for bit, so it changes nothing (ours: the paper does
    not give the initial values).

    Args:
        hidden_size: D.
        rank: Number of bases r, in [1, D].
        gate: A name of `gates.GATES`; "one" is ReFT.
        generator: Random generator of the initial basis; None for torch's default one.

    Raises:
        ValueError: If the rank is outside [1, D], or there is no such gate.
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
        if gate not in GATES:
            raise ValueError(f"gate must be one of {', '.join(GATES)}; got {gate!r}")
        columns = nn.init.orthogonal_(
            torch.empty(hidden_size, rank, dtype=torch.float32), generator=generator
        )
        self.basis = nn.Parameter(columns.mT.contiguous())
        self.difference = nn.Parameter(torch.zeros(rank, hidden_size, dtype=torch.float32))
        self.source_bias = nn.Parameter(torch.zeros(rank, dtype=torch.float32))
        self.gate = GATES[gate](hidden_size, rank)

    def step(self, hidden: Tensor) -> Tensor:
        """Return A h + b - R h, [..., r], of hidden states [..., D]."""
        return F.linear(hidden, self.difference, self.source_bias)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Edit hidden states.

        Args:
            hidden: h, [..., D], any floating dtype.

        Returns:
            Phi(h), [..., D], in the dtype of `hidden`; and the basis weights w(h), [..., r], fp32.
        """
        device = hidden.device.type
        if not torch.is_autocast_enabled(device):
            edited, weights = self._edit(hidden.float())
        else:
            with torch.autocast(device, enabled=False):
                edited, weights = self._edit(hidden.float())
        return edited.to(hidden.dtype), weights

    def _edit(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Return Phi(h) [..., D] and w(h) [..., r]."""
        weights = self.gate(h)
        return basis_edit(h, self.basis, self.step(h), weights), weights
