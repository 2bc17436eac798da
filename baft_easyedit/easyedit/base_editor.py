"""Thin wrappers of EasyEdit's `BaseEditor` that make plain user scripts work with BaFT and ReFT.

The wrappers give arguments one meaning in both generations (see `arguments`), undo edits where
EasyEdit would copy weights back, load the model from a path by which EasyEdit chooses the right
classes (`model_path`), cast it where `bf16` is asked for, and, in the release only, honour the
device. For EasyEdit's other methods only `bf16` and, in the release, the device and a missing
unknown token of the tokenizer are put right.
"""

import copy
import functools
import importlib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from baft_easyedit.easyedit.arguments import READ, prepare_requests, read_call
from baft_easyedit.easyedit.compat import honoured_device
from baft_easyedit.easyedit.host import Generation
from baft_easyedit.easyedit.model_path import host_model_path
from baft_easyedit.hparams import OUR_METHODS
from baft_easyedit.model.devices import check_device

logger = logging.getLogger(__name__)

_IN_CALL = "_baft_in_call"
"""Attribute of a `BaseEditor` during a user's call: EasyEdit's own calls are not wrapped then."""


def wrap_base_editor(generation: Generation) -> None:
    """Wrap `BaseEditor`."""
    base = importlib.import_module("easyeditor.editors.editor").BaseEditor
    base.__init__ = _constructor(base.__init__, generation)
    for name in READ[generation]:
        if hasattr(base, name):  # not all commits have all
            setattr(base, name, _entry_point(getattr(base, name), generation))
    if generation == "pypi":
        base._prepare_requests = _preparation(base._prepare_requests)


def _constructor(original: Callable[..., None], generation: Generation) -> Callable[..., None]:
    """Wrap `BaseEditor.__init__`."""

    @functools.wraps(original)
    def init(self: Any, hparams: Any) -> None:
        if getattr(hparams, "alg_name", None) in OUR_METHODS:
            if generation == "current" or torch.cuda.is_available():  # else all mean the CPU
                check_device(hparams.device)
            # EasyEdit also takes a subclass of str that holds a loaded model: leave that alone.
            if type(hparams.model_name) is str:
                hparams = copy.copy(hparams)  # the caller's object keeps its path
                hparams.model_name = host_model_path(hparams.model_name)
        with honoured_device(generation, getattr(hparams, "device", None)):
            original(self, hparams)
        if getattr(hparams, "bf16", False):
            _cast_to_bfloat16(self.model)
        if generation == "pypi" and getattr(self.tok, "unk_token_id", 0) is None:
            # The release's FT masks its loss by `target_ids != tok.unk_token_id`.
            self.tok.unk_token = self.tok.eos_token

    return init


def _cast_to_bfloat16(model: nn.Module) -> None:
    """Cast a model's weights, as if it had been loaded so: rotary frequencies stay in fp32."""
    for weight in model.parameters():
        weight.data = weight.data.bfloat16()
    logger.warning("bf16: EasyEdit loads no bfloat16, so it loaded float32, and we cast the model")


def _entry_point(original: Callable[..., Any], generation: Generation) -> Callable[..., Any]:
    """Wrap one of `BaseEditor`'s editing methods."""
    restores_by_items = generation == "pypi" or original.__name__ == "normal_edit"

    @functools.wraps(original)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        with honoured_device(generation, self.hparams.device):
            if self.alg_name not in OUR_METHODS or hasattr(self, _IN_CALL):
                return original(self, *args, **kwargs)
            parts, keeps = read_call(original, generation, args, kwargs, self.hparams.batch_size)
            with _in_call(self, keeps, restores_by_items):
                results = [original(self, **arguments) for arguments in parts]
        if len(results) == 1:
            return results[0]
        return [metric for result in results for metric in result[0]], *results[-1][1:]

    return run


@contextmanager
def _in_call(editor: Any, keeps: bool, restores_by_items: bool) -> Iterator[None]:
    """Let EasyEdit run a user's call in this context; if it fails, undo what was not to be kept."""
    apply, undos = editor.apply_algo, []

    def apply_noted(*args: Any, **kwargs: Any) -> Any:
        edited, undo = apply(*args, **kwargs)
        if not keeps:
            undo.is_undone_by_items = restores_by_items
            undos.append(undo)
        return edited, undo

    setattr(editor, _IN_CALL, True)
    editor.apply_algo = apply_noted
    try:
        yield
    except BaseException:
        for undo in undos:  # EasyEdit has done all but the latest; again, they do nothing
            undo()
        raise
    finally:
        editor.apply_algo = apply
        delattr(editor, _IN_CALL)


def _preparation(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the release's `_prepare_requests`, to add what only the current EasyEdit's does.

    These are irrelevant texts (`loc_prompt`), and probes that only some of the requests have.
    """

    @functools.wraps(original)
    def prepare(self: Any, *args: Any, **kwargs: Any) -> Any:
        requests = original(self, *args, **kwargs)
        if self.alg_name not in OUR_METHODS:
            return requests
        for i, request in enumerate(requests):
            if "loc_prompts" in kwargs:
                request["loc_prompt"] = kwargs["loc_prompts"][i]
        return prepare_requests(requests)

    return prepare
