"""BaFT and ReFT as methods of EasyEdit: the apply functions and their registration.

After `register()`, EasyEdit's own scripts take our hyper-parameters:
`BaseEditor.from_hparams(BaFTHyperParams.from_hparams("BaFT/facts-llama")).edit(...)`.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import Any, NamedTuple, cast

from torch import nn

from baft_easyedit.easyedit.base_editor import wrap_base_editor
from baft_easyedit.easyedit.host import Host, load_host
from baft_easyedit.easyedit.scoring import wrap_scoring
from baft_easyedit.editor import BaFTEditor
from baft_easyedit.hparams import OUR_METHODS, BaFTHyperParams
from baft_easyedit.model.hooks import ModelEdit, attached_edit
from baft_easyedit.model.inspect import decoder_layers
from baft_easyedit.storage.loading import check_same_shape


class Undo(dict[str, Any]):
    """EasyEdit's `weights_copy` for an edit that changes no weights: calling it undoes the edit.

    As a mapping it is empty, and reading it does nothing, but for `is_undone_by_items`.
    """

    def __init__(self, undo: Callable[[], None]) -> None:
        super().__init__()
        self._undo: Callable[[], None] | None = undo
        self.is_undone_by_items = False
        """Whether `items` undoes the edit, where EasyEdit restores by a loop over them."""

    def items(self) -> Any:
        """Return no weights to copy back."""
        if self.is_undone_by_items:
            self()
        return super().items()

    def __call__(self) -> None:
        """Undo the edit; once that is done, another call does nothing.

        Raises:
            ValueError: If the edit is not the latest change of the model; nothing has changed.
        """
        if self._undo is not None:
            self._undo()
            self._undo = None


_UNDONE = "_baft_undone"
"""Attribute of a model that holds its `_Undone`."""


class _Undone(NamedTuple):
    """An undone edit, kept for reuse. Copies of the model, and files of it, hold None instead."""

    edit: ModelEdit

    def __reduce__(self) -> Any:
        return type(None), ()


def _undone_edit(model: nn.Module, hparams: BaFTHyperParams) -> ModelEdit | None:
    """Return the edit that was undone on a model, reset as if it were new; None if none fits.

    EasyEdit edits and undoes one request after another. An edit whose parameters lie in the same
    memory can replay the training steps recorded for the edits before it (see `KnownSteps`).
    """
    if attached_edit(model) is not None:
        return None
    undone = vars(model).pop(_UNDONE, None)  # so that nobody else gets it
    if undone is None:
        return None
    try:
        fitting = hparams.at_depth(len(decoder_layers(model)))
        check_same_shape(undone.edit, fitting, "the edit before")
    except ValueError:
        return None
    undone.edit.start_afresh(hparams.seed)
    undone.edit.memory, undone.edit.latest_change = {}, None
    return cast(ModelEdit, undone.edit)


def apply_baft_to_model(
    model: nn.Module,
    tok: Any,
    requests: Sequence[Mapping[str, Any]],
    hparams: BaFTHyperParams,
    copy: bool = False,
    return_orig_weights: bool = True,
    keep_original_weight: bool = False,  # noqa: ARG001
    train_ds: Any = None,  # noqa: ARG001
    **kwargs: Any,  # noqa: ARG001
) -> tuple[nn.Module, dict[str, Any]]:
    """Write requests into a model with BaFT, or with ReFT if the hyper-parameters are ReFT's.

    EasyEdit's requests are learned together, in the model itself unless a copy is asked for; one
    that carries an edit is edited further. The caller undoes what it does not want to keep; what
    else EasyEdit passes is for other methods.

    Returns:
        The edited model, and an `Undo`; an empty dict without `return_orig_weights`.

    Raises:
        ValueError: If a request or the model is unusable; nothing has changed then.
        TypeError: If a request has values of the wrong type; likewise.
    """
    if copy:
        model = deepcopy(model)
    is_first = attached_edit(model) is None
    editor = BaFTEditor(model, tok, hparams, edit=_undone_edit(model, hparams))
    editor.edit(list(requests))

    def undo() -> None:
        editor.undo()
        if is_first:
            setattr(model, _UNDONE, _Undone(editor.model_edit))

    return model, Undo(undo) if return_orig_weights else {}


apply_reft_to_model = apply_baft_to_model
"""ReFT is BaFT with the hyper-parameters of ReFT (Liu et al. 2025, Lemma 2.4)."""


def register() -> Host:
    """Add BaFT and ReFT to EasyEdit, importing it if need be; a second call does nothing more.

    Returns:
        The EasyEdit that was found.

    Raises:
        ImportError: If there is no usable EasyEdit; the message says how to get one.
    """
    host = load_host()
    # Not `import easyeditor.util...`: star imports hide the real `easyeditor.util`.
    algorithms = importlib.import_module("easyeditor.util.alg_dict").ALG_DICT
    if algorithms.get("BaFT") is apply_baft_to_model:
        return host
    batch_editor = importlib.import_module("easyeditor.editors.batch_editor").BatchEditor
    original = batch_editor.is_batchable_method
    batch_editor.is_batchable_method = staticmethod(
        lambda alg_name: alg_name in OUR_METHODS or original(alg_name)
    )
    if host.generation == "current":  # the release only knows of items to copy back
        utils = importlib.import_module("easyeditor.editors.utils")
        utils.CALLABLE_RESTORE_ALGS.update(OUR_METHODS)
    wrap_scoring()
    wrap_base_editor(host.generation)
    algorithms.update(BaFT=apply_baft_to_model, ReFT=apply_reft_to_model)
    return host
