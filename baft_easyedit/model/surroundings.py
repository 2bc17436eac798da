"""Restore all that training changes in a model beside the edit, even after an interrupt.

Training changes modes, hooks and methods of the model for a while. The code that makes a change
also undoes it, after success and after an error. But an interrupt can come in the middle of the
undoing; so `Learner.alone` copies all of them before, and after a failure restores the copy.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from baft_easyedit.model.hooks import ModelEdit
from baft_easyedit.model.overrides import OVERRIDES

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)

_METHODS = ("forward", *(kind.name for kind in OVERRIDES))
"""Methods that training may replace on an instance."""


class Surroundings:
    """A copy of the present modes, hooks and methods of a model's modules, and of torch's modes."""

    def __init__(self, model: nn.Module, edit: ModelEdit) -> None:
        self._handles = (edit.handles, list(edit.handles))
        self._contexts = (edit.contexts, edit.contexts.now)
        self._modules = [(m, m.training, _own_methods(m)) for m in model.modules()]
        self._hooks = [(hooks, list(hooks.items())) for hooks in _hooks_of(model)]
        self._trained = [(p, p.requires_grad) for p in model.parameters()]
        self._is_grad_enabled = torch.is_grad_enabled()
        self._has_cudnn = torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]

    def restore(self) -> None:
        """Restore what has changed since."""
        handles, before = self._handles
        handles[:] = before
        contexts, settings = self._contexts
        contexts.now = settings
        torch.set_grad_enabled(self._is_grad_enabled)
        if self._has_cudnn:  # else another thread may be about to enable it
            torch.backends.cuda.enable_cudnn_sdp(True)
        for module, training, methods in self._modules:
            module.training = training
            _set_methods(module, methods)
        for hooks, items in self._hooks:
            if list(hooks.items()) != items:
                hooks.clear()
                hooks.update(items)
        for parameter, requires_grad in self._trained:
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad_(requires_grad)


def _hooks_of(model: nn.Module) -> Iterator[dict[int, Any]]:
    """Yield the dicts of all forward hooks of a model."""
    for module in model.modules():
        yield from (vars(module)[name] for name in _HOOKS if name in vars(module))


def _own_methods(module: nn.Module) -> dict[str, Callable[..., Any]]:
    """Return the methods that are replaced on an instance."""
    return {name: vars(module)[name] for name in _METHODS if name in vars(module)}


def _set_methods(module: nn.Module, methods: Mapping[str, Callable[..., Any]]) -> None:
    """Replace exactly these methods on an instance; the others are its class's again."""
    for name in _METHODS:
        if vars(module).get(name) is not methods.get(name):
            vars(module).pop(name, None)
            if name in methods:
                vars(module)[name] = methods[name]
