"""Past states: hidden states of past edits, and the displacement that each edit needs there (ours).

Why: an edit stays in force as long as Phi moves the hidden states h of its request by the same
Phi(h) - h, and leaves those of its irrelevant prompts in place. So a constant number of these
states is kept with their displacements (no texts), and after each later edit `training.settling`
trains Phi to restore the displacements.

Needs torch only. Shapes: N states, D hidden size, m states at most.
"""

import random

import torch
from torch import Tensor, nn


class PastStates(nn.Module):
    """Hidden states of past edits at one layer, and their wanted displacements Phi(h) - h.

    Args:
        hidden_size: D.
        most: m. Of more states than m, a uniform random sample is kept.
    """

    states: Tensor
    moves: Tensor
    count: Tensor

    def __init__(self, hidden_size: int, most: int) -> None:
        super().__init__()
        self.register_buffer("states", torch.zeros(most, hidden_size))  # [m, D] h
        self.register_buffer("moves", torch.zeros(most, hidden_size))  # [m, D] Phi(h) - h
        self.register_buffer("count", torch.zeros(()))  # number of states seen so far

    @property
    def num_kept(self) -> int:
        """N, the number of kept states."""
        return min(int(self.count), len(self.states))

    @property
    def has_dropped(self) -> bool:
        """Whether there were more states than are kept."""
        return int(self.count) > len(self.states)

    def kept(self) -> tuple[Tensor, Tensor]:
        """Return the kept states and their wanted displacements, [N, D] each."""
        return self.states[: self.num_kept], self.moves[: self.num_kept]

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

    @torch.no_grad()
    def with_edit(self, states: Tensor, moves: Tensor) -> dict[str, Tensor]:
        """Return the buffers with an edit's states added; this object does not change.

        Args:
            states: h, [N, D].
            moves: Wanted displacements Phi(h) - h, [N, D].
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
