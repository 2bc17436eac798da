"""Hidden states of texts that a model generates itself: irrelevant states without any data (ours).

`Learner` takes the whitening statistics from them, closes the gates on them (R_loc), and preserves
their displacements in settling.

Edits that are learned in a chat template act behind its last tokens, where the states of all
prompts are alike but for a small part, and are like none of plain text. So in a template the model
writes users' messages and the beginnings of its own answers, and the statistics are those of the
positions that an edit acts on: the last token of a prompt, and the answer's.

Shapes: N texts, T tokens, D hidden size.
"""

from collections.abc import Hashable, Sequence
from inspect import signature
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from baft_easyedit.method.whitening import Whitening
from baft_easyedit.model.inspect import (
    cache_name,
    decoder_layers,
    input_device,
    owner_of,
    text_config,
)
from baft_easyedit.model.prompt_format import Frame
from baft_easyedit.training.recordings import is_close, model_version, tolerance_of, watching

NUM_TEXTS = 40
"""Plain texts, of an edit outside of a chat template."""
LENGTH = 64
"""Of a plain text, in tokens, the first one included."""
NUM_PROMPTS = 64
"""Prompts in each frame, of an edit in a chat template."""
NUM_BESIDE = 8
"""Plain texts beside those prompts. An edit stays closed outside of its template."""
MESSAGE_LENGTH = 16
"""Of a user's message, in tokens."""
ANSWER_LENGTH = 3
"""Of the beginning of its answer, in tokens."""
_LOOKED_AT = 7
"""Positions whose states are computed again to check that the model has not changed."""
_AT_ONCE = 8
"""Texts in one forward."""
_MOST_FORMS = 2
"""Forms of texts that are known at once, of each model: plain ones, and those in a template."""
_NAME = "_baft_own_states"
"""Attribute of the decoder stack, which a model and its wrappers (PEFT) have in common."""


class _Texts(NamedTuple):
    """Texts of equal length, and which of their states count."""

    ids: Tensor
    """[N, T]."""
    first: int
    """The states from this position on count. A text's first token has states like no others."""

    def beginning(self) -> "_Texts":
        """Return some positions of one text."""
        return _Texts(self.ids[:1, : self.first + _LOOKED_AT], self.first)


class OwnStates:
    """Hidden states of a model's own texts by layer; computed again when the model changes."""

    def __init__(self) -> None:
        self._version: Hashable = None
        self._known: dict[tuple[Frame, ...], _Known] = {}

    def __reduce__(self) -> Any:
        return OwnStates, ()

    def of(
        self, model: nn.Module, layers: Sequence[int], frames: tuple[Frame, ...] = ()
    ) -> dict[int, Tensor]:
        """Return the states at the outputs of some layers, [M, D], fp32.

        Args:
            model: The model, without an edit.
            layers: Indices of the layers.
            frames: What a chat template puts around prompts; empty for plain texts.
        """
        return self._current(model, frames).states(model, layers)

    def whitenings(
        self, model: nn.Module, layers: Sequence[int], frames: tuple[Frame, ...] = ()
    ) -> dict[int, Whitening]:
        """Return the whitening of some layers by the texts in one form; it is measured once."""
        return self._current(model, frames).whitenings(model, layers)

    def _current(self, model: nn.Module, frames: tuple[Frame, ...]) -> "_Known":
        """Return what is known of the texts in one form; nothing, if the model has changed."""
        version = model_version(model)
        if version != self._version:
            self._version, self._known = version, {}
        known = self._known.pop(frames, None)
        if known is None or not known.is_valid(model):
            known = _Known(model, frames)
        for oldest in [*self._known][: 1 - _MOST_FORMS]:
            del self._known[oldest]
        self._known[frames] = known
        return known


class _Known:
    """A model's own texts in one form, their states, and the whitening by them."""

    def __init__(self, model: nn.Module, frames: Sequence[Frame]) -> None:
        plain = _Texts(own_texts(model, NUM_BESIDE if frames else NUM_TEXTS), 1)
        prompts = [own_prompts(model, frame) for frame in frames]
        templated = [_Texts(ids, ids.shape[1] - ANSWER_LENGTH - 1) for ids in prompts]
        self._texts = [*templated, plain]
        measured = templated or [plain]
        self._num_measured = sum(texts.ids[:, texts.first :].numel() for texts in measured)
        self._states: dict[int, Tensor] = {}
        self._whitenings: dict[int, Whitening] = {}

    def states(self, model: nn.Module, layers: Sequence[int]) -> dict[int, Tensor]:
        """Return the states of all texts, [M, D]."""
        if not self._states.keys() >= set(layers):
            parts = [_states(model, layers, texts) for texts in self._texts]
            self._states |= {layer: torch.cat([one[layer] for one in parts]) for layer in layers}
        return {layer: self._states[layer] for layer in layers}

    def whitenings(self, model: nn.Module, layers: Sequence[int]) -> dict[int, Whitening]:
        """Return the whitening by the states of the texts in this form, not of those beside."""
        for layer, states in self.states(model, layers).items():
            if layer not in self._whitenings:
                new = Whitening(states.shape[1]).to(states.device)
                new.measure(states[: self._num_measured])
                self._whitenings[layer] = new
        return {layer: self._whitenings[layer] for layer in layers}

    def is_valid(self, model: nn.Module) -> bool:
        """Tell whether the beginning of a text still gives the known states, up to rounding.

        `model_version` does not see all changes of what a model computes.
        """
        again = _states(model, list(self._states), self._texts[0].beginning())
        tolerance = tolerance_of(next(model.parameters()))
        return all(is_close(h, self._states[i][: len(h)], tolerance) for i, h in again.items())


def own_states(model: nn.Module) -> OwnStates:
    """Return the model's `OwnStates`, which live as long as the model."""
    return cast(OwnStates, vars(decoder_layers(model)).setdefault(_NAME, OwnStates()))


@torch.no_grad()
def own_texts(model: nn.Module, count: int = NUM_TEXTS) -> Tensor:
    """Sample plain texts from a model, [count, LENGTH]; the same ones each time."""
    start = torch.full((count, 1), _first_token(text_config(model)))
    return _Writer(model).continued(start, LENGTH - 1)


@torch.no_grad()
def own_prompts(model: nn.Module, frame: Frame) -> Tensor:
    """Sample users' messages in a chat template, and the beginnings of their answers, [N, T].

    All are equally long, so that none needs padding; a message may be cut short, or be followed by
    more of the conversation.
    """
    first = frame[0] or (_first_token(text_config(model)),)
    before, behind = (
        torch.tensor(ids, dtype=torch.long).expand(NUM_PROMPTS, -1) for ids in (first, frame[1])
    )
    writer = _Writer(model)
    asked = writer.continued(before, MESSAGE_LENGTH)
    return writer.continued(torch.cat([asked, behind], 1), ANSWER_LENGTH)


def own_length(frame: Frame) -> int:
    """Return the length T of prompts in a frame, in tokens."""
    before, behind = frame
    return max(1, len(before)) + MESSAGE_LENGTH + len(behind) + ANSWER_LENGTH


class _Writer:
    """Samples the next tokens of texts. A model without a key-value cache reads all each time."""

    def __init__(self, model: nn.Module) -> None:
        self._model, self._num_read = model, 0
        self._cache: Any = None
        self._options = _only_last(model)
        self._generator = torch.Generator().manual_seed(0)

    def continued(self, texts: Tensor, count: int) -> Tensor:
        """Append tokens to texts [N, T], which begin as those of the last call did."""
        for _ in range(count):
            chances = self._next(texts).float().nan_to_num().softmax(-1).cpu()
            new = torch.multinomial(chances, 1, generator=self._generator)
            texts = torch.cat([texts, new], 1)
        return texts

    def _next(self, texts: Tensor) -> Tensor:
        """Return the logits after the last token, [N, V]."""
        name, unread = cache_name(self._model), texts
        given = dict(self._options)
        if self._cache is not None:
            unread, given[name] = texts[:, self._num_read :], self._cache
        device = input_device(self._model)
        output = self._model(input_ids=unread.to(device), use_cache=True, **given)
        self._cache, self._num_read = getattr(output, name, None), texts.shape[1]
        logits: Tensor = output.logits[:, -1]
        return logits


def _only_last(model: nn.Module) -> dict[str, Any]:
    """Return the argument that spares the logits of all positions but the last, if there is one."""
    name = "logits_to_keep"
    return {name: 1} if name in signature(model.forward).parameters else {}


def _first_token(config: Any) -> int:
    """Return the token that begins a model's texts: BOS, else EOS, else 0."""
    for name in ("bos_token_id", "eos_token_id"):
        token = getattr(config, name, None)
        if isinstance(token, list):
            token = next(iter(token), None)
        if token is not None:
            return int(token)
    return 0


@torch.no_grad()
def _states(model: nn.Module, layers: Sequence[int], texts: _Texts) -> dict[int, Tensor]:
    """Return the states at the outputs of layers, [M, D], fp32."""
    stack = decoder_layers(model)
    decoder = owner_of(model, stack)  # without the logits of all tokens
    with watching([stack[layer] for layer in layers]) as seen:
        for part in torch.split(texts.ids, _AT_ONCE):
            decoder(input_ids=part.to(input_device(model)), use_cache=False)
    return {
        layer: torch.cat(
            [_hidden(output)[:, texts.first :].flatten(0, 1).float() for output in outputs]
        )
        for layer, outputs in zip(layers, seen, strict=True)
    }


def _hidden(output: Any) -> Tensor:
    """Return the hidden states in a layer's output; older transformers return tuples."""
    return cast(Tensor, output[0] if isinstance(output, tuple) else output)
