"""The objective L = L1 + R_bal + R_loc (Liu et al. 2025, Eq. 4). Needs torch only.

The regularisers average over the intervened positions of one edit. Leading dimensions, written ...,
are layers and independent edits, each of which gets its own value.
Shapes: B rows of T tokens, A answer tokens, V vocabulary, E edits, L layers, r rank.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the teacher-forced cross-entropy of each answer token, [A], fp32, in nats.

    Args:
        logits: The logits that predict each answer token, [A, V].
        labels: The answer tokens, [A].
    """
    return F.cross_entropy(logits.float(), labels, reduction="none")


def answer_loss(losses: Tensor, owners: Tensor, num_owners: int) -> Tensor:
    """Return L1 of Eq. 4, the mean loss of the answer tokens, for each owner (an edit or a text).

    Args:
        losses: The loss of each answer token, [A].
        owners: Index of each token's owner, [A]; a token with an index >= E has none and is left
            out.
        num_owners: E.

    Returns:
        [E], in nats per answer token; 0 for an owner without tokens.
    """
    everyone = torch.arange(num_owners, device=owners.device)
    owned = (owners[:, None] == everyone).to(losses.dtype)  # [A, E]  a matmul sums in a fixed order
    return losses @ owned / owned.sum(0).clamp_min(1)


def mean_at(values: Tensor, positions: Tensor) -> Tensor:
    """Average values [..., B, T] over the positions [..., B, T] that are True; [...]."""
    return (values * positions).sum((-2, -1)) / positions.sum((-2, -1))


class BasisUsage(nn.Module):
    """Sums of one layer's basis weights over all edits so far, for the means in R_bal (Eq. 4).

    Args:
        rank: r.
    """

    total: Tensor
    count: Tensor

    def __init__(self, rank: int) -> None:
        super().__init__()
        # [r] sum of w over past positions
        self.register_buffer("total", torch.zeros(rank, dtype=torch.float32))
        # number of past positions
        self.register_buffer("count", torch.zeros((), dtype=torch.float32))

    @classmethod
    def stacked(cls, layers: Sequence["BasisUsage"]) -> "BasisUsage":
        """Return a joint copy of L layers' usage: `total` [L, 1, r] and `count` [L, 1]."""
        joined, device = cls(len(layers[0].total)), layers[0].total.device
        joined.total = torch.stack([usage.total.to(device) for usage in layers])[:, None]
        joined.count = torch.stack([usage.count.to(device) for usage in layers])[:, None]
        return joined

    def with_current(self, weights: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return `total` [..., r] and `count` [...] with the current edit added.

        Args:
            weights: Basis weights of the current edit, [..., B, T, r].
            positions: True where they count, [..., B, T].
        """
        current = (weights * positions[..., None]).sum((-3, -2))  # [..., r]
        return self.total + current, self.count + positions.sum((-2, -1))

    def mean_with(self, weights: Tensor, positions: Tensor) -> Tensor:
        """Return wbar, [..., r]: the mean weights over past and current positions.

        The gradient flows through the current positions only. Arguments: see `with_current`.
        """
        total, count = self.with_current(weights, positions)
        return total / count[..., None]


def load_balance(mean_weights: Tensor) -> Tensor:
    """R_bal of one layer: sum_k (wbar_k - wbar)^2 / ((r - 1) wbar), wbar = mean_k wbar_k (Eq. 4).

    This is the formula as printed; the paper's text calls it the squared coefficient of variation,
    which would divide by wbar^2.

    Args:
        mean_weights: wbar_k over current and past positions, [..., r].

    Returns:
        [...]; 0 for a single basis.
    """
    rank = mean_weights.shape[-1]
    if rank == 1:
        return torch.zeros_like(mean_weights[..., 0])
    mean = mean_weights.mean(-1)
    deviation = (mean_weights - mean[..., None]).square().sum(-1)
    return deviation / ((rank - 1) * mean.clamp_min(torch.finfo(mean.dtype).tiny))


def locality_margin(
    edit_weights: Tensor,
    edit_positions: Tensor,
    irrelevant_weights: Tensor,
    irrelevant_positions: Tensor,
    *,
    alpha: float,
    beta: float,
    gamma: float,
) -> Tensor:
    """R_loc of one layer: a hinge that closes the gate on irrelevant prompts (Eq. 4).

    hinge(w(h_ir) - alpha) + hinge(beta - w(h)) + hinge(gamma - (max w(h) - max w(h_ir)))

    The hinges are averaged over positions and bases; each maximum is over the bases and is averaged
    over positions (ours: the paper writes them for one position).

    Args:
        edit_weights: w(h), [..., B, T, r].
        edit_positions: True where they count, [..., B, T].
        irrelevant_weights: w(h_ir), [..., B, T, r].
        irrelevant_positions: True where they count, [..., B, T].
        alpha: Weight that an irrelevant position may keep.
        beta: Weight that an edited position should reach.
        gamma: Wanted gap between the largest weights.

    Returns:
        [...].
    """
    closed = mean_at(F.relu(irrelevant_weights - alpha).mean(-1), irrelevant_positions)
    opened = mean_at(F.relu(beta - edit_weights).mean(-1), edit_positions)
    largest = mean_at(edit_weights.amax(-1), edit_positions)
    largest_irrelevant = mean_at(irrelevant_weights.amax(-1), irrelevant_positions)
    return closed + opened + F.relu(gamma - (largest - largest_irrelevant))


RESCALINGS = ("match", "none")

_SMALLEST_TERM = 1e-3
"""A smaller term is rescaled as if it had this value: R_bal begins at 0, and L1 / 0 is not
finite."""


def rescaling_factor(rule: str, term: Tensor, answer: Tensor) -> Tensor:
    """Return the factor that brings a regulariser to the magnitude of the answer loss.

    The paper says that "the three terms are rescaled to the same magnitude" and gives no formula.
    Ours has two rules: `match` multiplies a term by the present L1 / term, where a term below 1e-3
    counts as 1e-3; `none` leaves the term alone. No gradient flows through the factor.

    Args:
        rule: One of `RESCALINGS`.
        term: The regulariser, one value for each edit.
        answer: L1, one value for each edit.
    """
    if rule == "none":
        return torch.ones_like(term)
    return answer.detach() / term.detach().clamp_min(_SMALLEST_TERM)


def objective(answer: Tensor, terms: Mapping[str, tuple[float, Tensor]], rescaling: str) -> Tensor:
    """L = L1 + R_bal + R_loc, each regulariser rescaled and times its coefficient (Eq. 4), [E].

    Args:
        answer: L1, [E].
        terms: Coefficient and value, [E], of each regulariser in use.
        rescaling: One of `RESCALINGS`.
    """
    total = answer
    for coefficient, value in terms.values():
        term = value.to(answer.device)
        total = total + coefficient * rescaling_factor(rescaling, term, answer) * term
    return total
