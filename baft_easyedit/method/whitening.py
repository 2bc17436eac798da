"""Whitened coordinates, in which a layer's hidden states vary equally in all directions (ours).

Why: the common mean and a handful of dimensions dominate all hidden states h, so all are similar to
each other. Whitened states z = K^-1/2 diag(deviation)^-1 (h - mu) have no dominant direction, and
those of unrelated texts are nearly orthogonal. K^-1 is for hidden states what ROME's C^-1 is for
keys (Meng et al. 2022, Eq. 2).

Needs torch only. Shapes: N states, D hidden size, m principal directions.
"""

import torch
from torch import Tensor, nn

MOST_DIRECTIONS = 256
"""The largest m; it bounds the m D numbers that each layer stores."""

_SHARE = 0.9
"""Weight of the correlations in K; the rest is the identity, which bounds K^-1/2."""


def principal_rows(rows: Tensor, most: int) -> Tensor:
    """Return orthogonal rows F, the longest first, such that F^T F is nearest to rows^T rows.

    Args:
        rows: [N, D].
        most: The number of rows of F.

    Returns:
        [most, D], fp32, filled up with rows of zeros.
    """
    exact = rows.double()
    if len(rows) > rows.shape[1]:
        values, vectors = torch.linalg.eigh(exact.mT @ exact)
        found = vectors.mT * values.clamp_min(0).sqrt()[:, None]
    else:
        found = torch.linalg.eigh(exact @ exact.mT).eigenvectors.mT @ exact
    kept = found.flip(0)[:most].float()
    return nn.functional.pad(kept, (0, 0, 0, most - len(kept)))


class Whitening(nn.Module):
    """Statistics of the hidden states at one layer's output, and z of states.

    K = floor 1 + F^T F approximates 0.9 times the correlation matrix plus 0.1 times the identity.

    Args:
        hidden_size: D.
    """

    mean: Tensor
    deviation: Tensor
    floor: Tensor
    root: Tensor

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(hidden_size, dtype=torch.float32))  # [D] mu
        # [D]; 0 until it is known
        self.register_buffer("deviation", torch.zeros(hidden_size, dtype=torch.float32))
        self.register_buffer("floor", torch.zeros((), dtype=torch.float32))
        most = min(hidden_size, MOST_DIRECTIONS)
        # [m, D] F, orthogonal rows
        self.register_buffer("root", torch.zeros(most, hidden_size, dtype=torch.float32))

    @property
    def is_known(self) -> bool:
        """Whether the statistics were measured."""
        return bool(self.deviation.any())

    @torch.no_grad()
    def measure(self, states: Tensor) -> None:
        """Measure the statistics of irrelevant states, [N, D], in place of earlier ones.

        Raises:
            FloatingPointError: If a state is not finite.
        """
        if not torch.isfinite(states).all():
            raise FloatingPointError(
                "hidden states of the model's own texts must be finite to be whitened, and are not:"
                " load the model in a wider dtype, or set min_similarity to null"
            )
        exact = states.double()
        self.mean.copy_(exact.mean(0))
        deviation = exact.std(0)
        self.deviation.copy_(deviation.clamp_min(1e-3 * deviation.median()))
        units = self._in_units(states) * (_SHARE / len(states)) ** 0.5
        self.root.copy_(principal_rows(units, len(self.root)))
        rest = units.square().sum() - self.root.square().sum()
        self.floor.copy_(1 - _SHARE + rest.clamp_min(0) / len(self.mean))

    def _in_units(self, states: Tensor) -> Tensor:
        """Return (h - mu) / deviation, [..., D]."""
        return (states.float() - self.mean) / self.deviation

    def whitened(self, states: Tensor) -> Tensor:
        """Return z = K^-1/2 (h - mu) / deviation, [..., D], by the eigenvectors of F^T F."""
        rows = self._in_units(states)
        lengths = self.root.square().sum(-1)  # [m] eigenvalues
        axes = self.root / lengths.sqrt().clamp_min(torch.finfo(self.root.dtype).tiny)[:, None]
        shrunk = (self.floor + lengths).rsqrt() - self.floor.rsqrt()  # [m]
        return rows * self.floor.rsqrt() + (rows @ axes.mT * shrunk) @ axes
