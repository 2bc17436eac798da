"""Gates: the weight w(h) in [0, 1]^r with which each basis acts at a hidden state (Eq. 3).

The paper asks for "one logistic regression per basis". Its parameter counts leave (r + 1) D
parameters a layer for the gate, but the paper does not say how they are used. Three classes are
readings that fit these counts: `rms-sigmoid`, `softmax-null` and `basis-subspace`. Two others have
biases (`basis-subspace-bias`, `sigmoid`), and two are limits of the method: one weight for the
whole subspace (`subspace`), and ReFT (`one`).

Hidden states are divided by their root mean square first, so that one learning rate serves models
whose residual streams differ in scale. Shapes: B batch, T tokens, D hidden size, r rank.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def unit_rms(hidden: Tensor) -> Tensor:
    """Divide each hidden state by its root mean square; shape and dtype are kept."""
    return F.rms_norm(hidden, hidden.shape[-1:], eps=1e-6)


class Gate(nn.Module):
    """Maps hidden states [..., D] (fp32) to basis weights in [0, 1]^r: w = activate(W x + c).

    x is h / rms(h), and c is 0 for gates without a `bias`.

    Args:
        hidden_size: D.
        rank: r.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, hidden_size: int, rank: int) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.rank = rank
        self.register_parameter("bias", None)

    def inputs(self, hidden: Tensor) -> Tensor:
        """Return x, [..., D]."""
        return unit_rms(hidden)

    def activate(self, logits: Tensor) -> Tensor:
        """Return w, [..., r], of the logits W x + c, [..., n]: their sigmoid, unless overridden."""
        return torch.sigmoid(logits)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return w(h), [..., r]."""
        return self.activate(F.linear(self.inputs(hidden), self.weight, self.bias))


class RMSSigmoidGate(Gate):
    """w = sigmoid(W (g * h / rms(h))): a learned RMS norm before W; (r + 1) D parameters."""

    def __init__(self, hidden_size: int, rank: int) -> None:
        super().__init__(hidden_size, rank)
        self.scale = nn.Parameter(torch.ones(hidden_size, dtype=torch.float32))
        self.weight = nn.Parameter(torch.zeros(rank, hidden_size, dtype=torch.float32))

    def inputs(self, hidden: Tensor) -> Tensor:
        """Return g * h / rms(h), [..., D]."""
        return unit_rms(hidden) * self.scale


class SoftmaxNullGate(Gate):
    """w = softmax(W h / rms(h)) over r bases and a last class "no edit"; (r + 1) D parameters."""

    def __init__(self, hidden_size: int, rank: int) -> None:
        super().__init__(hidden_size, rank)
        self.weight = nn.Parameter(torch.zeros(rank + 1, hidden_size, dtype=torch.float32))

    def activate(self, logits: Tensor) -> Tensor:
        """Return w, [..., r]; each row sums to at most 1."""
        return torch.softmax(logits, dim=-1)[..., :-1]


class BasisSubspaceGate(Gate):
    """w = sigmoid(W h / rms(h)) * sigmoid(v . h / rms(h)); (r + 1) D parameters."""

    def __init__(self, hidden_size: int, rank: int) -> None:
        super().__init__(hidden_size, rank)
        self.weight = nn.Parameter(torch.zeros(rank + 1, hidden_size, dtype=torch.float32))

    def activate(self, logits: Tensor) -> Tensor:
        """Return w, [..., r]."""
        gates = torch.sigmoid(logits)  # [..., r + 1]
        return gates[..., :-1] * gates[..., -1:]


class BasisSubspaceBiasGate(BasisSubspaceGate):
    """w = sigmoid(W h / rms(h) + c) * sigmoid(v . h / rms(h) + d); (r + 1) (D + 1) parameters.

    The biases begin at c = -2 and d = 2 (ours): the whole subspace is open, but each basis is
    nearly closed until training opens it to some states.
    """

    def __init__(self, hidden_size: int, rank: int) -> None:
        super().__init__(hidden_size, rank)
        self.bias = nn.Parameter(torch.tensor([-2.0] * rank + [2.0], dtype=torch.float32))


class SigmoidGate(Gate):
    """w = sigmoid(W h / rms(h) + c): logistic regressions with a bias; r D + r parameters."""

    def __init__(self, hidden_size: int, rank: int) -> None:
        super().__init__(hidden_size, rank)
        self.weight = nn.Parameter(torch.zeros(rank, hidden_size, dtype=torch.float32))
        self.bias = nn.Parameter(torch.zeros(rank, dtype=torch.float32))


class SubspaceGate(Gate):
    """w = sigmoid(v . h / rms(h)) * 1: one weight for all bases (Table 4, "ss-w"); D parameters."""

    def __init__(self, hidden_size: int, rank: int) -> None:
        super().__init__(hidden_size, rank)
        self.weight = nn.Parameter(torch.zeros(1, hidden_size, dtype=torch.float32))

    def activate(self, logits: Tensor) -> Tensor:
        """Return w, [..., r], the same weight r times."""
        return torch.sigmoid(logits).expand(*logits.shape[:-1], self.rank)


class OneGate(Gate):
    """w = 1: the intervention of ReFT (Liu et al. 2025, Lemma 2.4); no parameters, no logits."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Return ones, [..., r]."""
        return hidden.new_ones(*hidden.shape[:-1], self.rank)


GATES: dict[str, Callable[[int, int], Gate]] = {
    "rms-sigmoid": RMSSigmoidGate,
    "softmax-null": SoftmaxNullGate,
    "basis-subspace": BasisSubspaceGate,
    "basis-subspace-bias": BasisSubspaceBiasGate,
    "sigmoid": SigmoidGate,
    "subspace": SubspaceGate,
    "one": OneGate,
}
