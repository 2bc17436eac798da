"""Guard: an edit acts only at hidden states that are similar to those of past edits (ours).

Why: a gate (Eq. 2) is a half-space for each basis. It lets a share of the displacement through at
states that have a part of the edited direction, and the shares of many edits add up: enough to
change what a model says to unrelated prompts, above all in a chat template. Past states are known,
so their vicinity can be told exactly. Outside of it the model is that without the edit, bit for
bit. Similarity is the cosine in whitened coordinates, where unrelated states are nearly orthogonal.
GRACE (Hartvigsen et al. 2023) defers to the model likewise, by the Euclidean distance.

Needs torch only. Shapes: K states that an edit moves, D hidden size.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from baft_easyedit.method.past_states import PastStates
from baft_easyedit.method.whitening import Whitening


class Guard(NamedTuple):
    """Tells where the edit of one layer acts."""

    past: PastStates
    whitening: Whitening
    min_similarity: float
    """Least cosine similarity to a past edit's state, in [-1, 1)."""

    @torch.no_grad()
    def admits(self, hidden: Tensor, new: Tensor | None = None) -> Tensor:
        """Tell of hidden states whether the edit acts there, [...], bool.

        Args:
            hidden: h, [..., D].
            new: States of an edit that count beside those of past edits, [N, D].
        """
        with torch.autocast(hidden.device.type, enabled=False):
            return self.similarity(hidden.float(), new) >= self.min_similarity

    def similarity(self, hidden: Tensor, new: Tensor | None = None) -> Tensor:
        """Return the largest cosine similarity of states to a past edit's; see `admits`."""
        keys = self.past.keys(self.whitening)  # [K, D]
        if new is not None:
            keys = torch.cat([keys, self.whitening.directions(new)])
        if not len(keys):
            return hidden.new_full(hidden.shape[:-1], -torch.inf)
        similarity = self.whitening.directions(hidden) @ keys.mT  # [..., K]
        return similarity.amax(-1)
