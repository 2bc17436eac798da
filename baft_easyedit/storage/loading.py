"""Read a kept edit and attach it to a model."""

import os
from pathlib import Path

from torch import nn

from baft_easyedit.files.messages import short
from baft_easyedit.files.paths import expanded
from baft_easyedit.hparams import BaFTHyperParams
from baft_easyedit.model.hooks import ModelEdit, attached_edit
from baft_easyedit.storage.config import hparams_of, new_edit
from baft_easyedit.storage.directory import read_history, read_latest
from baft_easyedit.storage.journal import Journal
from baft_easyedit.storage.state import StateFile, check_fits, state_hash
from baft_easyedit.training.learner import EditState
from baft_easyedit.training.rehearsal import RehearsalMemory


def checked_latest(
    model: nn.Module, directory: str | os.PathLike[str], allow_other_model: bool
) -> StateFile:
    """Read the state of a kept directory for a model.

    Raises:
        FileNotFoundError: If no edit is kept there.
        ValueError: If it is damaged, or belongs to another model and that is not allowed.
    """
    latest = read_latest(expanded(directory))
    if not allow_other_model:
        latest.config.check_model(model, str(directory))
    return latest


def journal_of(kept: StateFile, directory: Path) -> Journal | None:
    """Read the journal that led to a kept state; None if it is damaged, or led to another one."""
    last = kept.entries[-1]
    try:
        entries = read_history(directory)[: last.id + 1]
    except (ValueError, OSError):
        return None
    return Journal(entries) if [last.line] == [e.line for e in entries[last.id :]] else None


def attach(
    model: nn.Module, directory: str | os.PathLike[str], allow_other_model: bool = False
) -> ModelEdit:
    """Make a model use a kept edit; no tokenizer is needed. The directory is only read.

    Args:
        model: The model that the edit was learned on; it must carry none now.
        directory: Where `BaFTEditor.save` or `BaFTEditor.open` kept the edit.
        allow_other_model: Use the edit on another model of the same shape.

    Returns:
        The edit, attached; its `detach` takes it off again.

    Raises:
        FileNotFoundError: If no edit is kept there.
        ValueError: If the model is another one, does not fit, or carries an edit; or the file is
            damaged.
    """
    directory = expanded(directory)
    latest = checked_latest(model, directory, allow_other_model)
    hparams = hparams_of(latest.config.hparams, model, str(directory))
    edit = edit_of(latest.state, hparams, model, str(directory))
    edit.attach(model)
    return edit


def kept_hparams(directory: str | os.PathLike[str], model: nn.Module) -> BaFTHyperParams:
    """Return the hyper-parameters of a kept edit, for its model.

    Raises:
        FileNotFoundError: If no edit is kept there.
        ValueError: If the file is damaged.
    """
    kept = read_latest(expanded(directory)).config.hparams
    return hparams_of(kept, model, str(directory))


def edit_of(state: EditState, hparams: BaFTHyperParams, model: nn.Module, where: str) -> ModelEdit:
    """Make the edit that a kept state is of.

    Raises:
        ValueError: If the state does not fit the model or the hyper-parameters.
    """
    try:
        edit = new_edit(hparams, model)
    except ValueError as error:
        raise ValueError(f"the edit in {where} cannot be used: {error}") from None
    check_fits(state, edit, where)
    edit.restore(state.learned)
    edit.memory = RehearsalMemory()
    try:
        edit.memory.restore(state.memory)
    except (ValueError, TypeError) as error:
        raise ValueError(f"the memory in {where} cannot be used: {error}") from None
    return edit


def check_carries_no_other(model: nn.Module, kept: StateFile, where: str) -> None:
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
    """Raise ValueError unless an edit is one that these hyper-parameters would make."""
    wanted = {
        "layers": tuple(hparams.layers),
        "rank": hparams.rank,
        "gate": hparams.gate,
        "num_prompt_positions": hparams.num_prompt_positions,
        "parametrisation": hparams.parametrisation,
        "past_states": hparams.past_states,
    }
    for name, value in wanted.items():
        if getattr(carried, name) != value:
            raise ValueError(
                f"{name} must be {getattr(carried, name)!r}, as in {where}; got {short(value)}: "
                "undo that edit, or use its hyper-parameters"
            )
