"""Repeat a model's forward in every training step, and compute only what an edit can change.

Why: a step on a short edit costs a whole forward of the model, and most of that forward is the same
in every step. Two facts make it so. The edit acts on the outputs of layers l1 and above, so layers
0..l1 return the same in every step. And attention is causal: tokens before the first edited one
(column s) never see the edit, so in every layer their states stay the same.

For a prompt of five tokens, of which the last is edited, and an answer of two (s = 4)::

    column      0    1    2    3    4    5    6
    token      The capi- -tal  of  Peru  Os- -lo
    layer 3     k v  k v  k v  k v   X    X    X    X: computed in every step
    layer 2     k v  k v  k v  k v   X    X    X    k v: keys and values, recorded once
    layer 1=l1   .    .    .    .    r    r    r    r: the layer's output, recorded once
    layer 0      .    .    .    .    .    .    .    .: not computed and not needed

`PrefixCache` records r, k and v once for each text. Each step is then the model's own forward on
columns >= s: layers 0..l1 are stubs that return r, the edit's hooks act on r as on a layer's
output, and the frozen keys and values stand for the columns before s. The computed columns of all
texts share few rows of the batch (see `layout`). `full_forward` computes everything, where a model
cannot use the cache. Both compute logits only where an answer token is predicted.

Shapes: B bins, W columns, S columns of the past, N heads, H head size, A answer tokens, V
vocabulary, D hidden size, R rows.
"""

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers import DynamicCache

from baft_easyedit.model.hooks import ModelEdit
from baft_easyedit.model.inspect import (
    cache_name,
    decoder_layers,
    input_device,
    owner_of,
    text_config,
)
from baft_easyedit.model.positions import first_edited
from baft_easyedit.training.caches import FrozenPrefix, Recorder
from baft_easyedit.training.forward import CannotCacheError, Contents, Forward
from baft_easyedit.training.layout import Layout, Piece, lay_out, rounded
from baft_easyedit.training.observing import tolerance_of, watching
from baft_easyedit.training.requests import TextRow

logger = logging.getLogger(__name__)

_FULL, _SLIDING = "full_attention", "sliding_attention"
"""Types of layers whose masks are made here."""

Edits = Sequence[Sequence[TextRow]]
"""The rows of each independent edit."""


class Recording(NamedTuple):
    """The states of one text that no edit can change; n computed columns, s columns before them."""

    hidden: Tensor
    """Output of layer l1 in the computed columns, before the edit, [n, D]."""
    past: dict[int, tuple[Tensor, Tensor]]
    """Keys and values of the columns before them, by layer above l1, [N, s, H] each."""


def prepared(
    model: nn.Module, edit: ModelEdit, edits: Edits, engine: str, rounds: bool = False
) -> tuple[Forward, str | None]:
    """Prepare the forward of training: on the prefix cache, or in full.

    Args:
        model: A model in eval mode.
        edit: The edit that is attached to it.
        edits: The rows of each edit, equally many for each.
        engine: One of `hparams.ENGINES`. With `auto`, a model that cannot use the cache gets the
            full forward, and a warning is logged.
        rounds: Whether the layout is padded to one of few sizes, so that later edits can replay the
            steps.

    Returns:
        The forward; and why the model cannot use the cache, None if it can or was not asked to.

    Raises:
        ValueError: If the engine is `cached`, and the model cannot use the cache.
    """
    if engine == "full":
        return full_forward(model, edit, edits), None
    try:
        return PrefixCache(model, edit, rounds).prepare(edits), None
    except CannotCacheError as error:
        note = f"{type(model).__name__} cannot use a cached prefix ({error})"
        if engine == "cached":
            raise ValueError(
                f"engine must be auto or full for this model: {note}; got 'cached'"
            ) from error
    logger.warning("full forward: %s", note)
    return full_forward(model, edit, edits), note


def full_forward(
    model: nn.Module, edit: ModelEdit, edits: Edits, cache: DynamicCache | None = None
) -> Forward:
    """Prepare a forward on all columns: each bin holds one row, padded on the right.

    Args:
        model: A model.
        edit: The edit that it carries, if any.
        edits: The rows of each edit, equally many for each.
        cache: A cache that the forward fills.
    """
    pieces = _pieces(edits, lambda _row: 0)
    layout = lay_out(pieces, edit.num_prompt_positions, None, input_device(model))
    inputs = _inputs(model, layout)
    inputs["attention_mask"] = (layout.row_of >= 0).long()
    inputs["use_cache"] = cache is not None
    if cache is not None:
        inputs[cache_name(model)] = cache
    return Forward(model, edit, Contents(layout, layout.positions, inputs))


def _pieces(edits: Edits, start_of: Callable[[TextRow], int]) -> list[list[Piece]]:
    """Pair each edit's rows with their first computed column."""
    return [[Piece(row, start_of(row)) for row in rows] for rows in edits]


def _inputs(model: nn.Module, layout: Layout) -> dict[str, Any]:
    """Return the arguments of a forward that give its tokens and their positions."""
    inputs: dict[str, Any] = {"input_ids": layout.input_ids}
    if _takes(model, "position_ids"):
        inputs["position_ids"] = layout.position_ids
    return inputs


def _takes(model: nn.Module, argument: str) -> bool:
    """Tell whether a model's forward takes an argument, or passes it on as PEFT's does."""
    parameters = inspect.signature(model.forward).parameters
    if argument in parameters:
        return True
    hands_on = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    decoder = owner_of(model, decoder_layers(model))
    return hands_on and argument in inspect.signature(decoder.forward).parameters


class PrefixCache:
    """Prepares forwards that compute only what the edit can change (see the module's text).

    Args:
        model: A model in eval mode.
        edit: The edit that is attached to it.
        rounds: See `prepared`.
    """

    def __init__(
        self,
        model: nn.Module,
        edit: ModelEdit,
        rounds: bool = False,
    ) -> None:
        self._model = model
        self._edit = edit
        self._rounds = rounds
        self._first_layer = min(edit.layers)
        self._stubs = list(decoder_layers(model)[: self._first_layer + 1])
        self._layer_extras: tuple[Any, ...] | None = None
        """The values that layer l1 returned after its hidden states, without tensors; None if the
        layer returned a bare tensor."""

    def prepare(self, edits: Edits) -> Forward:
        """Record the rows of each edit, and lay them out.

        The recordings are checked first: on them, the unedited model has to give the logits of the
        forward that recorded them.

        Raises:
            CannotCacheError: If the check fails, the model cannot use a cache of a class that it
                does not know, or its attention takes no mask for each pair of tokens.
        """
        _check_takes_masks(text_config(self._model))
        rows = [*dict.fromkeys(row for rows in edits for row in rows)]
        with self._edit.disabled():
            made = [self._record(row) for row in rows]
            known = {row: recording for row, (recording, _) in zip(rows, made, strict=True)}
            with torch.no_grad():
                cached = self._cached(_pieces([rows], self._start), known)()
        logits = torch.cat([logits for _, logits in made])
        _check_equal(cached[: len(logits)], logits)
        return self._cached(_pieces(edits, self._start), known)

    def _start(self, row: TextRow) -> int:
        """Return the first computed column of a row, s."""
        return first_edited(row.prompt_length, self._edit.num_prompt_positions)

    @torch.no_grad()
    def _record(self, row: TextRow) -> tuple[Recording, Tensor]:
        """Run the model once on a text; return what no edit can change, and the logits, [A, V].

        The text runs alone, because other texts in the batch change the rounding: an edit that is
        learned again from a journal meets other texts, and must still come out bit for bit.
        """
        recorder = Recorder(self._first_layer + 1)
        full = full_forward(self._model, self._edit, [[row]], recorder)
        with watching(self._stubs[-1:]) as (seen,):
            logits = full()
        is_tuple = bool(seen) and isinstance(seen[0], tuple)
        hidden: Any = seen[0][0] if is_tuple else seen[0] if seen else None
        layout, start = full.layout, self._start(row)
        _check_belong_to_text(layout, hidden, recorder.seen)
        # Tensors among them (attentions, say) are of this text only.
        extras = tuple(tree_map_only(Tensor, lambda _: None, seen[0][1:])) if is_tuple else None
        self._layer_extras = extras
        past = {
            i: (keys[0, :, :start].clone(), values[0, :, :start].clone())
            for i, (keys, values) in recorder.seen.items()
        }
        return Recording(hidden[0, start : len(row.ids)].clone(), past), logits

    def _cached(
        self,
        pieces: Sequence[Sequence[Piece]],
        recordings: Mapping[TextRow, Recording],
    ) -> Forward:
        """Build the forward of a layout from the recordings of its rows."""
        config = text_config(self._model)
        device, num_positions = input_device(self._model), self._edit.num_prompt_positions
        layout = lay_out(pieces, num_positions, config.hidden_size, device)
        if self._rounds:
            layout = rounded(layout)
        in_order = [recordings[layout.rows[i]] for load in layout.bins for i in load]
        row_of = layout.row_of
        hidden = _scatter([recording.hidden for recording in in_order], row_of, _places(row_of))
        inputs = _inputs(self._model, layout)
        inputs["attention_mask"] = _masks(config, layout, hidden.dtype)
        inputs["use_cache"] = True
        inputs[cache_name(self._model)] = FrozenPrefix(
            _joined_past(in_order, layout.past_row_of), layout.past_row_of.shape[1]
        )
        extras = self._layer_extras
        output = hidden if extras is None else (hidden, *extras)
        contents = Contents(layout, layout.positions, inputs, output)
        return Forward(self._model, self._edit, contents, self._stubs)


def _check_takes_masks(config: Any) -> None:
    """Raise CannotCacheError unless a model's attention takes a known mask for each pair of tokens.

    Other kernels would read beyond their memory on a GPU, after which the process cannot use it.
    """
    attention = getattr(config, "_attn_implementation", None)
    if attention not in (None, "eager", "sdpa"):
        raise CannotCacheError(
            f"its attention, {attention}, takes no mask for each pair of tokens: load it with "
            "attn_implementation='sdpa' for faster edits"
        )
    others = {*(getattr(config, "layer_types", None) or ())} - {_FULL, _SLIDING}
    if others:
        raise CannotCacheError(f"its layers are of types whose masks are not known: {min(others)}")


def _check_belong_to_text(
    layout: Layout, hidden: Any, states: Mapping[int, tuple[Tensor, Tensor]]
) -> None:
    """Raise CannotCacheError unless l1 returned [R, W, D], and layers above stored [R, N, W, H]."""
    shape = tuple(layout.input_ids.shape)
    if not isinstance(hidden, Tensor) or hidden.dim() != 3 or hidden.shape[:2] != shape:
        raise CannotCacheError("its first edited layer gives no hidden state for each token")
    for layer, pair in states.items():
        if any(t.dim() != 4 or (t.shape[0], t.shape[2]) != shape for t in pair):
            raise CannotCacheError(f"layer {layer} stores no keys and values for each token")


def _scatter(values: Sequence[Tensor], row_of: Tensor, places: Tensor) -> Tensor:
    """Put the values of rows, [n, ...] each in order, to their `_places` in [B, W, ...]."""
    joined = torch.cat(list(values))
    padded = joined.new_zeros(row_of.numel(), *joined.shape[1:])
    padded[places.to(joined.device)] = joined
    return padded.view(*row_of.shape, *joined.shape[1:])


def _places(row_of: Tensor) -> Tensor:
    """Return the flat indices into [B, W] of all columns but padding; this waits for the device."""
    return (row_of >= 0).flatten().nonzero()[:, 0]


def _joined_past(
    recordings: Sequence[Recording], past_row_of: Tensor
) -> dict[int, tuple[Tensor, Tensor]]:
    """Join the recorded keys and values of each layer, [B, N, S, H]."""
    places = _places(past_row_of)

    def joined(layer: int, which: int) -> Tensor:
        states = [recording.past[layer][which].transpose(0, 1) for recording in recordings]
        return _scatter(states, past_row_of, places).transpose(1, 2).contiguous()

    return {layer: (joined(layer, 0), joined(layer, 1)) for layer in recordings[0].past}


def _masks(config: Any, layout: Layout, dtype: torch.dtype) -> Any:
    """Return additive attention masks, [B, 1, W, S + W]; a dict where layers differ in type."""
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None) or ()

    def additive(limit: int | None) -> Tensor:
        seen = layout.attention(limit)[:, None]
        mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
        return mask.masked_fill(~seen, torch.finfo(dtype).min)

    if _SLIDING in types:
        return {_FULL: additive(None), _SLIDING: additive(window)}
    return additive(None if types else window)


def _check_equal(cached: Tensor, recorded: Tensor) -> None:
    """Raise CannotCacheError unless two tensors of logits [A, V] are equal up to rounding."""
    if not len(recorded):
        return
    difference = float((cached - recorded).float().abs().max())
    largest = float(recorded.float().abs().max())
    if not difference <= tolerance_of(recorded) * largest:
        raise CannotCacheError(
            f"logits on a cached prefix differ by {difference:.2g} from those of the full forward, "
            f"of size {largest:.2g}"
        )
