"""What edits do at the hidden states that they were learned on, once they are past (ours).

An edit is a function of hidden states of which only the values at a few were ever asked for: those
of its request, where h is to move, and of its irrelevant prompts, where it is not. They are kept,
of a constant number and without the texts, so that later edits can leave them alone; see
`settling`.

Needs torch only. Shapes: N states, D hidden size, m states at most.
"""

import random

import torch
from torch import Tensor, nn


class PastStates(nn.Module):
    """Hidden states of past edits at one layer, and their displacement Phi(h) - h.

    Args:
        hidden_size: D.
        most: m. Of more than that, each that ever came is as likely to be kept as another.
    """

    states: Tensor
    moves: Tensor
    count: Tensor

    def __init__(self, hidden_size: int, most: int) -> None:
        super().__init__()
        self.register_buffer("states", torch.zeros(most, hidden_size))  # [m, D] h
        self.register_buffer("moves", torch.zeros(most, hidden_size))  # [m, D] Phi(h) - h
        self.register_buffer("count", torch.zeros(()))  # of states that came so far

    @torch.no_grad()
    def forget(self) -> None:
        """Forget all states."""
        for value in self.buffers():
            value.zero_()

    @property
    def num_kept(self) -> int:
        """How many are kept, N."""
        return min(int(self.count), len(self.states))

    def kept(self) -> tuple[Tensor, Tensor]:
        """Return the states and their displacement, [N, D] each."""
        return self.states[: self.num_kept], self.moves[: self.num_kept]

    @torch.no_grad()
    def with_edit(self, states: Tensor, moves: Tensor) -> dict[str, Tensor]:
        """Return the buffers as they are once an edit is past.

        Args:
            states: h, [N, D].
            moves: Phi(h) - h, [N, D].
        """
        kept = {name: value.clone() for name, value in self.named_buffers()}
        most, seen = len(self.states), int(self.count)
        generator = random.Random(seen)
        for state, move in zip(states, moves, strict=True):
            place = seen if seen < most else generator.randrange(seen + 1)
            if place < most:  # Vitter's algorithm R
                kept["states"][place], kept["moves"][place] = state, move
            seen += 1
        kept["count"].fill_(seen)
        return kept
