"""Settle an edit among past ones: steps without the model, at kept hidden states only (ours).

A new edit changes what earlier ones do. Once it is learned, what all of them did at the hidden
states of `past_states` is learned again, the new one's included, while the displacement of the
model's own texts stays as it is, but for a tolerance. A step costs a few matrix products, and no
forward of the model.

Shapes: N states, D hidden size.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from baft_easyedit.hparams import BaFTHyperParams
from baft_easyedit.method.objective import displacement_error
from baft_easyedit.model.hooks import ModelEdit
from baft_easyedit.training.coordinates import Coordinates
from baft_easyedit.training.loop import make_optimizer

_OWN_STATES = 256
"""States of the model's own texts that a settling sees."""

_TURNS = 4
"""A step sees one of so many shares of all states, in turn."""

_TOLERANCE = 0.1
"""How far off a displacement may be, as a share of a usual one: without it nothing is left that a
new edit could be general by."""


def settle(edit: ModelEdit, own: Mapping[int, Tensor], hparams: BaFTHyperParams) -> None:
    """Bring the displacement at past states back to what it was, in at most `settle_steps` steps.

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
        wanted = [_Wanted(edit, coordinates, layer, own[layer]) for layer in edit.layers]
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
    """How states of one layer are to move: past ones as they were to, own ones as they do now."""

    @torch.no_grad()
    def __init__(self, edit: ModelEdit, coordinates: Coordinates, layer: int, own: Tensor) -> None:
        states, moves = edit.past(layer).kept()
        num_moved = moves.any(-1).sum().clamp_min(1)
        usual = (moves.square().sum() / num_moved).sqrt()
        self._size = usual.clamp_min(torch.finfo(moves.dtype).tiny)
        rest = own[:: max(1, len(own) // _OWN_STATES)].to(states.device)
        states = torch.cat([states, rest])  # [N, D]
        moves = torch.cat([moves, edit.displacement(layer, rest)])  # [N, D]
        turns = [slice(k, None, _TURNS) for k in range(min(_TURNS, len(states)))]
        self._turns = [
            (coordinates.displacement(layer, states[turn]), moves[turn]) for turn in turns
        ]

    def error(self, step: int) -> Tensor:
        """Return how far off the states of this step's turn are, []."""
        displacement, wanted = self._turns[step % len(self._turns)]
        return displacement_error(displacement(), wanted, self._size, _TOLERANCE)
