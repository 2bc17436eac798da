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
from baft_easyedit.method.intervention import BaFTIntervention
from baft_easyedit.method.past_edits import PastEdits
from baft_easyedit.method.whitening import Whitening
from baft_easyedit.model.edit import apart, within
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
    past: dict[int, tuple[PastEdits, Whitening]] = field(default_factory=dict, repr=False)
    """The edits that act at each layer, and the coordinates in which one is chosen; empty if the
    interventions act everywhere."""
    min_similarity: float = -1.0
    """Least similarity to a state of a past edit at which that edit acts."""

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
        h, intervention = hidden.float(), self.layers[layer]
        past = self.past.get(layer)
        if intervention.source_bias.device != hidden.device:
            for part in (intervention, *(past or ())):
                part.to(hidden.device)
        if past is None:
            edited: Tensor = intervention(h)[0]
        else:
            edited = past[0](h, past[1], self.min_similarity)[0]
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
        {} if least is None else {i: _past(kept, i, gate, str(path)) for i in layers},
        -1.0 if least is None else least,
    )


def _intervention(kept: StateFile, layer: Any, gate: str, where: str) -> BaFTIntervention:
    """Make the intervention of one layer from the kept tensors."""
    own = within(kept.state.learned, f"_interventions.{layer}.")
    with _usable(layer, where):
        rank, size = own["basis"].shape
        intervention = BaFTIntervention(size, rank, gate)
        intervention.load_state_dict(own, assign=True)
    return intervention.requires_grad_(False)


def _past(kept: StateFile, layer: Any, gate: str, where: str) -> tuple[PastEdits, Whitening]:
    """Make the past edits of one layer, and its whitening, from the kept tensors."""
    learned = kept.state.learned
    with _usable(layer, where):
        earlier = apart(learned, gate)
        edits = within(learned if earlier is None else earlier, f"_past.{layer}.")
        rank, size = learned[f"_interventions.{layer}.basis"].shape
        whitening = Whitening(size)
        with torch.device("cpu"):
            past = PastEdits(size, rank, gate)
        if not past.takes(edits):
            raise ValueError("its past edits are not of its rank and gate")
        past.load_state_dict(edits)
        whitening.load_state_dict(within(learned, f"_whitening.{layer}."), assign=True)
    return past, whitening


@contextmanager
def _usable(layer: Any, where: str) -> Iterator[None]:
    """Make modules without memory; raise ValueError if the kept tensors do not fit them."""
    try:
        # On meta, as engines set another default dtype or device while they load a model.
        with torch.device("meta"):
            yield
    except (KeyError, ValueError, RuntimeError) as error:
        raise ValueError(f"layer {layer} of the edit in {where} cannot be used: {error}") from None
