"""Past edits: each has bases of its own, and acts near its own hidden states only (ours).

An edit keeps the hidden states that it was learned at. At a state that is similar enough to one of
them, the edit with the most similar one acts, with the parameters that it was learned with; at all
others the model is that without edits, bit for bit. So an edit is learned as if it were the first,
and no later one changes it. GRACE (Hartvigsen et al. 2023) chooses among past edits likewise, by
the Euclidean distance.

Why: where all edits share R, A, b and the gate (Eq. 1-3), learning one changes what the earlier
ones do. And a gate is a half-space for each basis: it lets a share of the displacement through at
states that have a part of the edited direction, and the shares of many edits add up.

Similarity of h to a state e is the mean of the cosines between z(h) - z(c) and z(e) - z(c), over
the centres c of e, in the whitened coordinates z, where unrelated states are nearly orthogonal.
The state at the prompt's last token has two centres:

1. What it is on average with similar names in the subject's place. The last states of prompts of
   one form ("The capital of ... is") differ by their subjects in a small part only; from here the
   form cancels out, and the subject is left. (This centre is of the unedited model, but from the
   second edited layer on, e is what the edit at earlier layers left. So where the edit acts there,
   it is likely to act here.)
2. The mean of all texts, from where the form counts, too: what is near by chance from one centre is
   hardly so from both.

Other states have no centre, nor has this one if no subject is known or similar names hardly change
it. Then the distance is 1 - cosine from 0, and counts twice, as the words of a prompt and of its
answer stand in other texts, too.

Needs torch only. Shapes: n states and C centres of an edit, N states of all E past edits, M
parameters of an intervention, D hidden size, r rank.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import vector_to_parameters

from baft_easyedit.method.intervention import BaFTIntervention
from baft_easyedit.method.whitening import Whitening

_ROUNDING = 1e-4
"""Largest difference of equal states, as a share of their mean absolute value."""
_COUNT = 2.0
"""How often the distance to a state without a centre counts."""
_LEAST_APART = 0.02
"""Share of a whitened state's length from which its distance to a centre is more than rounding; of
the edited prompts of SmolLM2 it is .2 and more."""
_TINY = torch.finfo(torch.float32).tiny
"""What keeps a division by 0 finite."""
UNKNOWN = 0
"""Stands for the hash of tokens that an earlier development version did not keep."""


class PastEdit(NamedTuple):
    """A past edit at one layer. Its tensors never change, so that snapshots share them."""

    states: Tensor
    """The hidden states that it acts at, e, [n, D]; the first is of its prompt's last token."""
    texts: Tensor
    """A hash of the tokens that each state is of, up to its own, [n], int64; 0 if not known."""
    centre: Tensor
    """The centres c of the first state, [C, D]; C is 0 where no subject is known."""
    values: Tensor
    """The parameters of its intervention, [M]."""

    def without(self, gone: Tensor) -> "PastEdit":
        """Return the edit without some of its states, [n], bool."""
        centre = self.centre[: 0 if gone[0] else None]
        return PastEdit(self.states[~gone], self.texts[~gone], centre, self.values)


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
        self._keys: _Keys | None = None
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
        edits = _edits(tensors)
        return (
            edits is not None
            and tensors.keys() == _tensors(edits).keys()
            and all(
                edit.values.shape == (self._size,)
                and edit.texts.shape == edit.states.shape[:1]
                and edit.states.shape[1:] == self._shape[:1]
                and edit.centre.shape[1:] == self._shape[:1]
                and len(edit.states) > 0
                for edit in edits
            )
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
        if not self.edits:
            lowest = hidden.new_full(hidden.shape[:-1], -torch.inf, dtype=torch.float32)
            return lowest, torch.zeros_like(lowest, dtype=torch.long)
        with torch.autocast(hidden.device.type, enabled=False):
            if self._keys is None:  # computed once, until the edits change
                self._keys = _Keys.of(self.edits, whitening)
            smallest, which = self._keys.distances(whitening.whitened(hidden)).min(-1)
            return 1 - smallest, self._keys.owner[which]

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
    def shared_with(self, new: PastEdit) -> tuple[Tensor, Tensor]:
        """Tell which states go when an edit is added that has the same ones as past edits.

        The same are those of the same tokens: in half precision, states of different prompts may
        differ by no more than rounding. A past edit of the same prompt is replaced: all its states
        go. Of another past edit, the new one takes over the state of its own prompt's last token,
        without which it could not begin. Any other state in common (of the same first words, say)
        stays with the past edit, and goes from the new one.

        Args:
            new: The new edit.

        Returns:
            True for present states that go, [N], and for new ones that do, [n]; on the CPU.
        """
        equal = self._are_of(new).cpu()  # [N, n]
        parts = torch.split(equal[:, :1], [len(edit.states) for edit in self.edits])
        gone = [own | own[0] for own in parts]  # all of an edit whose first state is the new one's
        gone_here = torch.cat([equal.new_zeros(0, 1), *gone])[:, 0]
        gone_new = (equal & ~gone_here[:, None]).any(0)
        gone_new[0] = False
        return gone_here, gone_new

    def _are_of(self, new: PastEdit) -> Tensor:
        """Tell of all states whether they are those of a new edit, [N, n]."""
        texts = torch.cat([new.texts[:0], *(edit.texts for edit in self.edits)])[:, None]
        differences = torch.cdist(self.states, new.states.float(), p=1)
        are_close = differences <= _ROUNDING * new.states.abs().sum(-1)
        return torch.where(texts == UNKNOWN, are_close, texts == new.texts)

    @torch.no_grad()
    def with_edit(self, new: PastEdit, gone: Tensor | None = None) -> dict[str, Tensor]:
        """Return the edits and a new one, by `state_dict` names; this object does not change.

        Args:
            new: The new edit.
            gone: True for present states that go, [N], bool, on the CPU; None for none.
        """
        edits = [*self.edits]
        if gone is not None and gone.any():
            parts = torch.split(gone.to(new.states.device), [len(own.states) for own in edits])
            edits = [
                edit.without(part) if part.any() else edit
                for edit, part in zip(edits, parts, strict=True)
                if not part.all()
            ]
        return _tensors([*edits, new])

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
            self.edits = tuple(PastEdit(*map(self._own, edit)) for edit in _edits(own) or ())

    def _own(self, value: Tensor) -> Tensor:
        """Return a tensor on this device, a copy only if it must be one."""
        value = value.clone() if value.is_inference() else value
        return value.to(self._empty.device)


class _Keys(NamedTuple):
    """What distances to the states of all edits are computed from; they have C centres in all."""

    rows: Tensor
    """z(e), of length 1, and then the z(c), [N + C, D]."""
    centred: Tensor
    """The index of the state that each centre is of, [C]."""
    shares: Tensor
    """1 by the number of centres of that state, [C]."""
    lengths: Tensor
    """|z(e)| of that state, [C]."""
    apart: Tensor
    """|z(e) - z(c)|, [C]."""
    offsets: Tensor
    """The product of z(c) and z(e) - z(c), [C]."""
    squares: Tensor
    """|z(c)|^2, [C]."""
    owner: Tensor
    """The edit of each state, [N]."""

    @classmethod
    def of(cls, edits: Sequence[PastEdit], whitening: Whitening) -> "_Keys":
        """Compute the keys of one edit or more."""
        states = whitening.whitened(torch.cat([edit.states for edit in edits]))
        centres = whitening.whitened(torch.cat([edit.centre for edit in edits]))
        sizes = torch.tensor([len(edit.states) for edit in edits], device=states.device)
        counts = torch.tensor([len(edit.centre) for edit in edits], device=states.device)
        centred = torch.repeat_interleave(sizes.cumsum(0) - sizes, counts)
        lengths, apart = states[centred].norm(dim=-1), (states[centred] - centres).norm(dim=-1)
        is_told = torch.ones(len(states), dtype=torch.bool, device=states.device)
        is_apart = apart > _LEAST_APART * lengths
        is_told[centred[~is_apart]] = False  # the subject is hardly in it
        is_told = is_told[centred]
        centred, centres = centred[is_told], centres[is_told]
        own = states[centred]
        return cls(
            rows=torch.cat([nn.functional.normalize(states, dim=-1), centres]),
            centred=centred,
            shares=torch.bincount(centred)[centred].float().reciprocal(),
            lengths=lengths[is_told],
            apart=apart[is_told],
            offsets=(centres * (own - centres)).sum(-1),
            squares=centres.square().sum(-1),
            owner=torch.repeat_interleave(sizes),
        )

    def distances(self, z: Tensor) -> Tensor:
        """Return the distance of whitened states, [..., D], to each of all edits, [..., N]."""
        products = z @ self.rows.mT
        along, across = torch.split(products, [len(self.owner), len(self.squares)], -1)
        length = z.norm(dim=-1, keepdim=True)
        distances = _COUNT * (1 - along / length.clamp_min(_TINY))
        apart = (length.square() - 2 * across + self.squares).clamp_min(0).sqrt()
        own = self.lengths * along[..., self.centred] - across - self.offsets
        cosines = (own / (self.apart * apart).clamp_min(_TINY)).clamp(-1, 1)
        cosines = torch.where(apart > _LEAST_APART * length, cosines, -1.0)
        distances[..., self.centred] = 0
        return distances.index_add(-1, self.centred, self.shares * (1 - cosines))


def _tensors(edits: Iterable[PastEdit]) -> dict[str, Tensor]:
    """Return the tensors of edits by their `state_dict` names."""
    return {f"{i}.{n}": v for i, edit in enumerate(edits) for n, v in edit._asdict().items()}


def _edits(tensors: Mapping[str, Tensor]) -> tuple[PastEdit, ...] | None:
    """Return edits of tensors by `state_dict` names; None if one lacks a tensor."""
    count, names = len(tensors) // len(PastEdit._fields), PastEdit._fields
    with suppress(KeyError):
        return tuple(PastEdit(*(tensors[f"{i}.{n}"] for n in names)) for i in range(count))
    return None
