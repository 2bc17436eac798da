"""Settle an edit among past ones: steps without the model, at kept hidden states only (ours).

A new edit changes what earlier ones do. Once it is learned, what all of them did at the hidden
states of `past_states` is learned again, the new one's included, while the displacement of the
model's own texts stays as it is. A step costs a few matrix products, and no forward of the model.

Shapes: N states, D hidden size.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from baft_easyedit.coordinates import Coordinates
from baft_easyedit.hooks import ModelEdit
from baft_easyedit.hparams import BaFTHyperParams
from baft_easyedit.learning import make_optimizer
from baft_easyedit.objective import displacement_error

_OWN_STATES = 256
"""States of the model's own texts that a settling sees."""


def settle(edit: ModelEdit, own: Mapping[int, Tensor], hparams: BaFTHyperParams) -> None:
    """Bring the displacement at past states back to what it was, for `settle_steps` steps.

    The learning rates are those of learning, and fall to 0.

    Args:
        edit: A single edit, where its layers compute; its parameters are changed.
        own: States of the model's own texts by layer, [N, D].
        hparams: The learning rates, and how many steps.
    """
    steps, coordinates = hparams.settle_steps, Coordinates(edit)
    optimizer = make_optimizer(coordinates, hparams)
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=steps)
    device = edit.intervention(edit.layers[0]).source_bias.device
    with torch.inference_mode(False), torch.enable_grad():
        wanted = {layer: _wanted(edit, layer, own[layer]) for layer in edit.layers}
        for _ in range(steps):
            errors = [
                displacement_error(edit.displacement(layer, states), moves).to(device)
                for layer, (states, moves) in wanted.items()
            ]
            torch.autograd.backward(torch.stack(errors).mean())
            coordinates.pull_back()
            optimizer.step()
            schedule.step()
            coordinates.follow()
            edit.zero_grad()


@torch.no_grad()
def _wanted(edit: ModelEdit, layer: int, own: Tensor) -> tuple[Tensor, Tensor]:
    """Return states of one layer, and the displacement that is wanted there, [N, D] each."""
    states, moves = edit.past(layer).kept()
    every = max(1, len(own) // _OWN_STATES)
    rest = own[::every].to(states.device)
    return torch.cat([states, rest]), torch.cat([moves, edit.displacement(layer, rest)])
