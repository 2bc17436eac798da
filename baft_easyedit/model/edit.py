"""What an edit has learned: an intervention, and what is known beside it, for each edited layer.

How it reaches a model is in `hooks`. Shapes: N states, D hidden size, r rank.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from baft_easyedit.method.intervention import BaFTIntervention, orthonormal_rows
from baft_easyedit.method.objective import BasisUsage
from baft_easyedit.method.past_states import PastStates
from baft_easyedit.method.whitening import Whitening

Snapshot = Mapping[str, Tensor]

_IRRELEVANT_KEPT = 4
"""Irrelevant states of an edit that each layer keeps; see `past_states`."""


@dataclass(frozen=True, eq=False)
class Author:
    """Who changes an edit; each is only itself."""

    name: str
    """What others call it."""


@dataclass(frozen=True)
class Change:
    """A change of what an edit has learned."""

    what: str
    by: Author

    def __str__(self) -> str:
        return f"{self.what}, by {self.by.name}"


class EditParameters(nn.Module):
    """The interventions of an edit, their usage, and what later edits need to know of it.

    Args:
        hidden_size: D.
        layers: Decoder layers whose outputs are edited, 0-based.
        rank: r, bases per layer.
        gate: A name of `gates.GATES`.
        num_prompt_positions: P, how many of the last prompt tokens are edited.
        seed: Seed of the random bases.
        parametrisation: One of `PARAMETRISATIONS`; see `coordinates`.
        past_states: Hidden states of past edits that each layer keeps at most; 0 for none.
    """

    def __init__(
        self,
        hidden_size: int,
        layers: Sequence[int],
        rank: int,
        gate: str,
        num_prompt_positions: int,
        seed: int = 0,
        parametrisation: str = "direct",
        past_states: int = 0,
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        with torch.inference_mode(False):  # whose tensors could never be learned
            self._interventions = nn.ModuleDict(
                {str(i): BaFTIntervention(hidden_size, rank, gate, generator) for i in layers}
            )
            self._usage = nn.ModuleDict({str(i): BasisUsage(rank) for i in layers})
            whitened = layers if parametrisation == "whitened" else ()
            self._whitening = nn.ModuleDict({str(i): Whitening(hidden_size) for i in whitened})
            keeping = layers if past_states else ()
            self._past = nn.ModuleDict(
                {str(i): PastStates(hidden_size, past_states) for i in keeping}
            )
        self.gate = gate
        self.parametrisation = parametrisation
        self.past_states = past_states
        self.num_prompt_positions = num_prompt_positions
        self.memory: Any = None
        """Past requests to rehearse, of whoever learns into the edit; None if there are none."""
        self.latest_change: Change | None = None
        """The change that led to the present state; None if there was none, or it is not known."""

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
        """Number of trained parameters."""
        return sum(p.numel() for p in self.parameters())

    def intervention(self, layer: int) -> BaFTIntervention:
        """Return the intervention on one edited layer."""
        return cast(BaFTIntervention, self._interventions[str(layer)])

    def usage(self, layer: int) -> BasisUsage:
        """Return how much the bases of one edited layer have been used so far."""
        return cast(BasisUsage, self._usage[str(layer)])

    @property
    def whitens(self) -> bool:
        """Whether it is learned in whitened coordinates."""
        return self.parametrisation == "whitened"

    def whitening(self, layer: int) -> Whitening:
        """Return the statistics of one edited layer of an edit that `whitens`."""
        return cast(Whitening, self._whitening[str(layer)])

    @property
    def num_past_states(self) -> int:
        """Hidden states of past edits that a layer keeps now."""
        return self.past(self.layers[0]).num_kept if self._past else 0

    def past(self, layer: int) -> PastStates:
        """Return what an edit that keeps past states has of them at one layer."""
        return cast(PastStates, self._past[str(layer)])

    def joint_usage(self) -> BasisUsage:
        """Return a copy of the usage records of all layers in one, `total` [L, 1, r]."""
        return BasisUsage.stacked([self.usage(i) for i in self.layers])

    def start_afresh(self, seed: int = 0) -> None:
        """Forget everything that was learned; all tensors stay where they are in memory."""
        generator = torch.Generator().manual_seed(seed)
        rank, size = self.intervention(self.layers[0]).basis.shape
        for layer in self.layers:
            new = BaFTIntervention(size, rank, self.gate, generator)
            self.intervention(layer).load_state_dict(new.state_dict())
            self.usage(layer).load_state_dict(BasisUsage(rank).state_dict())
        for known in (*self._whitening.values(), *self._past.values()):
            cast(Whitening | PastStates, known).forget()

    @property
    def num_edits(self) -> int:
        """Independent edits that this object holds; see `IndependentEdits`."""
        return 1

    def learned_parameters(self) -> dict[str, Tensor]:
        """Return what is trained, by the names of `snapshot`; gates have `.gate.` in theirs."""
        return dict(self.named_parameters())

    def bases(self) -> dict[str, Tensor]:
        """Return R of each layer, [..., r, D], by its name among `learned_parameters`."""
        parameters = self.learned_parameters()
        return {name: parameters[name] for name in map(_basis_name, self.layers)}

    @torch.no_grad()
    def retract(self) -> None:
        """Make each layer's R orthonormal again, after an optimiser's step has moved it."""
        by_device: dict[torch.device, list[Tensor]] = {}
        for basis in self.bases().values():
            by_device.setdefault(basis.device, []).append(basis)
        for bases in by_device.values():  # those of a device by one decomposition
            torch._foreach_copy_(bases, orthonormal_rows(torch.stack(bases)).unbind())

    def state_of(
        self,
        edit: int,
        usage: Mapping[int, tuple[Tensor, Tensor]],
        used: Mapping[int, Tensor],
        irrelevant: Mapping[int, Tensor],
    ) -> Snapshot:
        """Return a copy of what one of the `num_edits` edits has learned.

        Args:
            edit: Which, from 0.
            usage: `total` [num_edits, r] and `count` [num_edits] of each layer's usage by then.
            used: The states that each layer's edit was made for, [N, D].
            irrelevant: Those of its irrelevant prompts, [M, D].
        """
        state = dict(self.snapshot())
        values = self._values_of(edit)
        state |= values
        for layer, (total, count) in usage.items():
            state[f"_usage.{layer}.total"] = total.detach()[edit].clone()
            state[f"_usage.{layer}.count"] = count.detach()[edit].clone()
        for layer in self.layers if self._past else ():
            if len(used[layer]):  # a consolidation has none of its own
                new = self._past_of(layer, values, used[layer].float(), irrelevant[layer].float())
                kept = self.past(layer).with_edit(*new)
                state |= {f"_past.{layer}.{name}": value for name, value in kept.items()}
        return state

    @torch.no_grad()
    def _past_of(
        self, layer: int, values: Snapshot, used: Tensor, irrelevant: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the states to keep of an edit with these values, and how they are to move.

        Of the irrelevant ones those that move most, for not to.
        """
        moved = self.displacement(layer, irrelevant, values).norm(dim=-1)
        worst = irrelevant[moved.topk(min(_IRRELEVANT_KEPT, len(moved))).indices]
        moves = self.displacement(layer, used, values)
        return torch.cat([used, worst]), torch.cat([moves, torch.zeros_like(worst)])

    @torch.no_grad()
    def note_moves(self) -> None:
        """Take what the edit does now for what past ones were to do where h was to move."""
        for layer in self.layers if self._past else ():
            states, moves = self.past(layer).kept()
            moves.copy_(self.displacement(layer, states) * moves.any(-1, keepdim=True))

    def displacement(self, layer: int, states: Tensor, values: Snapshot | None = None) -> Tensor:
        """Return Phi(h) - h of one layer, [N, D].

        Args:
            layer: Which.
            states: h, [N, D], fp32.
            values: Parameters by the names of `snapshot`, for those of this module.
        """
        prefix = f"_interventions.{layer}."
        own = {
            name.removeprefix(prefix): value
            for name, value in (values or {}).items()
            if name.startswith(prefix)
        }
        edited: Tensor = functional_call(self.intervention(layer), own, (states,))[0]
        return edited - states

    def _values_of(self, edit: int) -> Snapshot:  # noqa: ARG002
        """Return copies of one edit's parameters where they are not this module's own."""
        return {}

    def snapshot(self) -> Snapshot:
        """Return a copy of everything learned so far."""
        return {name: value.detach().clone() for name, value in self.state_dict().items()}

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to a `snapshot`, bit for bit.

        Raises:
            ValueError: If it is one of an edit of another shape; nothing has changed then.
        """
        own = self.state_dict()
        different = [
            name
            for name in {*own, *snapshot}
            if name not in own or name not in snapshot or own[name].shape != snapshot[name].shape
        ]
        if different:
            raise ValueError(
                "the snapshot must be one of an edit of the same layers, rank and gate; "
                f"{min(different)} differs"
            )
        self.load_state_dict(dict(snapshot))

    def gate_weights(self, layer: int, states: Tensor) -> Tensor:
        """Return the basis weights of one layer's gate for some states [N, D], [N, r]."""
        weights: Tensor = self.intervention(layer).gate(states)
        return weights


def _basis_name(layer: int) -> str:
    """Return the name of a layer's R among what is learned."""
    return f"_interventions.{layer}.basis"
