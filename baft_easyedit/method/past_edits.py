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

The last token of a prompt has read all of it, and that of a rephrasing has a state of its own. The
states of the words before, and of an edit's answer, differ less between the two, but stand in other
texts, too. So the distance, 1 - cosine, to these counts twice.

Needs torch only. Shapes: n states of an edit, N of all E past edits, M parameters of an
intervention, D hidden size, r rank.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import vector_to_parameters

from baft_easyedit.method.intervention import BaFTIntervention
from baft_easyedit.method.whitening import Whitening

_ROUNDING = 1e-4
"""Largest difference of equal states, as a share of their mean absolute value. Of different prompts
of SmolLM2, the last states differ by .001 and more, in its chat template by .008 at layer 23."""
_COARSE_ROUNDING = 1e-2
"""That of states in half precision, which can differ more where they are computed anew."""
_COUNT = 2.0
"""How often the distance to a state counts that is not of a prompt's last token."""


class PastEdit(NamedTuple):
    """A past edit at one layer. Its tensors never change, so that snapshots share them."""

    states: Tensor
    """The hidden states h that it acts at, [n, D]; the first is that of its prompt's last token."""
    values: Tensor
    """The parameters of its intervention, [M]."""


class PastEdits(nn.Module):
    """The past edits of one layer.

    Args:
        hidden_size: D.
        rank: r of each edit.
        gate: A name of `gates.GATES`.
    """

    _empty: Tensor

    def __init__(self, hidden_size: int, rank: int, gate: str) -> None:
        super().__init__()
        self._shape = (hidden_size, rank, gate)
        with torch.device("meta"):
            own = dict(BaFTIntervention(*self._shape).named_parameters())
        self._names, self._size = [*own], sum(p.numel() for p in own.values())
        self.register_buffer("_empty", torch.zeros(0, dtype=torch.float32), persistent=False)
        self.edits: tuple[PastEdit, ...] = ()
        """The oldest first."""
        self._forget()

    def _forget(self) -> None:
        """Drop what was computed from the edits."""
        self._keys: tuple[Tensor, Tensor, Tensor] | None = None
        self._interventions: dict[int, BaFTIntervention] = {}

    @property
    def states(self) -> Tensor:
        """All states that an edit acts at, [N, D]."""
        none = self._empty.view(0, self._shape[0])
        return torch.cat([none, *(edit.states for edit in self.edits)])

    @property
    def num_parameters(self) -> int:
        """E M, the number of parameters of all edits."""
        return len(self.edits) * self._size

    def takes(self, tensors: Mapping[str, Tensor]) -> bool:
        """Tell whether these can be the tensors of past edits, by `state_dict` names."""
        count, size = len(tensors) // 2, self._shape[0]
        names = {f"{i}.{name}" for i in range(count) for name in PastEdit._fields}
        return tensors.keys() == names and all(
            value.shape == (self._size,)
            if name.endswith("values")
            else value.dim() == 2 and len(value) > 0 and value.shape[1] == size
            for name, value in tensors.items()
        )

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

        It is 1 less the smallest distance. Without any past edit it is -inf, and the index 0.
        """
        with torch.autocast(hidden.device.type, enabled=False):
            if self._keys is None:  # computed once, until the edits change
                self._keys = whitening.directions(self.states), *self._owners()
            keys, owner, counts = self._keys
            if not len(keys):
                lowest = hidden.new_full(hidden.shape[:-1], -torch.inf, dtype=torch.float32)
                return lowest, torch.zeros_like(lowest, dtype=torch.long)
            distances = counts * (1 - whitening.directions(hidden.float()) @ keys.mT)
            smallest, which = distances.min(-1)
            return 1 - smallest, owner[which]

    def _owners(self) -> tuple[Tensor, Tensor]:
        """Return the edit of each state, and how often the distance to the state counts, [N]."""
        sizes = [len(edit.states) for edit in self.edits]
        owners = [i for i, size in enumerate(sizes) for _ in range(size)]
        counts = [1.0 if place == 0 else _COUNT for size in sizes for place in range(size)]
        owner = torch.tensor(owners, dtype=torch.long, device=self._empty.device)
        return owner, torch.tensor(counts, device=owner.device)

    def intervention(self, index: int) -> BaFTIntervention:
        """Return the intervention of one past edit; its parameters are views of its `values`."""
        if index not in self._interventions:
            with torch.inference_mode(False), torch.no_grad():
                with torch.device("meta"):
                    own = BaFTIntervention(*self._shape).requires_grad_(False)
                values = self.edits[index].values
                own.to_empty(device=values.device)
                vector_to_parameters(values, own.parameters())
            self._interventions[index] = own
        return self._interventions[index]

    def vector(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """Return the parameters of an intervention, by their names there, as `values`, [M]."""
        return torch.cat([parameters[name].detach().flatten() for name in self._names])

    @torch.no_grad()
    def shared_with(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Tell which states go when an edit is added, of those that it shares with past edits.

        An edit of the same prompt goes as a whole. Of other edits, the new one takes the state of
        its prompt's last token, without which it could not begin, and leaves them all others, such
        as those of the same first words: so it changes nothing of what they do.

        Args:
            states: The states of the new edit, as in `PastEdit`, [n, D].

        Returns:
            True for present states that go, [N], and for new ones that do, [n].
        """
        equal = are_equal(self.states, states).cpu()  # [N, n]
        parts = torch.split(equal[:, :1], [len(edit.states) for edit in self.edits])
        gone = [own | own[0] for own in parts]  # all of an edit whose first state is the new one's
        gone_here = torch.cat([equal.new_zeros(0, 1), *gone])[:, 0]
        gone_new = (equal & ~gone_here[:, None]).any(0)
        gone_new[0] = False
        return gone_here, gone_new

    @torch.no_grad()
    def with_edit(
        self, states: Tensor, values: Tensor, gone: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return the edits and a new one, by `state_dict` names; this object does not change.

        Args:
            states: The hidden states that the new edit acts at, as in `PastEdit`, [n, D].
            values: The parameters of its intervention, [M].
            gone: True for present states that go, [N], bool, on the CPU; None for none.
        """
        edits = [*self.edits]
        if gone is not None and gone.any():
            parts = torch.split(gone.to(states.device), [len(own) for own, _ in edits])
            edits = [
                PastEdit(own[~part], kept) if part.any() else PastEdit(own, kept)
                for (own, kept), part in zip(edits, parts, strict=True)
                if not part.all()
            ]
        return _tensors([*edits, PastEdit(states.float(), values)])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_keys": None, "_interventions": {}}

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move or cast the tensors."""
        self._forget()
        self.edits = tuple(PastEdit(*map(fn, edit)) for edit in self.edits)
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, value in _tensors(self.edits).items():
            destination[prefix + name] = value

    def _load_from_state_dict(
        self, state: Any, prefix: str, _metadata: Any, _strict: Any, *lists: Any
    ) -> None:
        """Have the edits that are loaded, and share their tensors where these can be learned."""
        own = {n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)}
        if not self.takes(own):
            lists[-1].append(f"{prefix}* are not the tensors of edits of this rank and gate")
            return
        self._forget()
        with torch.inference_mode(False):  # whose tensors take no part in learning
            self.edits = tuple(
                PastEdit(*(self._own(own[f"{i}.{name}"]) for name in PastEdit._fields))
                for i in range(len(own) // 2)
            )

    def _own(self, value: Tensor) -> Tensor:
        """Return a tensor on this device, a copy only if it must be one."""
        value = value.clone() if value.is_inference() else value
        return value.to(self._empty.device)


def _tensors(edits: Iterable[PastEdit]) -> dict[str, Tensor]:
    """Return the tensors of edits by their `state_dict` names."""
    return {f"{i}.{n}": v for i, edit in enumerate(edits) for n, v in edit._asdict().items()}


@torch.no_grad()
def are_equal(states: Tensor, others: Tensor) -> Tensor:
    """Tell of hidden states whether they are the same as others, up to rounding, [N, K], bool.

    Args:
        states: h, [N, D].
        others: [K, D].
    """
    states, others = states.float(), others.float()
    is_coarse = _is_half(states)[:, None] | _is_half(others)
    share = torch.where(is_coarse, _COARSE_ROUNDING, _ROUNDING)
    return torch.cdist(states, others, p=1) <= share * others.abs().sum(-1)


def _is_half(states: Tensor) -> Tensor:
    """Tell of fp32 states whether they were computed in half precision, [N], bool."""
    same = [(states == states.to(dtype).float()).all(-1) for dtype in (torch.bfloat16, torch.half)]
    return same[0] | same[1]
