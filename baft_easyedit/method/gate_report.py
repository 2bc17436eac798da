"""Statistics of the gates' basis weights, and warnings about gates that trained badly.

The training loop reports them for one edit call (`EditReport`), `bench.diagnosis` for a whole
benchmark. Needs torch only. Shapes: r rank, N intervened positions of the edits, M intervened
positions of the irrelevant prompts.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

COLLAPSE_DEVIATION = 0.01
"""A basis weight with a smaller standard deviation over inputs counts as constant. Weights that
differ by 0.02 between two halves of the inputs have a deviation of 0.01; 0.02 is the paper's
smallest gap gamma of R_loc (Liu et al. 2025, Table 5)."""
COLLAPSE_SHARE = 0.9
"""A gate has collapsed if at least this share of its basis weights is constant: of 12, all but
one."""
CLOSED_WEIGHT = 0.05
"""A constant gate with a smaller mean weight is closed. The value is the paper's smallest beta, the
weight that R_loc demands at edited positions (Liu et al. 2025, Table 5)."""
OPEN_WEIGHT = 0.95
"""A constant gate with a larger mean weight is open: nearly 1, as in ReFT (Lemma 2.4)."""
LARGEST_BASES = 0.25
"""`top_share` adds up the weight of this share of the bases: 3 of the paper's 12."""
IMBALANCE_SHARE = 0.9
"""Usage is unbalanced if the largest quarter of the bases carries more than this share."""


def coefficient_of_variation(usage: Tensor) -> float:
    """Return how unevenly bases are used: the standard deviation (with r - 1) over the mean.

    It is 0 if all bases are used alike. Its square times the mean of `usage` is R_bal as printed
    (Eq. 4); the paper's text describes R_bal as the square alone.

    Args:
        usage: wbar_k, the mean weight of each basis, [r].
    """
    if len(usage) == 1:
        return 0.0
    shares = _shares(usage)
    return (shares.std() / shares.mean()).item()


def num_largest(rank: int) -> int:
    """Return how many bases `top_share` adds up: a quarter, at least one."""
    return max(1, int(LARGEST_BASES * rank))


def top_share(usage: Tensor) -> float:
    """Return the share of the weight that the largest quarter of the bases carries.

    Args:
        usage: wbar_k, the mean weight of each basis, [r].
    """
    return _shares(usage).topk(num_largest(len(usage))).values.sum().item()


def _shares(usage: Tensor) -> Tensor:
    """Return each basis's share of the sum, fp64; equal shares if no basis was used."""
    usage = usage.double()
    total = usage.sum()
    return usage / total if total > 0 else torch.full_like(usage, 1 / len(usage))


def pooled_deviation(groups: Iterable[Tensor]) -> Tensor:
    """Return the standard deviation of each basis's weight over inputs, around its group's mean.

    The inputs of a group went through the same gate. Deviations are taken within groups, because
    differences between gates would hide that each of them treats all its inputs alike.

    Args:
        groups: Basis weights of one group each, [inputs, r].

    Returns:
        [r], fp64; NaN if no group has two inputs.
    """
    squares, freedom = torch.zeros((), dtype=torch.float64), 0
    for group in groups:
        weights = group.cpu().double()  # [inputs, r]
        squares = squares + (weights - weights.mean(0)).square().sum(0)
        freedom += len(weights) - 1
    return (squares / freedom).sqrt()


@dataclass(frozen=True)
class LayerGates:
    """Statistics of one layer's basis weights, one number for each basis."""

    edit_weights: tuple[float, ...]
    """Mean weight at the edits' intervened positions."""
    irrelevant_weights: tuple[float, ...] | None
    """Mean weight at the irrelevant prompts' positions; None without such prompts."""
    usage: tuple[float, ...]
    """wbar_k of R_bal: mean weight over current and past edits."""
    deviations: tuple[float, ...]
    """Standard deviation of the weight over the positions of edits and irrelevant prompts."""

    @classmethod
    def of(cls, edit: Tensor, irrelevant: Tensor, usage: Tensor) -> "LayerGates":
        """Compute the statistics of one edit call.

        Args:
            edit: Weights at the edits' positions, [N, r].
            irrelevant: Weights at the irrelevant prompts' positions, [M, r]; M may be 0.
            usage: wbar_k, [r].
        """
        edit, irrelevant = edit.detach(), irrelevant.detach()
        return cls(
            edit_weights=tuple(edit.mean(0).tolist()),
            irrelevant_weights=tuple(irrelevant.mean(0).tolist()) if len(irrelevant) else None,
            usage=tuple(usage.detach().tolist()),
            deviations=tuple(pooled_deviation([torch.cat([edit, irrelevant])]).tolist()),
        )

    @property
    def top_share(self) -> float:
        """Share of the weight that the largest quarter of the bases carries."""
        return top_share(torch.tensor(self.usage))


@dataclass(frozen=True)
class GateReport:
    """Statistics of the basis weights in one edit call, by layer."""

    layers: Mapping[int, LayerGates]

    def warnings(self) -> tuple[str, ...]:
        """Return warnings of what looks wrong and what to try; none if all is well."""
        layers = self.layers.items()
        collapse = collapse_warnings(
            {layer: gates.deviations for layer, gates in layers},
            {layer: fmean(gates.edit_weights) for layer, gates in layers},
        )
        rank = max(len(gates.usage) for _, gates in layers)
        imbalance = imbalance_warnings({layer: gates.top_share for layer, gates in layers}, rank)
        return (*collapse, *imbalance)


def collapse_warnings(
    deviations: Mapping[int, Sequence[float]], mean_weights: Mapping[int, float]
) -> tuple[str, ...]:
    """Warn of gates whose weights hardly depend on the input.

    Args:
        deviations: By layer, the standard deviation over inputs of each basis's weight.
        mean_weights: By layer, the mean weight over bases and inputs.

    Returns:
        One warning for each level (closed, open, between) at which gates are stuck.
    """
    stuck: dict[str, list[int]] = {}
    for layer, values in deviations.items():
        if fmean(value < COLLAPSE_DEVIATION for value in values) >= COLLAPSE_SHARE:
            stuck.setdefault(_collapse_advice(mean_weights[layer]), []).append(layer)
    return tuple(
        f"gate collapse in {_layers(layers)}: the weights of at least {COLLAPSE_SHARE:.0%} of the "
        f"bases are the same for all inputs (standard deviation below {COLLAPSE_DEVIATION}), "
        f"{fmean(mean_weights[layer] for layer in layers):.2f} on average. {advice}"
        for advice, layers in stuck.items()
    )


def _collapse_advice(mean_weight: float) -> str:
    """Return the meaning of a constant weight, and what to try."""
    if mean_weight < CLOSED_WEIGHT:
        return "The gate is closed and the edit idle there: lower locality_coef, or raise beta."
    if mean_weight > OPEN_WEIGHT:
        return (
            "The gate is open, as in ReFT: give the requests a loc_prompt, switch locality on, or "
            "raise locality_coef."
        )
    return "The gate has not learned to tell inputs apart: raise gate_lr, or num_steps."


def imbalance_warnings(top_shares: Mapping[int, float], rank: int) -> tuple[str, ...]:
    """Warn of layers where a few bases carry nearly all weight.

    Args:
        top_shares: By layer, the `top_share` of the bases' use.
        rank: r, bases per layer; a single one cannot be unbalanced.
    """
    largest = num_largest(rank)
    layers = [layer for layer, share in top_shares.items() if share > IMBALANCE_SHARE]
    if rank == 1 or not layers:
        return ()
    return (
        f"imbalance in {_layers(layers)}: {largest} of {rank} bases carry "
        f"{fmean(top_shares[layer] for layer in layers):.0%} of the weight (in balance "
        f"{largest / rank:.0%}), the others are idle: switch balance on, raise balance_coef, or "
        "lower rank.",
    )


def _layers(layers: Sequence[int]) -> str:
    """Name layers in a sentence."""
    return f"layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))}"
