"""Settle a new edit among past ones: restore their displacements at kept hidden states (ours).

Training a new edit changes Phi, and with it the displacements Phi(h) - h that earlier edits need.
Settling then trains Phi again. At the hidden states kept in `past_states` (the new edit's included)
the target is the displacement stored when the state's edit was learned. An error within a tolerance
costs nothing. A step takes a few matrix products, and no forward of the model. What Phi does
elsewhere may change; a guard keeps it from acting there (`method.guard`).

Irrelevant states want no displacement. Where they hardly differ from the edited ones (prompts that
differ by a name only), settling can undo the new edit: `learner` then lets them want what they have
(`EditParameters.accept`), and settles again.

Shapes: N states, D hidden size.
"""

import torch
from torch import Tensor

from baft_easyedit.hparams import BaFTHyperParams
from baft_easyedit.method.objective import displacement_error
from baft_easyedit.model.hooks import ModelEdit
from baft_easyedit.training.coordinates import Coordinates
from baft_easyedit.training.loop import make_optimizer

_TURNS = 4
"""The states are split into so many parts; steps use one part each, in turn."""

_TOLERANCE = 0.1
"""Allowed error of a displacement, as a share of the usual displacement's length. Without a
tolerance, a new edit could no longer generalise."""


def settle(edit: ModelEdit, hparams: BaFTHyperParams) -> None:
    """Restore the displacements at past states, in at most `settle_steps` steps.

    The learning rates begin at those of training and fall linearly to 0.

    Args:
        edit: A single edit, on the devices of its layers; its parameters are changed.
        hparams: Give the learning rates and the number of steps.
    """
    steps, coordinates = hparams.settle_steps, Coordinates(edit)
    optimizer = make_optimizer(coordinates, hparams)
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=steps)
    device = edit.intervention(edit.layers[0]).source_bias.device
    with torch.inference_mode(False), torch.enable_grad():
        wanted = [_Wanted(edit, coordinates, layer) for layer in edit.layers]
        num_settled, has_moved = 0, False
        for step in range(steps):
            errors = [w.error(step).to(device) for w in wanted]
            error = torch.stack(errors).mean()
            num_settled = 0 if error else num_settled + 1
            if num_settled == _TURNS:
                break
            if num_settled:
                continue
            optimizer.zero_grad()
            error.backward()  # type: ignore[no-untyped-call]
            coordinates.project()
            optimizer.step()
            schedule.step()
            edit.retract()
            has_moved = True
        if has_moved:
            coordinates.follow()
        edit.zero_grad()


class _Wanted:
    """The wanted displacements of one layer: those stored with past states."""

    @torch.no_grad()
    def __init__(self, edit: ModelEdit, coordinates: Coordinates, layer: int) -> None:
        states, moves = edit.past(layer).kept()
        num_moved = moves.any(-1).sum().clamp_min(1)
        usual = (moves.square().sum() / num_moved).sqrt()
        # Where no state wants a displacement, there is none to restore, and no scale for errors.
        self._size = usual.where(usual > 0, torch.inf)
        turns = [slice(k, None, _TURNS) for k in range(min(_TURNS, len(states)))]
        self._turns = [
            (coordinates.displacement(layer, states[turn]), moves[turn]) for turn in turns
        ]

    def error(self, step: int) -> Tensor:
        """Return the displacement error on this step's part of the states, []."""
        displacement, wanted = self._turns[step % len(self._turns)]
        return displacement_error(displacement(), wanted, self._size, _TOLERANCE)
