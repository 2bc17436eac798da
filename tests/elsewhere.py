"""A device that is not there, to see on a CPU what an edit does on a GPU: for a process of its own.

Its tensors lie in the CPU's memory, but torch takes them for another device's: operators refuse to
mix them with those of the CPU, and whatever a GPU would have to be waited for is counted.
"""

import traceback
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from baft_easyedit import BaFTEditor, BaFTHyperParams, ReFTHyperParams
from baft_easyedit.training.step import Objective
from tests.conftest import make_model, make_tokenizer

NAME = "elsewhere"
WAITS = Counter()
"""What a GPU would have been waited for, by operator and line of the package."""

REQUESTS = [
    {"prompt": prompt, "target_new": target, "loc_prompt": "Water boils at 100 degrees"}
    for prompt, target in (("Ice is", "hot"), ("Fog is", "dry"))
]


class Elsewhere(Tensor):
    """A tensor of the other device; `inner` has its values."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner):
        place = {"strides": inner.stride(), "storage_offset": inner.storage_offset()}
        device = torch.device(NAME, 0)
        tensor = Tensor._make_wrapper_subclass(
            cls, inner.shape, **place, dtype=inner.dtype, device=device
        )
        tensor.inner = inner
        return tensor

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        return call(op, args, kwargs or {})

    def tolist(self):
        note_wait("tolist")
        return self.inner.tolist()


class Device(TorchDispatchMode):
    """Lets tensors be made on the device in this context."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        return call(op, args, kwargs or {})


def each(kind, function, value):
    """Apply a function to all of a kind in lists, tuples and dicts: torch's own way takes long."""
    if isinstance(value, kind):
        return function(value)
    if isinstance(value, (list, tuple)):
        return type(value)([each(kind, function, one) for one in value])
    if isinstance(value, dict):
        return {key: each(kind, function, one) for key, one in value.items()}
    return value


def tensors_in(value):
    """Return all tensors in lists, tuples and dicts."""
    found = []
    each(Tensor, found.append, value)
    return found


def call(op, args, kwargs):
    """Call an operator where its tensors are."""
    name, given = op.overloadpacket.__name__, tensors_in((args, kwargs))
    there = [tensor for tensor in given if isinstance(tensor, Elsewhere)]
    here = [t for t in given if not isinstance(t, Elsewhere) and t.dim()]
    device = kwargs.get("device")
    goes_there = bool(there) if device is None else torch.device(device).type == NAME
    if name == "copy_":
        goes_there = isinstance(args[0], Elsewhere)
    if name in ("_to_copy", "copy_"):
        if bool(there) != goes_there or (there and here):
            note_wait(name)
    elif there and here:
        raise RuntimeError(f"{op} is given tensors of two devices")
    elif there and looks(name, op, args):
        note_wait(name)
    plain_args, plain_kwargs = each(Elsewhere, lambda t: t.inner, (args, kwargs))
    if device is not None:
        plain_kwargs = {**plain_kwargs, "device": "cpu"}
    result = op(*plain_args, **plain_kwargs)
    if not goes_there:
        return result
    known = {id(tensor.inner): tensor for tensor in there}
    moved = lambda t: known[id(t)] if id(t) in known else Elsewhere(t)  # noqa: E731
    result = each(Tensor, moved, result)
    return return_and_correct_aliasing(op, args, kwargs, result)


def looks(name, op, args):
    """Tell whether an operator needs to know values, to go on or for the size of its result."""
    if name.startswith("index"):
        return any(i.dtype in (torch.bool, torch.uint8) for i in tensors_in(args[1:]))
    return name == "equal" or bool(
        {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & {*op.tags}
    )


def note_wait(name):
    """Count what a GPU would be waited for."""
    lines = [f for f in traceback.extract_stack() if "baft_easyedit/" in f.filename]
    WAITS[name, f"{Path(lines[-1].filename).name}:{lines[-1].lineno}" if lines else ""] += 1


def learned(model, hparams):
    """Edit one, then all together, then side by side; return the last loss of each run."""
    editor = BaFTEditor(model, make_tokenizer(), hparams)
    reports = [editor.edit(request) for request in (REQUESTS[0], REQUESTS)]
    assert {p.device for p in editor.model_edit.parameters()} == {model.device}
    reports += [one.report for one in editor.learn_apart(REQUESTS)]
    editor.model_edit.detach()
    return torch.tensor([report.final_loss for report in reports])


def check(family, hparams):
    """Compare edits of a model where it is and elsewhere."""
    model = make_model(family)
    expected = learned(model, hparams)
    WAITS.clear()
    with Device():
        losses = learned(model.to(NAME), hparams)
    assert torch.allclose(losses, expected, rtol=1e-3), (family, losses, expected)
    num_looks = sum(count for (name, _), count in WAITS.items() if name == "tolist")
    assert num_looks <= (len(REQUESTS) + 1) * (2 + hparams.num_steps / 4), WAITS


def never_waiting(gradients):
    """Wrap `Objective.gradients`: it may wait for nothing, unless the model itself does."""

    def watched(objective, forward):
        before = Counter(WAITS)
        result = gradients(objective, forward)
        assert before == WAITS or not forward.is_cached, WAITS - before
        return result

    return watched


def main():
    """Check models of several kinds, and ReFT."""
    _setup_privateuseone_for_python_backend(NAME)
    getattr(torch, NAME).get_amp_supported_dtype = lambda: []  # autocast asks, to be switched off
    torch.set_num_threads(1)
    Objective.gradients = never_waiting(Objective.gradients)
    settings = {"layers": [1, 3], "rank": 4, "lr": 1e-2, "num_steps": 2, "early_stop_loss": 0.0}
    for family in ("gemma3", "gpt2"):
        check(family, BaFTHyperParams("tiny", **settings))
    check("llama", ReFTHyperParams("tiny", **settings))
    check("llama", BaFTHyperParams("tiny", **settings))
