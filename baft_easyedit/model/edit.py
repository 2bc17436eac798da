"""The tensors of an edit: an intervention for each edited layer, and what later edits need of it.

Later edits need the usage of the bases (for R_bal), the statistics that whiten hidden states, and
past states (for settling). `hooks` attaches an edit to a model. Shapes: N states, D hidden size, r
rank.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from baft_easyedit.method.guard import Guard
from baft_easyedit.method.intervention import BaFTIntervention, orthonormal_rows
from baft_easyedit.method.objective import BasisUsage
from baft_easyedit.method.past_states import PastStates, are_among
from baft_easyedit.method.whitening import Whitening

Snapshot = Mapping[str, Tensor]

_IRRELEVANT_KEPT = 4
"""How many of an edit's irrelevant states become past states of each layer; see `past_states`."""


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
        parametrisation: One of `PARAMETRISATIONS`; see `coordinates`.
        past_states: Hidden states of past edits that each layer keeps at most; 0 for none.
        min_similarity: The edit acts at states only that are so similar to a past edit's, see
            `method.guard`; None for everywhere.
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
        min_similarity: float | None = None,
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        with torch.inference_mode(False):  # inference tensors could never be trained
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
        self.min_similarity = min_similarity
        self.num_prompt_positions = num_prompt_positions
        self.memory: Any = None
        """The `RehearsalMemory` of past requests; None until a `Learner` sets it."""
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
        """Whether the edit is trained in whitened coordinates."""
        return self.parametrisation == "whitened"

    def whitening(self, layer: int) -> Whitening:
        """Return the whitening of one edited layer, in an edit that `whitens`."""
        return cast(Whitening, self._whitening[str(layer)])

    @property
    def num_past_states(self) -> int:
        """How many hidden states of past edits each layer keeps now."""
        return self.past(self.layers[0]).num_kept if self._past else 0

    @property
    def has_dropped_states(self) -> bool:
        """Whether there were more hidden states of past edits than each layer keeps."""
        return bool(self._past) and self.past(self.layers[0]).has_dropped

    def past(self, layer: int) -> PastStates:
        """Return the past states of one layer, in an edit that keeps them."""
        return cast(PastStates, self._past[str(layer)])

    def guard(self, layer: int) -> Guard | None:
        """Return what tells where the edit of one layer acts; None for everywhere."""
        least = self.min_similarity
        return None if least is None else Guard(self.past(layer), self.whitening(layer), least)

    def joint_usage(self) -> BasisUsage:
        """Return a copy of the usage records of all layers in one, `total` [L, 1, r]."""
        return BasisUsage.stacked([self.usage(i) for i in self.layers])

    def start_afresh(self, seed: int = 0) -> None:
        """Reset all tensors to those of a new edit; they keep their place in memory."""
        size = self.intervention(self.layers[0]).basis.shape[1]
        shape = (size, self.layers, self.rank, self.gate, self.num_prompt_positions)
        new = EditParameters(*shape, seed, self.parametrisation, self.past_states)
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
        usage: Mapping[int, tuple[Tensor, Tensor]],
        used: Mapping[int, Tensor],
        irrelevant: Mapping[int, Tensor],
    ) -> Snapshot:
        """Return a `snapshot` of one of the `num_edits` edits, for an edit that comes after it.

        Its usage and hidden states count as past there.

        Args:
            edit: Index of the edit.
            usage: `total` [num_edits, r] and `count` [num_edits] of each layer, the edit included.
            used: Hidden states at the edit's intervened positions, by layer, [N, D].
            irrelevant: Hidden states of its irrelevant prompts, by layer, [M, D].
        """
        state = dict(self.snapshot())
        values = self._values_of(edit)
        state |= values
        for layer, (total, count) in usage.items():
            state[f"_usage.{layer}.total"] = total.detach()[edit].clone()
            state[f"_usage.{layer}.count"] = count.detach()[edit].clone()
        return state | (self._past_with(values, used, irrelevant) if self._past else {})

    @torch.no_grad()
    def _past_with(
        self, values: Snapshot, used: Mapping[int, Tensor], irrelevant: Mapping[int, Tensor]
    ) -> dict[str, Tensor]:
        """Return the past states with those of an edit, by `snapshot` names.

        All used states are kept, with the displacement that the edit gives them; the irrelevant
        ones want none. Each state of an edit has the same place at all layers. So where the edit is
        of a prompt that was edited before, whose states at the first layer are the same, what the
        earlier edit wanted there goes at all layers.
        """
        first = self.layers[0]
        gone = are_among(self.past(first).kept()[0], used[first]).cpu()
        kept: dict[str, Tensor] = {}
        chosen = self._hard(values, used, irrelevant)
        for layer in self.layers:
            here, still = used[layer].float(), irrelevant[layer].float()
            still = still[chosen.to(still.device)]
            states = torch.cat([here, still])
            moves = torch.cat([self.displacement(layer, here, values), torch.zeros_like(still)])
            new = self.past(layer).with_edit(states, moves, gone.to(states.device))
            kept |= {f"_past.{layer}.{name}": value for name, value in new.items()}
        return kept

    def _hard(
        self, values: Snapshot, used: Mapping[int, Tensor], irrelevant: Mapping[int, Tensor]
    ) -> Tensor:
        """Return the indices of an edit's irrelevant states that it moves most at its layers.

        With a guard, they are some of those where it will let the edit act, at a layer at least.
        What an irrelevant prompt has in common with the edited one is none of them.
        """
        first = self.layers[0]
        moved = torch.zeros(len(irrelevant[first]))
        for layer in self.layers:
            here, guard = irrelevant[layer].float(), self.guard(layer)
            length = self.displacement(layer, here, values).norm(dim=-1)
            if guard is not None:
                length = length * guard.admits(here, used[layer].float())
            moved += length.cpu()
        moved *= ~are_among(irrelevant[first], used[first]).cpu()
        most = moved.topk(min(_IRRELEVANT_KEPT, len(moved)))
        return most.indices[most.values > 0]

    @torch.no_grad()
    def accept(self, states: Mapping[int, Tensor]) -> None:
        """Let past states that want no displacement want the one that they have now.

        Args:
            states: Irrelevant states of an edit, by layer, [N, D]; at a layer where a guard does
                not let the edit act on them, they go on wanting none.
        """
        for layer, irrelevant in states.items():
            here, guard = irrelevant.float(), self.guard(layer)
            if guard is not None:
                here = here[guard.admits(here)]
            self.past(layer).accept(here, self.displacement(layer, here))

    def displacement(self, layer: int, states: Tensor, values: Snapshot | None = None) -> Tensor:
        """Return Phi(h) - h of one layer, [N, D].

        Args:
            layer: An edited layer.
            states: h, [N, D], fp32.
            values: Parameters by `snapshot` names, used in place of this module's own.
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
        """Return copies of an edit's parameters that are not this module's (`IndependentEdits`)."""
        return {}

    def snapshot(self) -> Snapshot:
        """Return copies of all tensors by name: parameters, usage, statistics and past states."""
        return {name: value.detach().clone() for name, value in self.state_dict().items()}

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to a `snapshot`, bit for bit.

        Raises:
            ValueError: If an edit of another shape made the snapshot; nothing has changed then.
        """
        own = self.state_dict()
        different = [
            name
            for name in {*own, *snapshot}
            if name not in own or name not in snapshot or not self._takes(name, snapshot[name])
        ]
        if different:
            raise ValueError(
                "the snapshot must be one of an edit of the same layers, rank and gate; "
                f"{min(different)} differs"
            )
        self.load_state_dict(dict(snapshot))

    def _takes(self, name: str, value: Tensor) -> bool:
        """Tell whether a tensor of a `snapshot` has a shape that this edit's can have."""
        module, _, own = name.rpartition(".")
        owner = self.get_submodule(module)
        if isinstance(owner, PastStates):
            return owner.takes(own, value)
        return bool(value.shape == getattr(owner, own).shape)
