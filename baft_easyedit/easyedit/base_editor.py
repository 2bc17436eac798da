"""Small wraps around EasyEdit's `BaseEditor`, so that plain user scripts work with BaFT and ReFT.

They check what EasyEdit leaves unchecked or asserts without a message, load the model from a path
that EasyEdit reads rightly, and (release only) honour the device. Other methods are left alone but
for the device.
"""

import copy
import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from baft_easyedit.devices import check_device
from baft_easyedit.easyedit.compat import usable_unknown_token
from baft_easyedit.easyedit.devices import honoured_device
from baft_easyedit.easyedit.host import Generation
from baft_easyedit.easyedit.model_path import host_model_path
from baft_easyedit.requests import EditRequest

OUR_METHODS = ("BaFT", "ReFT")

_ENTRY_POINTS = (
    "edit",
    "batch_edit",
    "edit_requests",
    "edit_dataset",
    "normal_edit",
    "generate_edit",
)


def wrap_base_editor(generation: Generation) -> None:
    """Wrap `BaseEditor`; a second call does nothing."""
    base = importlib.import_module("easyeditor.editors.editor").BaseEditor
    if hasattr(base, "_baft_wrapped"):
        return
    base.__init__ = _constructor(base.__init__, generation)
    for name in _ENTRY_POINTS:
        if hasattr(base, name):  # each generation lacks one or two
            setattr(base, name, _entry_point(getattr(base, name), generation))
    base._baft_wrapped = True


def _constructor(original: Callable[..., None], generation: Generation) -> Callable[..., None]:
    """Wrap `BaseEditor.__init__`."""

    @functools.wraps(original)
    def init(self: Any, hparams: Any) -> None:
        if getattr(hparams, "alg_name", None) in OUR_METHODS:
            if generation == "current" or torch.cuda.is_available():  # else all means the CPU
                check_device(hparams.device)
            hparams = _with_safe_path(hparams)
        with honoured_device(generation, getattr(hparams, "device", None)):
            original(self, hparams)
        if generation == "pypi":
            usable_unknown_token(self.tok)

    return init


def _with_safe_path(hparams: Any) -> Any:
    """Return hyper-parameters from whose `model_name` EasyEdit loads the right classes."""
    # EasyEdit also takes a subclass of str that holds a loaded model: leave that alone.
    if type(hparams.model_name) is not str:
        return hparams
    path = host_model_path(hparams.model_name)
    if path == hparams.model_name:
        return hparams
    changed = copy.copy(hparams)
    changed.model_name = path
    return changed


def _entry_point(original: Callable[..., Any], generation: Generation) -> Callable[..., Any]:
    """Wrap one of `BaseEditor`'s ways to edit."""
    takes_lists = original.__name__ in ("edit", "batch_edit", "normal_edit", "generate_edit")

    @functools.wraps(original)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        if takes_lists and self.alg_name in OUR_METHODS:
            names = ("prompts", "target_new")
            check_arguments(**dict(zip(names, args, strict=False)), **kwargs)
        with honoured_device(generation, self.hparams.device):
            return original(self, *args, **kwargs)

    return run


def check_arguments(
    prompts: str | Sequence[str],
    target_new: str | Sequence[str],
    ground_truth: str | Sequence[str | None] | None = None,
    rephrase_prompts: str | Sequence[str] | None = None,
    subject: str | Sequence[str] | None = None,
    locality_inputs: Mapping[str, Any] | None = None,
    portability_inputs: Mapping[str, Any] | None = None,
    **others: Any,  # noqa: ARG001
) -> None:
    """Check the arguments of `BaseEditor.edit` and `batch_edit` before anything is done.

    Args:
        prompts: What to edit.
        target_new: One target for each prompt.
        ground_truth: One for each prompt, if given.
        rephrase_prompts: One for each prompt, if given.
        subject: One for each prompt, and a part of it, if given.
        locality_inputs: For each name, `prompt` and `ground_truth` with one entry for each prompt.
        portability_inputs: Likewise.
        others: The other arguments of EasyEdit, which it checks itself.

    Raises:
        ValueError: If a list has another length than `prompts`, a prompt or target is empty, or a
            subject is not a part of its prompt.
        TypeError: If a prompt, target or subject is not text.
    """
    texts = _as_list(prompts)
    aligned = {
        "target_new": target_new,
        "ground_truth": ground_truth,
        "rephrase_prompts": rephrase_prompts,
        "subject": subject,
    }
    for kind, probes in (("locality", locality_inputs), ("portability", portability_inputs)):
        for name, probe in (probes or {}).items():
            for key in ("prompt", "ground_truth"):
                if key not in probe:
                    raise ValueError(f"{kind}_inputs[{name!r}] must have the key {key!r}")
                aligned[f"{kind}_inputs[{name!r}][{key!r}]"] = probe[key]
    for name, values in aligned.items():
        if values is not None and len(_as_list(values)) != len(texts):
            raise ValueError(
                f"{name} must have one entry for each prompt; got {len(_as_list(values))} for "
                f"{len(texts)} prompts"
            )
    subjects = [None] * len(texts) if subject is None else _as_list(subject)
    for prompt, target, about in zip(texts, _as_list(target_new), subjects, strict=True):
        EditRequest(prompt=prompt, target_new=target, subject=about)


def _as_list(values: Any) -> list[Any]:
    """Return one text, or several, as a list."""
    return [values] if isinstance(values, str) else list(values)
