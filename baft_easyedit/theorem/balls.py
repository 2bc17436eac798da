"""Stable balls and linear edits: the theorem that is measured, with its proof. Needs torch only.

Liu et al. 2025 argue in Section 2 (Theorem 2.3) that a linear update of hidden states must give up
either the edit or what should stay. This is our reading of it, in the terms of Eq. 1-3:

- Answer: the model's likeliest next token, as a function of the hidden state h of a prompt's last
  token at the output of one layer. All else in the model is fixed.
- Stable ball of h: the largest open ball around h in which the answer is that of h; rho(h) is its
  radius.
- Step of an edit: u(h) = Phi(h) - h. For ReFT, u(h) = H h + R^T b with H = R^T (A - R).

Let an edit be linear, let it give h_e another answer, and let d = |h_e - h_o|. Then

    (1)  | |u(h_o)| - |u(h_e)| |  <=  sigma_max(H) d
    (2)  |u(h_e)|  >=  rho(h_e)
    (3)  if |u(h_e)| - sigma_max(H) d  >=  rho(h_o), then Phi(h_o) is outside the stable ball of h_o
    (4)  if Phi(h_o) is inside it, then sigma_max(H)  >  (rho(h_e) - rho(h_o)) / d

Proof. (1): R^T b cancels, so |u(h_o) - u(h_e)| = |H (h_o - h_e)| <= sigma_max(H) d, and the reverse
triangle inequality gives (1). (2): inside the ball the answer would be the old one. (3): by (1),
|u(h_o)| >= rho(h_o). (4) is (3) turned around, with (2). So an edit that moves rephrasings alike (a
small sigma_max) moves all that lies near them, too. With a gate, u(h) = R^T diag(w(h)) (A h + b -
R h) is not linear, and none of this holds: where w(h) = 0, u(h) = 0.

A search for the nearest other answer finds one that is at least as far as the nearest: a measured
radius is an upper bound of rho, so what (3) says of measured radii is true of the real ones.

Shapes: D hidden size, K directions, N states, V vocabulary, r rank.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from baft_easyedit.method.intervention import BaFTIntervention

Logits = Callable[[Tensor], Tensor]
"""From hidden states [N, D] to the logits of the next token [N, V]."""

_LEAST = 1e-4
"""The shortest step of a search, as a share of its reach."""
_NUM_SCANNED = 12
_NUM_HALVINGS = 7
_OVERSHOOT = 1.02


def sigma_max(intervention: BaFTIntervention) -> float:
    """Return the largest singular value of H; it is that of A - R, as R has orthonormal rows."""
    return torch.linalg.matrix_norm(intervention.difference.detach(), 2).item()


def step(intervention: BaFTIntervention, hidden: Tensor) -> Tensor:
    """Return u(h) = Phi(h) - h of hidden states [..., D], in fp32; exactly 0 where w(h) is 0."""
    h = hidden.float()
    edited: Tensor = intervention(h)[0]
    return edited - h


def least_step(step_at_edited: float, sigma: float, distance: float) -> float:
    """Return the length that (1) demands of the step at another state; 0 if it demands none."""
    return max(0.0, step_at_edited - sigma * distance)


def least_sigma(radius_at_edited: float, radius: float, distance: float) -> float:
    """Return what (4) demands of sigma_max(H), so that another state can stay; 0 if nothing."""
    return max(0.0, (radius_at_edited - radius) / distance) if distance else 0.0


@torch.no_grad()
def radii(logits: Logits, hidden: Tensor, directions: Tensor, reach: float) -> Tensor:
    """Return how far one can go from a hidden state in each direction with the same answer.

    Steps of growing length are tried; then the first that changes the answer is bracketed more and
    more closely, to about 1%. A change between two tried steps that both keep the answer is missed.

    Args:
        logits: The model from the state on.
        hidden: h, [D].
        directions: Unit vectors, [K, D].
        reach: The longest step, which is returned if no step changes the answer.

    Returns:
        Upper bounds of rho(h), [K].
    """
    answer = logits(hidden[None]).argmax(-1)

    def keeps(lengths: Tensor) -> Tensor:
        states = hidden + lengths[..., None] * directions.expand(*lengths.shape, -1)
        return (logits(states.flatten(0, -2)).argmax(-1) == answer).view(lengths.shape)

    tried = reach * torch.logspace(0, 1, _NUM_SCANNED, base=_LEAST, device=hidden.device).flip(0)
    tried = torch.cat([tried.new_zeros(1), tried])
    kept = keeps(tried[1:, None].expand(-1, len(directions)))
    first = kept.int().cumprod(0).sum(0)  # [K], how many of the steps are before the first change
    inside, outside = tried[first], tried[(first + 1).clamp(max=_NUM_SCANNED)]
    for _ in range(_NUM_HALVINGS):
        middle = (inside + outside) / 2
        is_kept = keeps(middle)
        inside, outside = (
            torch.where(is_kept, middle, inside),
            torch.where(is_kept, outside, middle),
        )
    return outside


def random_directions(hidden: Tensor, count: int, seed: int) -> Tensor:
    """Draw unit vectors uniformly, [K, D]."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(count, len(hidden), generator=generator).to(hidden)
    return torch.nn.functional.normalize(drawn, dim=-1)


def adversarial_directions(logits: Logits, hidden: Tensor, count: int, rounds: int) -> Tensor:
    """Return the directions to the nearest states with other answers, as DeepFool finds them.

    For each of the `count` likeliest other tokens, the logits, through which gradients must pass,
    are made linear, the shortest step from h [D] to a tie is taken, and so on from there, `rounds`
    times (Moosavi-Dezfooli et al. 2016).

    Returns:
        Unit vectors, [K, D].
    """
    with torch.no_grad():
        answer, *others = logits(hidden[None])[0].topk(count + 1).indices
    rows = torch.arange(count, device=hidden.device)
    moved = torch.zeros(count, len(hidden), device=hidden.device)
    for _ in range(rounds):
        states = (hidden + moved).requires_grad_()
        given = logits(states)
        margins = given[:, answer] - given[rows, torch.stack(others)]
        (slopes,) = torch.autograd.grad(margins.sum(), states)
        lengths = margins.detach() / slopes.square().sum(-1).clamp(min=1e-12)
        moved = moved - _OVERSHOOT * lengths[:, None] * slopes
    return torch.nn.functional.normalize(moved, dim=-1)
