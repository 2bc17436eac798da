"""One forward of a model on given tokens, again and again: what a step of learning runs.

Shapes: B bins, W columns, A answer tokens, V vocabulary, D hidden size.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from baft_easyedit.caches import FrozenPrefix
from baft_easyedit.hooks import ModelEdit, Positions
from baft_easyedit.packing import Layout
from baft_easyedit.recordings import model_version


class Expected(NamedTuple):
    """Losses that a forward has to give, known from one of all columns."""

    rows: list[int]
    """The rows that they are known of."""
    losses: Tensor
    """Of the answer tokens of each of these, in nats."""
    tolerance: float
    """How far they may be off, relative to the largest, or in nats if that is less than one."""

    def agree(self, row_losses: Tensor) -> bool:
        """Tell whether the losses of all rows, [R], are as expected; it waits for the device."""
        largest = max(1.0, float(self.losses.max()))
        difference = (row_losses[self.rows] - self.losses).abs().max()
        return bool(difference <= self.tolerance * largest)


class Forward:
    """A model's forward on the tokens of a layout.

    Args:
        model: A causal language model that `edit` is attached to.
        edit: The edit.
        layout: What is computed.
        inputs: Arguments of the forward.
        stubs: Decoder layers that return `output` instead of computing.
        output: Hidden states [B, W, D], or a tuple that begins so.
        is_rounded: Whether the layout has one of few sizes.
        expected: What it has to give with the edit as it is now; None if that is not known.
    """

    def __init__(
        self,
        model: Any,
        edit: ModelEdit,
        layout: Layout,
        inputs: Mapping[str, Any],
        stubs: Sequence[nn.Module] = (),
        output: Any = None,
        is_rounded: bool = False,
        expected: Expected | None = None,
    ) -> None:
        self._model = model
        self._edit = edit
        self.layout = layout
        self.is_rounded = is_rounded
        self.expected = expected
        # In some layouts of a size there is no padding: it takes another recording to gain by that.
        at = layout.positions
        self._positions = Positions(at, False) if is_rounded else Positions.of(at)
        self._inputs = inputs
        self._stubs = stubs
        self._output = output

    @property
    def sizes(self) -> Hashable:
        """What forwards have in common that run the same kernels, on other contents."""
        layout = self.layout
        return (
            tuple((name, tuple(t.shape), t.dtype, t.device) for name, t in self.tensors.items()),
            (layout.num_edits, len(layout.rows), layout.num_new, layout.num_rehearsed),
            all(row.is_edit for row in layout.rows),
        )

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The contents: all tensors that a call reads, beside the weights and what is learned."""
        output = self._output[0] if isinstance(self._output, tuple) else self._output
        named = {"positions": self._positions.at, "output": output}
        named |= {field.name: getattr(self.layout, field.name) for field in fields(self.layout)}
        for name, value in self._inputs.items():
            if isinstance(value, FrozenPrefix):
                named |= {f"{i}.{k}": t for i, kv in value.states.items() for k, t in enumerate(kv)}
            elif isinstance(value, Mapping):
                named |= {f"{name}.{key}": t for key, t in value.items()}
            else:
                named[name] = value
        return {name: value for name, value in named.items() if isinstance(value, Tensor)}

    @property
    def num_bytes(self) -> int:
        """Memory of the contents."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def is_replay(self) -> bool:
        """Whether some layers are not computed."""
        return bool(self._stubs)

    def take(self, other: "Forward") -> None:
        """Copy the contents of another forward of the same sizes into this one's memory."""
        self.expected = other.expected
        others = other.tensors
        for name, tensor in self.tensors.items():
            tensor.copy_(others[name])

    @property
    def weights_version(self) -> Hashable:
        """What changes with the model's weights."""
        return model_version(self._model)

    @property
    def device(self) -> torch.device | None:
        """Where the model is; None if on several devices."""
        devices = {p.device for p in self._model.parameters()}
        return devices.pop() if len(devices) == 1 else None

    def __call__(self) -> Tensor:
        """Run the model as the edit has it now; return the logits of answer tokens, [A, V].

        Behind them may come some that belong to nobody (see `packing.rounded`).
        """
        model, columns = self._model, self.layout.predicting
        with (
            self._edit.at_positions(self._positions),
            _stubbed(self._stubs, self._output),
            _head_at(model.get_output_embeddings(), columns) as is_selected,
            _without_cudnn_attention(),
        ):
            logits = model(**self._inputs).logits.flatten(0, 1)
        return logits if is_selected else logits[columns.to(logits.device)]


@contextmanager
def _head_at(head: nn.Module | None, columns: Tensor) -> Iterator[list[bool]]:
    """Let a model's output embedding compute some columns only in this context.

    Args:
        head: Maps hidden states [B, W, D] to logits; None if the model does not name it.
        columns: Flat indices into [B, W], [A].

    Yields:
        A list that is no longer empty once it did; the model's logits are [1, A, V] then.
    """
    selected: list[bool] = []

    def select(_module: nn.Module, arguments: tuple[Any, ...]) -> Any:
        if not arguments:
            return None
        hidden = arguments[0].flatten(0, 1)  # [B W, D]
        selected.append(True)
        return (hidden[columns.to(hidden.device)][None], *arguments[1:])

    handle = None if head is None else head.register_forward_pre_hook(select)
    try:
        yield selected
    finally:
        if handle is not None:
            handle.remove()


@contextmanager
def _without_cudnn_attention() -> Iterator[None]:
    """Leave attention to torch's other kernels in this context.

    That of cuDNN, which torch prefers on recent GPUs, makes a plan for each new shape, for longer
    than a step takes; and with masks it has given gradients that are not finite.
    """
    was_enabled = torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        if was_enabled:  # else another thread may be here, and enables it when it leaves
            torch.backends.cuda.enable_cudnn_sdp(True)


@contextmanager
def _stubbed(layers: Sequence[nn.Module], output: Any) -> Iterator[None]:
    """Let layers return `output` in this context; their hooks still run."""
    # accelerate replaces the forward of an instance too
    previous: list[Callable[..., Any] | None] = [vars(m).get("forward") for m in layers]
    for layer in layers:
        layer.forward = lambda *_args, **_kwargs: output
    try:
        yield
    finally:
        for layer, forward in zip(layers, previous, strict=True):
            if forward is None:
                del layer.forward
            else:
                layer.forward = forward
