"""The tensors of an edit: an intervention for each edited layer, and what later edits need of it.

Later edits need the usage of the bases (for R_bal), and the statistics that whiten hidden states.
With `min_similarity`, each edit call has bases of its own: the interventions then are those that an
edit begins with, and what it became is one of the past edits. `hooks` attaches an edit to a model.
Shapes: N states, D hidden size, r rank.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from baft_easyedit.method.intervention import BaFTIntervention, orthonormal_rows
from baft_easyedit.method.objective import BasisUsage
from baft_easyedit.method.past_edits import UNKNOWN, PastEdit, PastEdits
from baft_easyedit.method.whitening import Whitening

Snapshot = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Author:
    """Who changed an edit; compared by identity."""

    name: str
    """The author's name in messages."""


@dataclass(frozen=True)
class Change:
    """A change of an edit, and its author."""

    what: str
    by: Author

    def __str__(self) -> str:
        return f"{self.what}, by {self.by.name}"


class EditParameters(nn.Module):
    """The interventions of an edit, their usage, and the statistics that later edits need.

    Args:
        hidden_size: D.
        layers: Decoder layers whose outputs are edited, 0-based.
        rank: r, bases per layer.
        gate: A name of `gates.GATES`.
        num_prompt_positions: P, how many of the last prompt tokens are edited.
        seed: Seed of the random bases.
        min_similarity: Each edit call has bases of its own, and acts only at states that are so
            similar to its own, see `method.past_edits`; None for one edit that acts everywhere.
    """

    def __init__(
        self,
        hidden_size: int,
        layers: Sequence[int],
        rank: int,
        gate: str,
        num_prompt_positions: int,
        seed: int = 0,
        min_similarity: float | None = None,
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        with torch.inference_mode(False):  # inference tensors could never be trained
            self._interventions = nn.ModuleDict(
                {str(i): BaFTIntervention(hidden_size, rank, gate, generator) for i in layers}
            )
            self._usage = nn.ModuleDict({str(i): BasisUsage(rank) for i in layers})
            apart = () if min_similarity is None else layers
            self._whitening = nn.ModuleDict({str(i): Whitening(hidden_size) for i in apart})
            self._past = nn.ModuleDict({str(i): PastEdits(hidden_size, rank, gate) for i in apart})
        self.gate = gate
        self.min_similarity = min_similarity
        self.num_prompt_positions = num_prompt_positions
        self.memory: Mapping[str, Any] = {}
        """See `EditState.memory`."""
        self.latest_change: Change | None = None
        """The change that led to the present state; None if there was none or it is unknown."""

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        """Move or cast the tensors; they can be learned even if inference mode is on."""
        with torch.inference_mode(False):
            return super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]

    @property
    def layers(self) -> tuple[int, ...]:
        """The edited layers, 0-based."""
        return tuple(int(i) for i in self._interventions)

    @property
    def rank(self) -> int:
        """r, the bases of each layer."""
        return len(self.intervention(self.layers[0]).basis)

    @property
    def num_parameters(self) -> int:
        """Number of trained parameters: with `min_similarity`, those of all past edits."""
        if self._past:
            return sum(self.past(layer).num_parameters for layer in self.layers)
        return sum(p.numel() for p in self.parameters())

    def intervention(self, layer: int) -> BaFTIntervention:
        """Return the intervention on one edited layer."""
        return cast(BaFTIntervention, self._interventions[str(layer)])

    def usage(self, layer: int) -> BasisUsage:
        """Return how much the bases of one edited layer have been used so far."""
        return cast(BasisUsage, self._usage[str(layer)])

    def whitening(self, layer: int) -> Whitening:
        """Return the whitening of one edited layer, in an edit with `min_similarity`."""
        return cast(Whitening, self._whitening[str(layer)])

    def past(self, layer: int) -> PastEdits:
        """Return the past edits at one layer, in an edit with `min_similarity`."""
        return cast(PastEdits, self._past[str(layer)])

    def act(self, layer: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Edit the hidden states of one layer by past edits, in an edit with `min_similarity`.

        Args:
            layer: An edited layer.
            hidden: h, [N, D].

        Returns:
            The edited states, [N, D], and the basis weights, [N, r].
        """
        least = cast(float, self.min_similarity)
        edited: tuple[Tensor, Tensor] = self.past(layer)(hidden, self.whitening(layer), least)
        return edited

    def joint_usage(self) -> BasisUsage:
        """Return a copy of the usage records of all layers in one, `total` [L, 1, r]."""
        return BasisUsage.stacked([self.usage(i) for i in self.layers])

    def start_afresh(self, seed: int = 0) -> None:
        """Reset all tensors to those of a new edit; they keep their place in memory."""
        size = self.intervention(self.layers[0]).basis.shape[1]
        shape = (size, self.layers, self.rank, self.gate, self.num_prompt_positions)
        new = EditParameters(*shape, seed, self.min_similarity)
        self.restore(new.snapshot())

    @property
    def num_edits(self) -> int:
        """E, the number of independent edits in this object; see `IndependentEdits`."""
        return 1

    def learned_parameters(self) -> dict[str, Tensor]:
        """Return the trained parameters by their `snapshot` names; a gate's contain `.gate.`."""
        return dict(self.named_parameters())

    def bases(self) -> dict[str, Tensor]:
        """Return R of each layer, [..., r, D], by its name in `learned_parameters`."""
        parameters = self.learned_parameters()
        names = [f"_interventions.{layer}.basis" for layer in self.layers]
        return {name: parameters[name] for name in names}

    @torch.no_grad()
    def retract(self) -> None:
        """Make the rows of each layer's R (Eq. 1-3) orthonormal again after an optimiser step."""
        by_device: dict[torch.device, list[Tensor]] = {}
        for basis in self.bases().values():
            by_device.setdefault(basis.device, []).append(basis)
        for bases in by_device.values():  # one QR decomposition for all bases of a device
            torch._foreach_copy_(bases, orthonormal_rows(torch.stack(bases)).unbind())

    def state_of(
        self,
        edit: int,
        start: Snapshot,
        usage: Mapping[int, tuple[Tensor, Tensor]],
        used: Mapping[int, Tensor],
        texts: Tensor,
        centres: Mapping[int, Tensor],
        num_prompt: int,
    ) -> Snapshot:
        """Return a `snapshot` with one of the `num_edits` edits, for an edit that comes after it.

        Args:
            edit: Index of the edit.
            start: The snapshot that the edit was learned from.
            usage: `total` [num_edits, r] and `count` [num_edits] of each layer, the edit included.
            used: Hidden states at the edit's intervened positions, by layer, [N, D].
            texts: Hashes of the tokens up to these positions, as in `PastEdit`, [N].
            centres: The centres of the edit at each layer, as in `PastEdit`.
            num_prompt: How many of the positions are of its prompt; they come first.
        """
        values = self._values_of(edit)
        if self.min_similarity is not None:
            order = [num_prompt - 1, *range(num_prompt - 1), *range(num_prompt, len(texts))]
            new = {}
            for layer, h in used.items():
                own = self.past(layer).vector(within(values, f"_interventions.{layer}."))
                of = texts[order].to(h.device)
                new[layer] = PastEdit(h[order].float(), of, centres[layer], own)
            return {**self.begun(start), **self._past_with(new)}
        state = {**start, **values}
        for layer, (total, count) in usage.items():
            state[f"_usage.{layer}.total"] = total.detach()[edit].clone()
            state[f"_usage.{layer}.count"] = count.detach()[edit].clone()
        return state

    def _past_with(self, new: Mapping[int, PastEdit]) -> dict[str, Tensor]:
        """Return the past edits with a new one, by `snapshot` names; see `PastEdits.with_edit`.

        The first layer, before which no edit has acted, tells which states go. They go at all
        layers, where each has the same place.
        """
        first = min(self.layers)
        gone, gone_new = self.past(first).shared_with(new[first])
        past: dict[str, Tensor] = {}
        for layer, one in new.items():
            own = one.without(gone_new.to(one.states.device))
            past |= {
                f"_past.{layer}.{name}": value
                for name, value in self.past(layer).with_edit(own, gone).items()
            }
        return past

    def begun(self, snapshot: Snapshot) -> Snapshot:
        """Return a snapshot of this edit without its past edits."""
        return {name: v for name, v in snapshot.items() if not name.startswith("_past.")}

    def first_edits(self, count: int) -> Snapshot:
        """Return a snapshot with the first `count` past edits alone."""
        snapshot = self.snapshot()
        later = {n for n in snapshot if n.startswith("_past.") and _index_of(n) >= count}
        return {name: value for name, value in snapshot.items() if name not in later}

    def join(self, others: Sequence[Snapshot]) -> None:
        """Add the latest past edit of each of several snapshots to those of this edit."""
        for other in others:
            self.add(other, max(_index_of(name) for name in other if name.startswith("_past.")))

    def add(self, other: Snapshot, index: int) -> None:
        """Add one past edit of a snapshot to those of this edit."""
        new = {}
        for layer in self.layers:
            own = (other[f"_past.{layer}.{index}.{name}"] for name in PastEdit._fields)
            new[layer] = PastEdit(*own)
        self.restore({**self.begun(self.state_dict()), **self._past_with(new)})

    def _values_of(self, edit: int) -> Snapshot:  # noqa: ARG002
        """Return copies of the trained parameters of one of the `num_edits` edits."""
        return {name: p.detach().clone() for name, p in self.named_parameters()}

    def snapshot(self) -> Snapshot:
        """Return copies of all tensors by name: parameters, usage and statistics.

        The tensors of past edits, which never change, are not copied.
        """
        tensors = {name: value.detach() for name, value in self.state_dict().items()}
        return {n: v if n.startswith("_past.") else v.clone() for n, v in tensors.items()}

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to a `snapshot`, bit for bit.

        Raises:
            ValueError: If an edit of another shape made the snapshot; nothing has changed then.
        """
        snapshot = self._present_form(snapshot)
        rest, own = self.begun(snapshot), self.begun(self.state_dict())
        different = [
            name
            for name in {*own, *rest}
            if name not in own or name not in rest or own[name].shape != rest[name].shape
        ]
        edits = within(snapshot, "_past.")
        for layer, past in self._past.items():
            if not cast(PastEdits, past).takes(within(edits, f"{layer}.")):
                different.append(f"_past.{layer}")
        different += [f"_past.{n}" for n in edits if n.partition(".")[0] not in self._past]
        sizes = {n.partition(".")[2]: v.shape[:1] for n, v in edits.items()}  # alike at all layers
        different += [
            f"_past.{n}" for n, v in edits.items() if v.shape[:1] != sizes[n.partition(".")[2]]
        ]
        if different:
            raise ValueError(
                "the snapshot must be one of an edit of the same layers, rank and gate; "
                f"{min(different)} differs"
            )
        self.load_state_dict(dict(snapshot))

    def _present_form(self, snapshot: Snapshot) -> Snapshot:
        """Return a snapshot of an earlier development version in the present form."""
        past = apart(snapshot, self.gate)
        if self.min_similarity is None:  # what whitened the coordinates of training is not needed
            rest = snapshot if past is None else self.begun(snapshot)
            return {n: v for n, v in rest.items() if not n.startswith("_whitening.")}
        if past is None:
            return {**_texts_of(snapshot), **_centres_of(snapshot), **snapshot}
        rest = dict(self.begun(snapshot))
        begun = {n: v for n, v in self.state_dict().items() if n.startswith(("_int", "_usage"))}
        return rest | begun | past


def apart(snapshot: Snapshot, gate: str) -> dict[str, Tensor] | None:
    """Return what all edits of an earlier development version did together, as one past edit.

    There they shared one intervention, and the moves that they wanted at their states were kept.

    Args:
        snapshot: A snapshot of any version; for one of the present version, None is returned.
        gate: A name of `gates.GATES`.
    """
    layers = [n.split(".")[1] for n in snapshot if n.startswith("_past.") and n.endswith(".moves")]
    past: dict[str, Tensor] = {}
    for layer in layers:
        own = within(snapshot, f"_interventions.{layer}.")
        there = within(snapshot, f"_past.{layer}.")
        states = there["states"][there["moves"].any(-1)]
        rank, size = own["basis"].shape
        empty = PastEdits(size, rank, gate)
        texts = torch.full(states.shape[:1], UNKNOWN, device=states.device)
        edit = PastEdit(states, texts, states[:0], empty.vector(own))
        new = empty.with_edit(edit) if len(states) else {}
        past |= {f"_past.{layer}.{part}": value for part, value in new.items()}
    return past if layers else None


def _centres_of(snapshot: Snapshot) -> dict[str, Tensor]:
    """Return centres of past edits, by name, for a snapshot that may be from before there were any.

    There the distance to the first state counted once, and z(c) was 0.
    """
    means = {
        name: snapshot.get(f"_whitening.{name.split('.')[1]}.mean")
        for name in snapshot
        if name.startswith("_past.") and name.endswith(".states")
    }
    return {
        name.replace(".states", ".centre"): mean[None].clone()  # files hold no tensor twice
        for name, mean in means.items()
        if mean is not None
    }


def _texts_of(snapshot: Snapshot) -> dict[str, Tensor]:
    """Return the texts of past edits, by name, for a snapshot that may be from before they were."""
    return {
        name.replace(".states", ".texts"): torch.full(states.shape[:1], UNKNOWN)
        for name, states in snapshot.items()
        if name.startswith("_past.") and name.endswith(".states")
    }


def _index_of(name: str) -> int:
    """Return the index of the past edit that a name of a snapshot is of."""
    return int(name.split(".")[2])


def within(snapshot: Snapshot, prefix: str) -> dict[str, Tensor]:
    """Return the tensors of a snapshot whose names begin with a prefix, by the rest of these."""
    return {n.removeprefix(prefix): v for n, v in snapshot.items() if n.startswith(prefix)}
