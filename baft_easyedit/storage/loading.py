"""Read kept edits for inference, and check that they fit their model; `attach` needs no editor."""

import os
from collections.abc import Mapping

from torch import nn

from baft_easyedit.files.messages import short
from baft_easyedit.files.paths import expanded
from baft_easyedit.hparams import BaFTHyperParams
from baft_easyedit.model.hooks import ModelEdit, attached_edit
from baft_easyedit.model.inspect import text_config
from baft_easyedit.model.named import NamedEdits, check_names
from baft_easyedit.storage.config import SHAPE, hparams_of, new_edit
from baft_easyedit.storage.reading import read_latest, read_to_use
from baft_easyedit.storage.state import StateFile, state_hash
from baft_easyedit.training.learner import EditState


def attach(
    model: nn.Module, directory: str | os.PathLike[str], allow_other_model: bool = False
) -> ModelEdit:
    """Make a model use a kept edit; no tokenizer is needed. The directory is only read.

    An edit that was kept detached, such as one without any edit yet, is attached too;
    `BaFTEditor.load` and `open`, which go on from the kept state, leave it detached.

    Args:
        model: The model that the edit was learned on; it must carry no edit now.
        directory: Where `BaFTEditor.save` or `BaFTEditor.open` kept the edit.
        allow_other_model: Use the edit on another model of the same shape.

    Returns:
        The attached edit; its `detach` removes it from the model.

    Raises:
        FileNotFoundError: If no edit is kept there.
        ValueError: If the model is another one, does not fit, or carries an edit; or the state
            file is damaged.
    """
    edit = _read_edit(model, directory, allow_other_model)
    edit.attach(model)
    return edit


def attach_named(
    model: nn.Module,
    directories: Mapping[str, str | os.PathLike[str]],
    allow_other_model: bool = False,
) -> NamedEdits:
    """Attach several kept edits to a model, to be used by name. The directories are only read.

    Args:
        model: The model that the edits were learned on; it must carry no edit now.
        directories: The directory of each edit, by its name.
        allow_other_model: See `attach`.

    Returns:
        The edits, attached but inactive; `with edits.active(name)` uses one.

    Raises:
        FileNotFoundError: If a directory keeps no edit.
        ValueError: If a name is unusable; and where `attach` raises it.
    """
    check_names(directories)
    edits = {n: _read_edit(model, d, allow_other_model) for n, d in directories.items()}
    return NamedEdits(model, edits)


def _read_edit(
    model: nn.Module, directory: str | os.PathLike[str], allow_other_model: bool
) -> ModelEdit:
    """Return a kept edit, not yet attached; errors are those of `attach`."""
    where = str(expanded(directory))
    edit, _ = edit_of(latest_for(model, where, allow_other_model), model, where)
    return edit


def kept_hparams(directory: str | os.PathLike[str], model: nn.Module) -> BaFTHyperParams:
    """Return the hyper-parameters of a kept edit, for its loaded model.

    Raises:
        FileNotFoundError: If no edit is kept there.
        ValueError: If the state file is damaged.
    """
    kept = read_latest(expanded(directory)).config.hparams
    return hparams_of(kept, model, str(directory))


def latest_for(model: nn.Module, directory: str, allow_other_model: bool) -> StateFile:
    """Read the state of a kept directory, and check its model; errors are those of `attach`."""
    latest = read_to_use(expanded(directory))
    if not allow_other_model:
        latest.config.check_model(model, directory)
    return latest


def edit_of(
    kept: StateFile, model: nn.Module | None, where: str
) -> tuple[ModelEdit, BaFTHyperParams]:
    """Make an edit from a kept state, not yet attached, and its hyper-parameters.

    Raises:
        ValueError: If the state does not fit the hyper-parameters, or the model if one is loaded.
    """
    hparams = hparams_of(kept.config.hparams, model, where)
    bases = [v for name, v in kept.state.learned.items() if name.endswith(".basis")]
    kept_size = max((n for basis in bases for n in basis.shape[-1:]), default=0)
    size = kept_size if model is None else text_config(model).hidden_size
    there = {name.split(".")[1] for name in kept.state.learned if name.endswith(".basis")}
    missing = {str(layer) for layer in hparams.layers} - there
    try:
        if missing:  # no memory is taken for them
            raise ValueError(f"the state has no bases of layer {min(missing)}")
        if size != kept_size:
            raise ValueError(
                f"it is of models of hidden size {kept_size}; {type(model).__name__} has {size}"
            )
        edit = new_edit(hparams, size)
        edit.restore(kept.state.learned)
    except ValueError as error:
        raise ValueError(f"the edit in {where} cannot be used: {error}") from None
    edit.memory = kept.state.memory
    return edit, hparams


def check_carried(model: nn.Module, kept: StateFile, where: str) -> None:
    """Raise ValueError if a model carries another edit than the kept one."""
    carried = attached_edit(model)
    if carried is None:
        return
    now = EditState(carried.snapshot(), kept.state.attached, kept.state.memory)
    if state_hash(now) != state_hash(kept.state):
        raise ValueError(
            f"the model must carry no edit, or that in {where}; it carries another: call "
            "attached_edit(model).detach() first"
        )


def check_same_shape(carried: ModelEdit, hparams: BaFTHyperParams, where: str) -> None:
    """Raise ValueError unless an edit has the shape that the hyper-parameters name."""
    for name in SHAPE:
        is_so, wanted = getattr(carried, name), getattr(hparams, name)
        if is_so != (tuple(wanted) if name == "layers" else wanted):
            raise ValueError(
                f"{name} must be {is_so!r}, as in {where}; got {short(wanted)}: undo that edit, or "
                "use its hyper-parameters"
            )
