"""The forward that training steps repeat: a model, and inputs that stay the same between steps.

`prefix_cache` prepares it, `step` runs it. Early layers may be stubs that return recorded hidden
states, and logits are computed only where an answer token is predicted.

Shapes: B bins, W columns, A answer tokens, V vocabulary, D hidden size.
"""

import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from baft_easyedit.model.hooks import ModelEdit
from baft_easyedit.model.locks import of_this_thread
from baft_easyedit.training.caches import FrozenPrefix
from baft_easyedit.training.layout import Layout
from baft_easyedit.training.observing import model_version


class CannotCacheError(ValueError):
    """A model cannot use the prefix cache, or gives other results with it."""


class Contents(NamedTuple):
    """The inputs of a forward: tensors, without a reference to the model."""

    layout: Layout
    positions: Tensor
    """The layout's intervened positions, one tensor for all steps: no step waits to compare two."""
    inputs: Mapping[str, Any]
    """Arguments of the model's forward."""
    output: Any = None
    """The output of stubbed layers: hidden states [B, W, D], or a tuple with them first."""

    @property
    def sizes(self) -> Hashable:
        """A key that is equal for contents on which the same kernels run."""
        layout = self.layout
        return (
            tuple((name, tuple(t.shape), t.dtype, t.device) for name, t in self.tensors.items()),
            (layout.num_edits, len(layout.rows)),
            all(row.is_edit for row in layout.rows),
        )

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors that a forward reads, except the parameters of the model and the edit."""
        output = self.output[0] if isinstance(self.output, tuple) else self.output
        named = {"positions": self.positions, "output": output}
        named |= {field.name: getattr(self.layout, field.name) for field in fields(self.layout)}
        for name, value in self.inputs.items():
            if isinstance(value, FrozenPrefix):
                named |= {f"{i}.{k}": t for i, kv in value.states.items() for k, t in enumerate(kv)}
            elif isinstance(value, Mapping):
                named |= {f"{name}.{key}": t for key, t in value.items()}
            else:
                named[name] = value
        return {name: value for name, value in named.items() if isinstance(value, Tensor)}

    @property
    def num_bytes(self) -> int:
        """Memory of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def take(self, other: "Contents") -> None:
        """Copy other contents of the same sizes into this memory."""
        others = other.tensors
        for name, tensor in self.tensors.items():
            tensor.copy_(others[name])


class Forward:
    """A forward of an edited model on given contents.

    Decoder layers in `stubs` return `contents.output` instead of computing.
    """

    def __init__(
        self,
        model: Any,
        edit: ModelEdit,
        contents: Contents,
        stubs: Sequence[nn.Module] = (),
    ) -> None:
        self._model = model
        self._edit = edit
        self._stubs = stubs
        self.contents = contents

    def on(self, contents: Contents) -> "Forward":
        """Return this forward on contents that lie in other memory (that a CUDA graph reads)."""
        return Forward(self._model, self._edit, contents, self._stubs)

    @property
    def layout(self) -> Layout:
        """The layout of the computed tokens."""
        return self.contents.layout

    @property
    def is_cached(self) -> bool:
        """Whether the forward runs on the prefix cache."""
        return bool(self._stubs)

    @property
    def weights_version(self) -> Hashable:
        """A key that changes with the model's weights; see `model_version`."""
        return model_version(self._model)

    @property
    def device(self) -> torch.device | None:
        """The model's device; None if it lies on several."""
        devices = {p.device for p in self._model.parameters()}
        return devices.pop() if len(devices) == 1 else None

    def __call__(self) -> Tensor:
        """Run the model with the present edit; return the logits of the answer tokens, [A, V].

        Logits of padding may follow them (see `layout.rounded`).

        Raises:
            CannotCacheError: If the model cannot use the prefix cache that it is given.
        """
        model, contents = self._model, self.contents
        columns = contents.layout.predicting
        with (
            self._edit.at_positions(contents.positions),
            _stubbed(self._stubs, contents.output),
            _head_at(model.get_output_embeddings(), columns) as is_selected,
            _without_cudnn_attention(),
        ):
            logits = self._logits().flatten(0, 1)
        return logits if is_selected else logits[columns.to(logits.device)]

    def _logits(self) -> Tensor:
        """Run the model; raise CannotCacheError for an error that the prefix cache may cause."""
        inputs = self.contents.inputs
        try:
            return self._model(**inputs).logits
        except _OF_UNKNOWN_CACHES as error:
            has_cache = any(isinstance(value, FrozenPrefix) for value in inputs.values())
            if not has_cache or _is_of_the_device(error) or _is_ours(error.__traceback__):
                raise
            raise CannotCacheError(f"{type(error).__name__}: {error}") from error


_OF_UNKNOWN_CACHES = (
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,  # of shapes that do not fit, and NotImplementedError
    TypeError,
    ValueError,
)
"""Errors of a model's code with a cache of a class that it does not know."""


def _is_of_the_device(error: Exception) -> bool:
    """Tell whether an accelerator failed or ran out of memory, which is not due to the cache."""
    kinds = (torch.cuda.OutOfMemoryError, getattr(torch, "AcceleratorError", MemoryError))
    return isinstance(error, kinds) or "CUDA error" in str(error)


def _is_ours(traceback: TracebackType | None) -> bool:
    """Tell whether an error comes from this package's own code, other than `caches`."""
    name = ""
    while traceback is not None:
        name, traceback = traceback.tb_frame.f_globals.get("__name__", ""), traceback.tb_next
    return name.startswith("baft_easyedit.") and name != FrozenPrefix.__module__


@contextmanager
def _head_at(head: nn.Module | None, columns: Tensor) -> Iterator[list[bool]]:
    """Let a model's output embedding compute the logits of only some columns in this context.

    Args:
        head: Maps hidden states [B, W, D] to logits; None if the model does not tell it.
        columns: Flat indices into [B, W], [A].

    Yields:
        A list that is filled once the embedding ran; the model's logits are [1, A, V] then.
    """
    selected: list[bool] = []

    def select(_module: nn.Module, arguments: tuple[Any, ...]) -> Any:
        if not arguments:
            return None
        hidden = arguments[0].flatten(0, 1)  # [B W, D]
        selected.append(True)
        return (hidden[columns.to(hidden.device)][None], *arguments[1:])

    handle = None
    try:
        if head is not None:
            handle = head.register_forward_pre_hook(of_this_thread(select))
        yield selected
    finally:
        if handle is not None:
            handle.remove()


@contextmanager
def _without_cudnn_attention() -> Iterator[None]:
    """Switch off cuDNN's attention kernel in this context.

    Torch prefers that kernel on recent GPUs. But it makes a plan for each new shape, which takes
    longer than a step, and with masks it has given gradients that are not finite.
    """
    was_enabled = torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
    try:
        torch.backends.cuda.enable_cudnn_sdp(False)
        yield
    finally:
        if was_enabled:  # else another thread may be in this context; it switches the kernel on
            torch.backends.cuda.enable_cudnn_sdp(True)


@contextmanager
def _stubbed(layers: Sequence[nn.Module], output: Any) -> Iterator[None]:
    """Let layers return `output` in this context and thread; their hooks still run."""
    # An instance may have a forward of its own already: accelerate replaces it too.
    previous: list[Callable[..., Any] | None] = [vars(m).get("forward") for m in layers]
    try:
        for layer in layers:
            layer.forward = _stub(layer.forward, output)
        yield
    finally:
        for layer, forward in zip(layers, previous, strict=True):
            if forward is None:
                vars(layer).pop("forward", None)
            else:
                layer.forward = forward


def _stub(forward: Callable[..., Any], output: Any) -> Callable[..., Any]:
    """Return a forward that gives `output` in this thread, and computes in others."""
    thread = threading.get_ident()

    def stub(*args: Any, **kwargs: Any) -> Any:
        return output if threading.get_ident() == thread else forward(*args, **kwargs)

    return stub
