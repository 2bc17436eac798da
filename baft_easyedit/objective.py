"""The objective L = L1 + R_bal + R_loc (Liu et al. 2025, Eq. 4). Needs torch only.

Shapes: B batch, T tokens, V vocabulary, r rank, N intervened positions of the edits, M intervened
positions of the irrelevant prompts.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from baft_easyedit.positions import IGNORED_LABEL


def answer_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """L1: teacher-forced cross-entropy of the answer tokens, their mean (Eq. 4).

    Args:
        logits: [B, T, V]; column t predicts the label of column t + 1.
        labels: [B, T]; -100 is ignored.

    Returns:
        Scalar, fp32, in nats per answer token.
    """
    predicted = logits[:, :-1].float().flatten(0, 1)  # [B (T - 1), V]
    return F.cross_entropy(predicted, labels[:, 1:].flatten(), ignore_index=IGNORED_LABEL)


class BasisUsage(nn.Module):
    """How much each basis of one layer has been used by the edits so far: the state of R_bal.

    Args:
        rank: r.
    """

    total: Tensor
    count: Tensor

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(rank))  # [r] sum of w over past positions
        self.register_buffer("count", torch.zeros(()))  # number of past positions

    @torch.no_grad()
    def add(self, weights: Tensor) -> None:
        """Count the basis weights [N, r] of a finished edit as past."""
        self.total += weights.sum(0)
        self.count += weights.shape[0]

    def mean_with(self, weights: Tensor) -> Tensor:
        """Return wbar, [r]: the mean weights over past and current positions [N, r].

        The gradient flows through the current positions only.
        """
        return (self.total + weights.sum(0)) / (self.count + weights.shape[0])


def load_balance(mean_weights: Tensor) -> Tensor:
    """R_bal of one layer: sum_k (wbar_k - wbar)^2 / ((r - 1) wbar), wbar = mean_k wbar_k (Eq. 4).

    This is the formula as printed; the paper's text calls it the squared coefficient of variation,
    which would divide by wbar^2.

    Args:
        mean_weights: wbar_k over current and past positions, [r].

    Returns:
        Scalar; 0 for a single basis.
    """
    rank = mean_weights.shape[0]
    if rank == 1:
        return mean_weights.new_zeros(())
    mean = mean_weights.mean()
    deviation = (mean_weights - mean).square().sum()
    return deviation / ((rank - 1) * mean.clamp_min(torch.finfo(mean.dtype).tiny))


def locality_margin(
    edit_weights: Tensor, irrelevant_weights: Tensor, alpha: float, beta: float, gamma: float
) -> Tensor:
    """R_loc of one layer: a hinge that closes the gate on irrelevant prompts (Eq. 4).

    hinge(w(h_ir) - alpha) + hinge(beta - w(h)) + hinge(gamma - (max w(h) - max w(h_ir)))

    The hinges are averaged over positions and bases; each maximum is over the bases and is averaged
    over positions (ours: the paper writes them for one position).

    Args:
        edit_weights: w(h), [N, r].
        irrelevant_weights: w(h_ir), [M, r].
        alpha: Weight that an irrelevant position may keep.
        beta: Weight that an edited position should reach.
        gamma: Wanted gap between the largest weights.

    Returns:
        Scalar.
    """
    closed = F.relu(irrelevant_weights - alpha).mean()
    opened = F.relu(beta - edit_weights).mean()
    gap = edit_weights.amax(-1).mean() - irrelevant_weights.amax(-1).mean()
    return closed + opened + F.relu(gamma - gap)


RESCALINGS = ("none", "match-first-step", "match-each-step")

_SMALLEST_TERM = 1e-6
_LARGEST_FACTOR = 100.0


class Rescaling:
    """Brings the regularisers to the magnitude of the answer loss.

    The paper says that "the three terms are rescaled to the same magnitude" without a formula, so
    the rule is named (ours): `none` leaves them; `match-first-step` multiplies a term by L1 / term
    as both are at the first step of an edit; `match-each-step` does so at every step. Factors are
    constants for the gradient and at most 100.

    Args:
        rule: One of `RESCALINGS`.
    """

    def __init__(self, rule: str) -> None:
        if rule not in RESCALINGS:
            raise ValueError(f"rescaling must be one of {', '.join(RESCALINGS)}; got {rule!r}")
        self.rule = rule
        self._first: dict[str, Tensor] = {}

    def factor(self, name: str, term: Tensor, answer: Tensor) -> Tensor:
        """Return the factor of one term.

        Args:
            name: Which term, to remember its first step.
            term: The regulariser, a scalar.
            answer: L1, a scalar.
        """
        if self.rule == "none":
            return torch.ones_like(term)
        if name in self._first:
            return self._first[name]
        ratio = answer.detach() / term.detach().clamp_min(_SMALLEST_TERM)
        ratio = ratio.clamp_max(_LARGEST_FACTOR)
        if self.rule == "match-first-step":
            self._first[name] = ratio
        return ratio
