"""Past states: hidden states of past edits, and the displacement that each edit needs there (ours).

Why: an edit stays in force as long as Phi moves the hidden states h of its request by the same
Phi(h) - h, and leaves those of its irrelevant prompts in place. So a constant number of these
states is kept with their displacements (no texts), and after each later edit `training.settling`
trains Phi to restore the displacements. They also tell `guard.Guard` where the edit acts.

Needs torch only. Shapes: N states, D hidden size, m states at most.
"""

import random
from typing import Any

import torch
from torch import Tensor, nn

from baft_easyedit.method.whitening import Whitening

_ROUNDING = {torch.float32: 1e-4, torch.float64: 1e-4}
"""Largest difference of equal states, as a share of their mean absolute value. Of different prompts
of SmolLM2, the last states differ by .001 and more, in its chat template by .008 at layer 23."""
_COARSE_ROUNDING = 1e-2
"""That of other dtypes. In bfloat16 equal states can differ more, where they are computed anew."""


class PastStates(nn.Module):
    """Hidden states of past edits at one layer, and their wanted displacements Phi(h) - h.

    Args:
        hidden_size: D.
        most: m. The buffers grow up to it.
    """

    states: Tensor
    moves: Tensor
    count: Tensor

    def __init__(self, hidden_size: int, most: int) -> None:
        super().__init__()
        self.most = most
        self.register_buffer("states", torch.zeros(0, hidden_size, dtype=torch.float32))  # [N, D] h
        # [N, D] Phi(h) - h
        self.register_buffer("moves", torch.zeros(0, hidden_size, dtype=torch.float32))
        # number of states seen so far, less those that a later edit of their prompt replaced
        self.register_buffer("count", torch.zeros((), dtype=torch.float32))
        self._keys: Tensor | None = None

    @property
    def num_kept(self) -> int:
        """N, the number of kept states."""
        return min(int(self.count), len(self.states))

    @property
    def has_dropped(self) -> bool:
        """Whether there were more states than are kept."""
        return int(self.count) > self.most

    def takes(self, name: str, value: Tensor) -> bool:
        """Tell whether a buffer can have a value: the states have as many rows as are known."""
        own = self.get_buffer(name)
        rows = value.shape[: own.dim() - 1]
        return value.shape == (*rows, *own.shape[1:]) and all(n <= self.most for n in rows)

    def kept(self) -> tuple[Tensor, Tensor]:
        """Return the kept states and their wanted displacements, [N, D] each."""
        return self.states[: self.num_kept], self.moves[: self.num_kept]

    @torch.no_grad()
    def keys(self, whitening: Whitening) -> Tensor:
        """Return the kept states that want a displacement, whitened, of length 1, [K, D].

        They are computed once, until the states change.
        """
        if self._keys is None:
            states, moves = self.kept()
            self._keys = whitening.directions(states[moves.any(-1)])
        return self._keys

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_keys": None}

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        """Move or cast the states, whose keys are then computed again."""
        self._keys = None
        return super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]

    def _load_from_state_dict(self, state: Any, prefix: str, *args: Any) -> None:
        """Let the buffers have the sizes of those that are loaded."""
        self._keys = None
        for name, own in [*self.named_buffers()]:
            value = state.get(prefix + name)
            if value is not None and self.takes(name, value):
                with torch.inference_mode(False):  # whose tensors take no part in learning
                    setattr(self, name, own.new_zeros(value.shape))
        super()._load_from_state_dict(state, prefix, *args)

    @torch.no_grad()
    def accept(self, states: Tensor, moves: Tensor) -> None:
        """Let states that want no displacement want another; those of them that are kept.

        Args:
            states: h, [N, D].
            moves: Wanted displacements Phi(h) - h, [N, D].
        """
        if not len(states):
            return
        kept, wanted = self.kept()  # views
        distances, nearest = torch.cdist(kept, states, p=torch.inf).min(dim=1)
        rows = (distances == 0) & ~wanted.any(-1)  # a past edit may have moved an equal state
        wanted[rows] = moves[nearest[rows]]
        self._keys = None

    @torch.no_grad()
    def with_edit(
        self, states: Tensor, moves: Tensor, gone: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return the buffers with an edit's states added; this object does not change.

        If there are more than fit, older ones are dropped at random, and then the edit's last ones.

        Args:
            states: h, [N, D].
            moves: Wanted displacements Phi(h) - h, [N, D].
            gone: True for kept states that are dropped first, bool; None for none.
        """
        before, wanted = self.kept()
        stays = before.new_ones(len(before), dtype=torch.bool) if gone is None else ~gone
        num_old, most = int(stays.sum()), self.most
        generator = random.Random(int(self.count))
        order = [*range(num_old + len(states))]
        for left in range(num_old, max(0, most - len(states)), -1):
            del order[generator.randrange(left)]
        del order[most:]
        seen = self.count + (len(states) - int((~stays).sum()))
        return {
            "states": torch.cat([before[stays], states])[order],
            "moves": torch.cat([wanted[stays], moves])[order],
            "count": seen,
        }


@torch.no_grad()
def are_among(states: Tensor, others: Tensor) -> Tensor:
    """Tell of hidden states whether they are one of others, up to rounding, [N], bool.

    Args:
        states: h, [N, D].
        others: [M, D], in the dtype that the model computed them in.
    """
    share, others = _ROUNDING.get(others.dtype, _COARSE_ROUNDING), others.float()
    distances = torch.cdist(states.float(), others, p=1)  # [N, M]
    return (distances <= share * others.abs().sum(-1)).any(-1)
