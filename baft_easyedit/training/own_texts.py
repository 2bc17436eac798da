"""Statistics of texts that a model generates itself: whitening without any data (ours).

Edits that are learned in a chat template act behind its last tokens, where the states of all
prompts are alike but for a small part, and are like none of plain text. So in a template the model
writes users' messages and the beginnings of its own answers, and the statistics are those of the
positions that an edit acts on: the last token of a prompt, and the answer's.

Shapes: N texts, T tokens, K last tokens, D hidden size, V vocabulary.
"""

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from baft_easyedit.method.whitening import Whitening
from baft_easyedit.model.inspect import (
    cache_name,
    decoder_layers,
    hidden_of,
    input_device,
    last_logits,
    max_context,
    part_behind_cache,
    repeated_cache,
    text_config,
)
from baft_easyedit.model.prompt_format import Frame
from baft_easyedit.training.observing import is_close, model_version, tolerance_of, watching

NUM_TEXTS = 40
"""Plain texts, of an edit outside of a chat template."""
LENGTH = 64
"""Of a plain text, in tokens, the first one included."""
NUM_PROMPTS = 64
"""Prompts in each frame, of an edit in a chat template."""
MESSAGE_LENGTH = 16
"""Of a user's message, in tokens."""
ANSWER_LENGTH = 3
"""Of the beginning of its answer, in tokens."""
_LOOKED_AT = 7
"""Positions whose states are computed again to check that the model has not changed."""
_NAME = "_baft_own_whitenings"
"""Attribute of the decoder stack, which a model and its wrappers (PEFT) have in common."""


class OwnTexts(NamedTuple):
    """Texts of equal length, and the hidden states of their last tokens."""

    ids: Tensor
    """[N, T]."""
    states: dict[int, Tensor]
    """The states of the last K tokens at the outputs of layers, [N, K, D] each, fp32."""


def own_whitenings(
    model: nn.Module, layers: Sequence[int], frames: tuple[Frame, ...] = ()
) -> dict[int, Whitening]:
    """Return whitening by a model's own texts, at the outputs of some layers.

    The latest is kept with the model, until that changes, or other layers or frames are asked for.

    Args:
        model: The model, without an edit.
        layers: Indices of the layers.
        frames: What a chat template puts around prompts; empty for plain texts.
    """
    kept, of = vars(decoder_layers(model)), (model_version(model), tuple(layers), frames)
    known: _Known | None = kept.get(_NAME)
    if known is None or known.of != of or not known.holds(model):
        known = kept[_NAME] = _Known(model, layers, frames, of)
    return known.whitenings


class _Known:
    """The whitening by a model's own texts in one form, and states that tell if it still holds."""

    def __init__(
        self, model: nn.Module, layers: Sequence[int], frames: Sequence[Frame], of: Hashable
    ) -> None:
        self.of = of
        """The version of the model, the layers and the frames."""
        parts = [own_prompts(model, frame, layers) for frame in frames]
        parts = parts or [own_texts(model, layers)]
        self.whitenings = {i: _whitening([one.states[i] for one in parts]) for i in layers}
        first = parts[0]
        self._first = first.ids[:1]
        """The text whose beginning is read again, [1, T]."""
        self._states = {i: first.states[i][0, :_LOOKED_AT].clone() for i in layers}
        self._before = first.ids.shape[1] - first.states[layers[0]].shape[1]
        """How many of its tokens come before those whose states are known."""

    def __reduce__(self) -> Any:
        return type(None), ()  # a copy of the model measures its own

    @torch.no_grad()
    def holds(self, model: nn.Module) -> bool:
        """Tell whether the states are still those of the model.

        `model_version` does not see all changes of what a model computes, so the beginning of a
        text is read again. Its states must be the known ones up to rounding.
        """
        ids, stack = self._first[:, : self._before + _LOOKED_AT], decoder_layers(model)
        with watching([stack[layer] for layer in self._states]) as seen:
            model(input_ids=ids.to(input_device(model)), use_cache=False, **last_logits(model))
        again = [hidden_of(output)[0, self._before :] for (output,) in seen]
        tolerance = tolerance_of(next(model.parameters()))
        pairs = zip(again, self._states.values(), strict=True)
        return all(is_close(h, known, tolerance) for h, known in pairs)


def _whitening(states: Sequence[Tensor]) -> Whitening:
    """Measure the whitening of a layer by states of several kinds of texts, [N, K, D] each."""
    all_states = torch.cat([one.flatten(0, 1) for one in states])
    new = Whitening(all_states.shape[1]).to(all_states.device)
    new.measure(all_states)
    return new


def own_texts(model: nn.Module, layers: Sequence[int] = ()) -> OwnTexts:
    """Sample plain texts from a model, [NUM_TEXTS, LENGTH]; the same ones each time.

    The states are those of all tokens but the first, which has states like no others. A model
    without room for so long a text writes shorter ones.
    """
    writer = _Writer(model, layers, [_first_token(text_config(model))], NUM_TEXTS)
    length = min(LENGTH, max_context(model) or LENGTH)
    writer.write(length - 1)
    return writer.texts(length - 1)


def own_prompts(model: nn.Module, frame: Frame, layers: Sequence[int] = ()) -> OwnTexts:
    """Sample users' messages in a chat template, and the beginnings of their answers, [N, T].

    All are equally long, so that none needs padding; a message may be cut short, or be followed by
    more of the conversation. The states are those of the last token of each prompt, and of its
    answer.
    """
    before, behind = frame
    writer = _Writer(model, layers, before or [_first_token(text_config(model))], NUM_PROMPTS)
    writer.write(MESSAGE_LENGTH)
    for token in behind:
        writer.append(torch.full((NUM_PROMPTS, 1), token))
    writer.write(ANSWER_LENGTH)
    return writer.texts(1 + ANSWER_LENGTH)


def own_length(frame: Frame) -> int:
    """Return the length T of prompts in a frame, in tokens."""
    before, behind = frame
    return max(1, len(before)) + MESSAGE_LENGTH + len(behind) + ANSWER_LENGTH


class _Writer:
    """Writes texts with one beginning, token by token; a model without a cache reads all again."""

    def __init__(
        self, model: nn.Module, layers: Sequence[int], beginning: Sequence[int], count: int
    ) -> None:
        self._model, self._layers = model, layers
        self._generator = torch.Generator().manual_seed(0)
        self._states: list[list[Tensor]] = []
        """Of each token read after the beginning, by layer, [N, D]."""
        self._ids = torch.tensor([[*beginning]])
        output, _ = self._read(model, self._ids)  # one for all
        self._ids = self._ids.repeat(count, 1)
        self._chances = _chances(output).repeat(count, 1)
        self._cache = repeated_cache(getattr(output, cache_name(model), None), count)

    def write(self, count: int) -> None:
        """Sample the next tokens."""
        for _ in range(count):
            self.append(torch.multinomial(self._chances, 1, generator=self._generator))

    def append(self, tokens: Tensor) -> None:
        """Read the next token of each text, [N, 1]."""
        self._ids = torch.cat([self._ids, tokens], 1)
        name = cache_name(self._model)
        if self._cache is None:
            output, states = self._read(self._model, self._ids)
        else:
            part = part_behind_cache(self._model)
            output, states = self._read(part, tokens, **{name: self._cache})
        self._cache = getattr(output, name, None)
        self._chances = _chances(output)
        self._states.append(states)

    def texts(self, last: int) -> OwnTexts:
        """Return the texts, and the states of their `last` tokens."""
        reads = self._states[-last:]
        return OwnTexts(
            self._ids,
            {
                layer: torch.stack([states[i] for states in reads], 1)
                for i, layer in enumerate(self._layers)
            },
        )

    @torch.no_grad()
    def _read(self, model: nn.Module, ids: Tensor, **past: Any) -> tuple[Any, list[Tensor]]:
        """Run a model; return its output, and the last states at the layers' outputs, [N, D]."""
        stack, ids = decoder_layers(model), ids.to(input_device(model))
        with watching([stack[layer] for layer in self._layers]) as seen:
            output = model(input_ids=ids, use_cache=True, **past, **last_logits(model))
        return output, [hidden_of(outputs[0])[:, -1].float() for outputs in seen]


def _chances(output: Any) -> Tensor:
    """Return the probabilities of the next tokens, [N, V], on the CPU."""
    logits: Tensor = output.logits[:, -1]
    return logits.float().nan_to_num().softmax(-1).cpu()


def _first_token(config: Any) -> int:
    """Return the token that begins a model's texts: BOS, else EOS, else 0."""
    for name in ("bos_token_id", "eos_token_id"):
        token = getattr(config, name, None)
        if isinstance(token, list):
            token = next(iter(token), None)
        if token is not None:
            return int(token)
    return 0
