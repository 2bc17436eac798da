"""Past edits: each has bases of its own, and acts near its own hidden states only (ours).

Why: where all edits share R, A, b and the gate (Eq. 1-3), learning one changes what the earlier
ones do. And a gate is a half-space for each basis: it lets a share of the displacement through at
states that have a part of the edited direction, and the shares of many edits add up. But the hidden
states that an edit was learned at are known, so their vicinity can be told exactly. At a state that
is similar enough to one of them, the edit with the most similar one acts, with the parameters that
it was learned with; at all others the model is that without edits, bit for bit. So an edit is
learned as if it were the first, and no later one changes it. Similarity is the cosine in whitened
coordinates, where unrelated states are nearly orthogonal. GRACE (Hartvigsen et al. 2023) chooses
among past edits likewise, by the Euclidean distance.

Needs torch only. Shapes: N states of past edits, E edits, M parameters of an intervention, D hidden
size, r rank.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import vector_to_parameters

from baft_easyedit.method.intervention import BaFTIntervention
from baft_easyedit.method.whitening import Whitening

_ROUNDING = {torch.float32: 1e-4, torch.float64: 1e-4}
"""Largest difference of equal states, as a share of their mean absolute value. Of different prompts
of SmolLM2, the last states differ by .001 and more, in its chat template by .008 at layer 23."""
_COARSE_ROUNDING = 1e-2
"""That of other dtypes. In bfloat16 equal states can differ more, where they are computed anew."""


class PastEdits(nn.Module):
    """The past edits of one layer.

    Args:
        hidden_size: D.
        rank: r of each edit.
        gate: A name of `gates.GATES`.
    """

    states: Tensor
    owners: Tensor
    values: Tensor

    def __init__(self, hidden_size: int, rank: int, gate: str) -> None:
        super().__init__()
        self._shape = (hidden_size, rank, gate)
        with torch.device("meta"):
            own = dict(BaFTIntervention(*self._shape).named_parameters())
        self._names, size = [*own], sum(p.numel() for p in own.values())
        empty = torch.zeros(0, dtype=torch.float32)
        self.register_buffer("states", empty.view(0, hidden_size))  # [N, D] h
        self.register_buffer("owners", empty)  # [N] the index of a state's edit
        self.register_buffer("values", empty.view(0, size))  # [E, M] parameters
        self._forget()

    def _forget(self) -> None:
        """Drop what was computed from the buffers."""
        self._keys: Tensor | None = None
        self._interventions: dict[int, BaFTIntervention] = {}

    def takes(self, name: str, value: Tensor) -> bool:
        """Tell whether a buffer can have a value: there may be any number of rows."""
        return value.shape[1:] == self.get_buffer(name).shape[1:] and value.dim() > 0

    def forward(
        self, hidden: Tensor, whitening: Whitening, min_similarity: float
    ) -> tuple[Tensor, Tensor]:
        """Edit each hidden state by the past edit that is nearest to it.

        Args:
            hidden: h, [..., D], any floating dtype.
            whitening: The coordinates in which similarities are cosines.
            min_similarity: Least similarity to a state of an edit at which that edit acts.

        Returns:
            The edited states, [..., D], in the dtype of `hidden`; and the basis weights, [..., r],
            fp32, which are 0 where no edit acts.
        """
        similarity, owner = self.nearest(hidden, whitening)
        edited = hidden.clone()
        weights = hidden.new_zeros(*hidden.shape[:-1], self._shape[1], dtype=torch.float32)
        acts = similarity >= min_similarity
        for index in torch.unique(owner[acts]).tolist():
            here = acts & (owner == index)
            edited[here], weights[here] = self.intervention(index)(hidden[here])
        return edited, weights

    @torch.no_grad()
    def nearest(self, hidden: Tensor, whitening: Whitening) -> tuple[Tensor, Tensor]:
        """Return the largest similarity to a state of an edit, and that edit's index, [...] each.

        Without any past edit the similarity is -inf, and the index 0.
        """
        with torch.autocast(hidden.device.type, enabled=False):
            if self._keys is None:  # computed once, until the states change
                self._keys = whitening.directions(self.states)
            if not len(self._keys):
                lowest = hidden.new_full(hidden.shape[:-1], -torch.inf, dtype=torch.float32)
                return lowest, torch.zeros_like(lowest, dtype=torch.long)
            similarity = whitening.directions(hidden.float()) @ self._keys.mT  # [..., N]
            largest, which = similarity.max(-1)
            return largest, self.owners[which].long()

    def intervention(self, index: int) -> BaFTIntervention:
        """Return the intervention of one past edit; its parameters are views of `values`."""
        if index not in self._interventions:
            with torch.inference_mode(False), torch.no_grad():
                with torch.device("meta"):
                    own = BaFTIntervention(*self._shape).requires_grad_(False)
                own.to_empty(device=self.values.device)
                vector_to_parameters(self.values[index], own.parameters())
            self._interventions[index] = own
        return self._interventions[index]

    def vector(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """Return the parameters of an intervention, by their names there, as a row of `values`."""
        return torch.cat([parameters[name].detach().flatten() for name in self._names])

    @torch.no_grad()
    def replaced_by(self, states: Tensor, num_prompt: int) -> Tensor:
        """Tell which states go when an edit is added, [N], bool.

        They are those that the new edit has, too, and all of an edit of the same prompt.

        Args:
            states: The states of the new edit, the first ones those of its prompt, [K, D].
            num_prompt: How many are of its prompt.
        """
        equal = are_equal(self.states, states)  # [N, K]
        gone = equal.any(-1)
        for owner in torch.unique(self.owners[gone]):
            own = self.owners == owner
            if equal[own, :num_prompt].any(0).all():
                gone = gone | own
        return gone

    @torch.no_grad()
    def with_edit(
        self, states: Tensor, parameters: Tensor, gone: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return the buffers with an edit added; this object does not change.

        Args:
            states: The hidden states that the edit acts at, [N', D].
            parameters: Those of its intervention, a `vector`, [M].
            gone: True for present states that no edit has any more, [N], bool; None for none.
        """
        stays = slice(None) if gone is None else ~gone
        new = self.owners.new_full((len(states),), len(self.values))
        owners = torch.cat([self.owners[stays], new])
        kept, owners = torch.unique(owners, return_inverse=True)  # an edit without states goes
        values = torch.cat([self.values, parameters[None]])
        return {
            "states": torch.cat([self.states[stays], states.float()]),
            "owners": owners.float(),
            "values": values[kept.long()],
        }

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_keys": None, "_interventions": {}}

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        """Move or cast the buffers."""
        self._forget()
        return super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]

    def _load_from_state_dict(self, state: Any, prefix: str, *args: Any) -> None:
        """Let the buffers have the sizes of those that are loaded."""
        self._forget()
        for name, own in [*self.named_buffers()]:
            value = state.get(prefix + name)
            if value is not None and self.takes(name, value):
                with torch.inference_mode(False):  # whose tensors take no part in learning
                    setattr(self, name, own.new_zeros(value.shape))
        super()._load_from_state_dict(state, prefix, *args)


@torch.no_grad()
def are_equal(states: Tensor, others: Tensor) -> Tensor:
    """Tell of hidden states whether they are the same as others, up to rounding, [N, K], bool.

    Args:
        states: h, [N, D].
        others: [K, D], in the dtype that the model computed them in.
    """
    share, others = _ROUNDING.get(others.dtype, _COARSE_ROUNDING), others.float()
    return torch.cdist(states.float(), others, p=1) <= share * others.abs().sum(-1)
