"""Independent edits of one model, trained side by side in one batch.

Every parameter gets a leading dimension E, one entry for each edit. One forward of the model serves
all edits: with R rows of the batch for each edit, row b belongs to edit b // R, whose parameters
alone act on it. So no edit affects another's loss or gradient.
Shapes: E edits, R rows of an edit, T columns, D hidden size.
"""

import torch
from torch import Tensor
from torch.func import functional_call

from baft_easyedit.model.edit import Snapshot, within
from baft_easyedit.model.hooks import ModelEdit


class IndependentEdits(ModelEdit):
    """E copies of an edit that are trained apart.

    Args:
        start: The edit that is copied; it does not change. The copies can be attached to the model
            that carries it already; disable it while they are in use.
        num_edits: E, at least 1.
    """

    def __init__(self, start: ModelEdit, num_edits: int) -> None:
        basis = start.intervention(start.layers[0]).basis  # [r, D]
        super().__init__(
            basis.shape[1],
            start.layers,
            start.rank,
            start.gate,
            start.num_prompt_positions,
            min_similarity=start.min_similarity,
        )
        self.to(basis.device)
        self.restore(start.snapshot())
        self._num_edits = num_edits
        self._beside = (start,)
        self.caches = start.caches
        self._values = {
            name: p.detach().repeat(num_edits, *[1] * p.dim()).requires_grad_()
            for name, p in self.named_parameters()
        }

    @property
    def num_edits(self) -> int:
        """E."""
        return self._num_edits

    def learned_parameters(self) -> dict[str, Tensor]:
        """Return the trained parameters, [E, ...] each, by the names of `snapshot`."""
        return self._values

    def _values_of(self, edit: int) -> Snapshot:
        """Return copies of one edit's parameters."""
        return {name: value.detach()[edit].clone() for name, value in self._values.items()}

    def _intervene(self, layer: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Edit the rows of each edit, [E R, T, D], with its own parameters."""
        intervention, values = self.intervention(layer), self._values_at(layer)

        def intervene(own: dict[str, Tensor], rows: Tensor) -> tuple[Tensor, Tensor]:
            return functional_call(intervention, own, (rows,))

        rows = hidden.view(self._num_edits, -1, *hidden.shape[1:])
        edited, weights = torch.vmap(intervene)(values, rows)
        return edited.flatten(0, 1), weights.flatten(0, 1)

    def _values_at(self, layer: int) -> dict[str, Tensor]:
        """Return one layer's parameters by their names in `BaFTIntervention`."""
        return within(self._values, f"_interventions.{layer}.")

    def move(self, layer: int, device: torch.device) -> None:
        """Move a layer's learned tensors to the device where the layer computes now."""
        super().move(layer, device)
        for value in self._values_at(layer).values():
            if value.device != device:
                value.data = value.data.to(device)  # stays the leaf that the optimiser knows
