"""Forward engines: repeat a model's forward in every optimisation step, computing what can change.

Interventions act on layers >= l1 and columns >= s (the first one intervened on in any row), and
attention is causal. So the outputs of layers 0..l1 are the same in every step, and columns < s are
the same in every layer. `LayerReplay` records both once; each step is then the model's own forward
on columns >= s, with keys and values of the prefix frozen, layers 0..l1 stubbed by what they
returned, and logits only where an answer is predicted. The edit stays where it is, as hooks on the
layers. `FullForward` computes everything: the fallback, and the oracle.

Shapes: B rows, T columns, V vocabulary, N heads, H head size.
"""

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from baft_easyedit.hooks import ModelEdit, decoder_layers
from baft_easyedit.hparams import ENGINES
from baft_easyedit.requests import EditBatch

logger = logging.getLogger(__name__)

_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""How far replayed logits may be from recorded ones, relative to the largest of these."""


class ForwardEngine(Protocol):
    """Computes the logits [B, n, V] of a batch's last n columns."""

    def __call__(self) -> Tensor:
        """Run the model as the edit has it now."""
        ...


def make_engine(model: nn.Module, edit: ModelEdit, batch: EditBatch, name: str) -> ForwardEngine:
    """Choose how a batch is run in each step.

    Args:
        model: A model that `edit` is attached to, in eval mode.
        edit: The edit; its prompt lengths must be set to those of the batch.
        batch: What is learned.
        name: One of `ENGINES`. A model that cannot be replayed gets the full forward, and a line
            in the log that says why.

    Raises:
        ValueError: If there is no such engine.
    """
    if name not in ENGINES:
        raise ValueError(f"engine must be one of {', '.join(ENGINES)}; got {name!r}")
    if name == "replay":
        try:
            return LayerReplay(model, edit, batch)
        except torch.cuda.OutOfMemoryError:  # the full forward needs more
            raise
        # Whatever a model's code does with a cache that it does not know.
        except Exception as error:  # noqa: BLE001
            reason = f"{type(error).__name__}: {error}"
            logger.info("full forward: %s cannot be replayed (%s)", type(model).__name__, reason)
    return FullForward(model, batch)


class FullForward:
    """The model's forward on all columns.

    Args:
        model: A causal language model.
        batch: What it is run on.
    """

    def __init__(self, model: nn.Module, batch: EditBatch) -> None:
        self._model = model
        self._inputs = _inputs(model, batch, use_cache=False)
        self._num_columns = batch.max_answer_length + 1

    def __call__(self) -> Tensor:
        """Return the logits of the last columns, [B, n, V]."""
        return self._model(**self._inputs).logits[:, -self._num_columns :]


def _inputs(model: nn.Module, batch: EditBatch, *, use_cache: bool) -> dict[str, Any]:
    """Return the arguments of a forward that computes the logits of answers, if it can be told."""
    parameters = inspect.signature(model.forward).parameters
    inputs: dict[str, Any] = {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "use_cache": use_cache,
    }
    if "position_ids" in parameters:
        inputs["position_ids"] = batch.position_ids
    if "logits_to_keep" in parameters:
        inputs["logits_to_keep"] = batch.max_answer_length + 1
    return inputs


class FrozenPrefix(DynamicCache):
    """A key-value cache of fixed columns that stores nothing new, so that it serves every step.

    Args:
        states: Keys and values of each layer, [B, N, n, H]; a layer that is not there has no past.
        length: n, the number of columns.
    """

    def __init__(self, states: Mapping[int, tuple[Tensor, Tensor]], length: int) -> None:
        super().__init__()
        self.states = states
        self.length = length

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_args: Any, **_kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Return past and new keys and values."""
        if layer_idx not in self.states:
            return key_states, value_states
        keys, values = self.states[layer_idx]
        return torch.cat([keys, key_states], -2), torch.cat([values, value_states], -2)

    @property
    def is_sliding(self) -> list[bool]:
        """Windows are left to the masks, which see all columns."""
        return [False]

    def get_seq_length(self, *_args: Any, **_kwargs: Any) -> int:
        """Return the number of past columns."""
        return self.length

    def get_query_offset(self, *_args: Any, **_kwargs: Any) -> int:
        """Return the column of the first new token."""
        return self.length

    def get_mask_sizes(self, query: Any, *_args: Any) -> tuple[int, int]:
        """Return the number of columns attended to, and the first of them.

        Args:
            query: The number of new tokens, or (older transformers) their columns.
        """
        num_new = query.shape[0] if isinstance(query, Tensor) else int(query)
        return self.length + num_new, 0

    def __len__(self) -> int:
        return len(self.states)

    def __bool__(self) -> bool:
        return True  # also without states: it is a cache


class _Recorder(FrozenPrefix):
    """An empty cache that keeps what each layer would store."""

    def __init__(self) -> None:
        super().__init__({}, 0)
        self.seen: dict[int, tuple[Tensor, Tensor]] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_args: Any, **_kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Return new keys and values."""
        self.seen[layer_idx] = (key_states, value_states)
        return key_states, value_states


class LayerReplay:
    """The model's forward on the columns that an edit can change.

    Args:
        model: A causal language model of transformers that `edit` is attached to, in eval mode.
        edit: The edit; its prompt lengths must be set to those of the batch.
        batch: What it is run on, padded on the left.

    Raises:
        Exception: Whatever the model raises with a cache that it cannot use.
        ValueError: If the replayed logits of the unedited model are not the recorded ones.
    """

    def __init__(self, model: nn.Module, edit: ModelEdit, batch: EditBatch) -> None:
        self._model = model
        self._num_columns = batch.max_answer_length + 1
        start = _first_edited_column(batch, edit.num_prompt_positions)
        inputs = _inputs(model, batch, use_cache=True)
        first = min(edit.layers)
        self._stubbed = list(decoder_layers(model)[: first + 1])
        recorder = _Recorder()
        with torch.no_grad(), edit.disabled(), _watching(self._stubbed[-1]) as seen:
            recorded = model(**inputs, past_key_values=recorder).logits[:, -self._num_columns :]
        self._output = _suffix(seen[0], start)
        states = {i: kv for i, kv in recorder.seen.items() if i > first}
        self._cache = FrozenPrefix(
            {i: (k[:, :, :start].clone(), v[:, :, :start].clone()) for i, (k, v) in states.items()},
            start,
        )
        per_token = ("input_ids", "position_ids")
        self._inputs = {k: v[:, start:] if k in per_token else v for k, v in inputs.items()}
        with torch.no_grad(), edit.disabled():
            _check_equal(self(), recorded, batch)

    def __call__(self) -> Tensor:
        """Return the logits of the last columns, [B, n, V]."""
        with _stubs(self._stubbed, self._output):
            output = self._model(**self._inputs, past_key_values=self._cache)
        return output.logits[:, -self._num_columns :]


def _first_edited_column(batch: EditBatch, num_prompt_positions: int) -> int:
    """Return the first column that is intervened on in any row."""
    width = batch.input_ids.shape[1]
    padding = width - batch.attention_mask.sum(-1)  # [B]
    before = (batch.prompt_lengths - num_prompt_positions).clamp_min(0)  # [B]
    return int((padding + before).min())


@contextmanager
def _watching(layer: nn.Module) -> Iterator[list[Any]]:
    """Collect a layer's outputs in this context, before any edit of them."""
    seen: list[Any] = []
    handle = layer.register_forward_hook(lambda _m, _a, output: seen.append(output), prepend=True)
    try:
        yield seen
    finally:
        handle.remove()


def _suffix(output: Any, start: int) -> Any:
    """Cut a layer's output, hidden states or a tuple that begins so, to columns from `start`."""
    hidden = (output[0] if isinstance(output, tuple) else output)[:, start:].detach()
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


@contextmanager
def _stubs(layers: Sequence[nn.Module], output: Any) -> Iterator[None]:
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


def _check_equal(replayed: Tensor, recorded: Tensor, batch: EditBatch) -> None:
    """Raise ValueError unless logits are equal, up to rounding, where answers are predicted."""
    width = recorded.shape[1]
    scored = (batch.labels[:, -width + 1 :] != -100).to(recorded.device)  # [B, n - 1]
    difference = (replayed - recorded).float()[:, :-1][scored]
    largest = recorded.float()[:, :-1][scored].abs().max()
    if not difference.abs().max() <= _TOLERANCE.get(recorded.dtype, 0.0) * largest:
        raise ValueError(
            f"replayed logits differ by {float(difference.abs().max()):.2g} from the full "
            f"forward's, of size {float(largest):.2g}"
        )
