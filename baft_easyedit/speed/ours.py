"""BaFT and ReFT as methods to measure, without EasyEdit."""

from dataclasses import replace
from typing import Any

import torch

from baft_easyedit.editor import BaFTEditor
from baft_easyedit.generation import load_model
from baft_easyedit.hparams import BaFTHyperParams, ReFTHyperParams, scaled_layers
from baft_easyedit.model.inspect import decoder_layers
from baft_easyedit.speed.hardware import timed
from baft_easyedit.speed.measure import EditCost, Requests
from baft_easyedit.speed.options import Row
from baft_easyedit.speed.shapes import find_shape, word_tokenizer


def load(
    model: str | None, shape: str | None, device: torch.device, dtype: torch.dtype
) -> tuple[Any, Any]:
    """Load a model and its tokenizer, or make a random one.

    Args:
        model: Hugging Face name or directory; None for random weights.
        shape: Shape of the random weights.
        device: Where.
        dtype: Of the weights.
    """
    if model is not None:
        return load_model(model, str(device), dtype)
    made = find_shape(shape or "").model(device, dtype)
    return made, word_tokenizer(made.config.vocab_size)


def edited_layers(depth: int, count: int | None = None) -> list[int]:
    """Return the layers that a row edits.

    Args:
        depth: Number of decoder layers.
        count: How many are edited, the first always the same, the others evenly from there; the
            paper's, scaled to the depth, if None.

    Raises:
        ValueError: If there are not as many layers from the first one on.
    """
    layers = scaled_layers(depth)
    if count is None:
        return layers
    first, last = layers[0], max(layers[-1], layers[0] + count - 1)
    if last >= depth:
        raise ValueError(
            f"layers must be at most {depth - first} for this model, of which layers {first} to "
            f"{depth - 1} can be edited here; got {count}"
        )
    gaps = max(1, count - 1)
    return [first + (last - first) * i // gaps for i in range(count)]


def hparams_of(row: Row, model: Any, num_steps: int, early_stop: bool) -> BaFTHyperParams:
    """Make the hyper-parameters of a row.

    Args:
        row: A row of BaFT or ReFT.
        model: The model that is edited.
        num_steps: Most steps of an edit call.
        early_stop: Stop once the answer is learned, at the default loss.
    """
    hparams_class = {"BaFT": BaFTHyperParams, "ReFT": ReFTHyperParams}[row.method]
    hparams = hparams_class(
        model_name=type(model).__name__,  # it is loaded already
        layers=edited_layers(len(decoder_layers(model)), row.num_layers),
        rank=row.rank,
        num_steps=num_steps,
        engine=row.engine or "",
    )
    return hparams if early_stop else replace(hparams, early_stop_loss=0.0)


class OurMethod:
    """BaFT or ReFT on a loaded model.

    A step's time is the difference between two edit calls, of all steps and of one: set-up, such as
    recording the prefix, is in both.

    Args:
        model: A loaded model without an edit.
        tokenizer: Its tokenizer.
        hparams: Hyper-parameters of the row.
        device: Where the model is.
    """

    def __init__(
        self, model: Any, tokenizer: Any, hparams: BaFTHyperParams, device: torch.device
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.device = device
        self._editor = BaFTEditor(model, tokenizer, hparams)
        self._one_step = BaFTEditor(model, tokenizer, replace(hparams, num_steps=1))

    def edit(self, requests: Requests) -> EditCost:
        """Edit requests together in one call."""
        one_step_s, _ = timed(lambda: self._one_step.edit(requests), self.device)
        self._one_step.undo()
        seconds, report = timed(lambda: self._editor.edit(requests), self.device)
        more = report.num_steps - 1
        return EditCost(
            seconds, report.num_steps, (seconds - one_step_s) / more if more > 0 else None
        )

    def undo(self) -> None:
        """Take the edit back."""
        self._editor.undo()
