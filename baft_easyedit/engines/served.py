"""Read a kept edit for a serving engine: for each layer, what to add to the hidden states.

Engines run their own model code, so `ModelEdit` cannot attach its hooks; the engine's adapter says
which tokens are edited. Shapes: N tokens of a flattened batch or a part of it, D hidden size.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from baft_easyedit.files.paths import expanded
from baft_easyedit.files.reading import taken
from baft_easyedit.method.guard import Guard
from baft_easyedit.method.intervention import BaFTIntervention
from baft_easyedit.method.past_states import PastStates
from baft_easyedit.method.whitening import Whitening
from baft_easyedit.model.positions import first_edited
from baft_easyedit.storage.config import KeptConfig
from baft_easyedit.storage.reading import read_latest
from baft_easyedit.storage.state import StateFile


@dataclass(frozen=True, eq=False)
class ServedEdit:
    """The interventions of a kept edit, and the layers and tokens that they act on."""

    layers: dict[int, BaFTIntervention] = field(repr=False)
    """Interventions by the decoder layer, 0-based, whose output they edit."""
    num_prompt_positions: int
    """P: the last P tokens of a prompt, and every later token, are edited."""
    gate: str
    """Name of the gate, one of `gates.GATES`."""
    use_chat_template: bool
    """Whether the edit was learned on prompts in the model's chat template."""
    config: KeptConfig
    """What else is known of the edit and its model."""
    guards: dict[int, Guard] = field(default_factory=dict, repr=False)
    """What tells where each layer's intervention acts; empty for everywhere."""

    @torch.no_grad()
    def delta(self, layer: int, hidden: Tensor) -> Tensor:
        """Return Phi(h) - h, what an edit adds to the hidden states of edited tokens.

        Args:
            layer: One of `layers`.
            hidden: h, the whole output of the layer, [N, D]; if an engine keeps the residual
                stream apart, the sum of both parts.

        Returns:
            [N, D], fp32.
        """
        intervention, guard = self.layers[layer], self.guards.get(layer)
        if intervention.source_bias.device != hidden.device:
            for part in (intervention, *(guard or ())[:2]):
                part.to(hidden.device)
        h = hidden.float()
        edited: Tensor = intervention(h)[0]
        if guard is not None:
            edited = torch.where(guard.admits(h)[:, None], edited, h)
        return edited - h

    def window(self, prompt_lengths: Sequence[int]) -> list[bool]:
        """Tell for each token of concatenated whole prompts whether it is edited."""
        firsts = ((n, first_edited(n, self.num_prompt_positions)) for n in prompt_lengths)
        return [i >= first for n, first in firsts for i in range(n)]


def added(hidden: Tensor, delta: Tensor) -> Tensor:
    """Add an fp32 delta; the result has the dtype of `hidden`."""
    return (hidden.float() + delta).to(hidden.dtype)


def read_edit(directory: str | os.PathLike[str]) -> ServedEdit:
    """Read a kept edit; no model is needed.

    Raises:
        FileNotFoundError: If the directory keeps no edit.
        ValueError: If the state is damaged, or its tensors do not fit its hyper-parameters.
    """
    path = expanded(directory)
    kept = read_latest(path)
    where = f"the hyper-parameters in {path}"
    settings = kept.config.hparams
    gate = taken(settings, "gate", str, where)
    layers = taken(settings, "layers", list, where)
    kinds = (float, int, type(None))
    least = taken({"min_similarity": None, **settings}, "min_similarity", kinds, where)
    return ServedEdit(
        {layer: _intervention(kept, layer, gate, str(path)) for layer in layers},
        taken(settings, "num_prompt_positions", int, where),
        gate,
        taken(settings, "use_chat_template", bool, where),
        kept.config,
        {} if least is None else {i: _guard(kept, i, least, str(path)) for i in layers},
    )


def _intervention(kept: StateFile, layer: Any, gate: str, where: str) -> BaFTIntervention:
    """Make the intervention of one layer from the kept tensors."""
    own = _tensors(kept, f"_interventions.{layer}.")
    with _usable(layer, where):
        rank, size = own["basis"].shape
        intervention = BaFTIntervention(size, rank, gate)
        intervention.load_state_dict(own, assign=True)
    return intervention.requires_grad_(False)


def _guard(kept: StateFile, layer: Any, min_similarity: float, where: str) -> Guard:
    """Make the guard of one layer from the kept tensors."""
    states, statistics = _tensors(kept, f"_past.{layer}."), _tensors(kept, f"_whitening.{layer}.")
    with _usable(layer, where):
        most, size = states["states"].shape
        past, whitening = PastStates(size, most), Whitening(size)
        past.load_state_dict(states, assign=True)
        whitening.load_state_dict(statistics, assign=True)
    return Guard(past, whitening, min_similarity)


def _tensors(kept: StateFile, prefix: str) -> dict[str, Tensor]:
    """Return the kept tensors whose names begin with a prefix, by the rest of their names."""
    learned = kept.state.learned.items()
    return {name.removeprefix(prefix): v for name, v in learned if name.startswith(prefix)}


@contextmanager
def _usable(layer: Any, where: str) -> Iterator[None]:
    """Make modules without memory; raise ValueError if the kept tensors do not fit them."""
    try:
        # On meta, as engines set another default dtype or device while they load a model.
        with torch.device("meta"):
            yield
    except (KeyError, ValueError, RuntimeError) as error:
        raise ValueError(f"layer {layer} of the edit in {where} cannot be used: {error}") from None
