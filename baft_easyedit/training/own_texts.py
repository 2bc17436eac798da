"""Hidden states of texts that a model generates itself: irrelevant states without any data (ours).

`Learner` takes the whitening statistics from them, closes the gates on them (R_loc), and preserves
their displacements in settling. Shapes: N texts, T tokens, D hidden size.
"""

from collections.abc import Hashable, Sequence
from typing import Any, cast

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
from baft_easyedit.training.recordings import is_close, model_version, tolerance_of, watching

NUM_TEXTS = 40
LENGTH = 64
"""In tokens, the first one included."""
_LOOKED_AT = 8
"""Tokens whose states are computed again to check that the model has not changed."""
_AT_ONCE = 8
"""Texts in one forward."""
_NAME = "_baft_own_states"
"""Attribute of the decoder stack, which a model and its wrappers (PEFT) have in common."""


class OwnStates:
    """Hidden states of a model's own texts by layer; computed again when the model changes."""

    def __init__(self) -> None:
        self._version: Hashable = None
        self._texts = torch.zeros(0, LENGTH, dtype=torch.long)
        self._states: dict[int, Tensor] = {}
        self._whitenings: dict[int, Whitening] = {}

    def __reduce__(self) -> Any:
        return OwnStates, ()

    def of(self, model: nn.Module, layers: Sequence[int]) -> dict[int, Tensor]:
        """Return the states at the outputs of some layers, [N (T - 1), D], fp32.

        The first token of each text is left out, because its states are like no others.

        Args:
            model: The model, without an edit.
            layers: Indices of the layers.
        """
        version = model_version(model)
        if version != self._version or not self._are_as_they_were(model):
            self._version, self._texts = version, own_texts(model)
            self._states, self._whitenings = {}, {}
        if not self._states.keys() >= set(layers):
            self._states |= _states(model, layers, self._texts)
        return {layer: self._states[layer] for layer in layers}

    def whitenings(self, model: nn.Module, layers: Sequence[int]) -> dict[int, Whitening]:
        """Return the whitening of some layers by these states, which is measured once."""
        for layer, states in self.of(model, layers).items():
            if layer not in self._whitenings:
                new = Whitening(states.shape[1]).to(states.device)
                new.measure(states)
                self._whitenings[layer] = new
        return {layer: self._whitenings[layer] for layer in layers}

    def _are_as_they_were(self, model: nn.Module) -> bool:
        """Tell whether the beginning of a text still gives the known states, up to rounding.

        `model_version` does not see all changes of what a model computes.
        """
        again = _states(model, list(self._states), self._texts[:1, :_LOOKED_AT])
        tolerance = tolerance_of(next(model.parameters()))
        return all(is_close(h, self._states[i][: len(h)], tolerance) for i, h in again.items())


def own_states(model: nn.Module) -> OwnStates:
    """Return the model's `OwnStates`, which live as long as the model."""
    return cast(OwnStates, vars(decoder_layers(model)).setdefault(_NAME, OwnStates()))


@torch.no_grad()
def own_texts(model: nn.Module) -> Tensor:
    """Sample texts from a model, [N, T]; the same ones each time.

    A model without a key-value cache reads the whole text for each new token.
    """
    generator = torch.Generator().manual_seed(0)
    written, cache = torch.full((NUM_TEXTS, 1), _first_token(text_config(model))), None
    for _ in range(LENGTH - 1):
        new = written if cache is None else written[:, -1:]
        logits, cache = _next(model, new.to(input_device(model)), cache)
        chances = logits.float().nan_to_num().softmax(-1).cpu()
        written = torch.cat([written, torch.multinomial(chances, 1, generator=generator)], 1)
    return written


def _first_token(config: Any) -> int:
    """Return the token that begins a model's texts: BOS, else EOS, else 0."""
    for name in ("bos_token_id", "eos_token_id"):
        token = getattr(config, name, None)
        if isinstance(token, list):
            token = next(iter(token), None)
        if token is not None:
            return int(token)
    return 0


def _next(model: nn.Module, ids: Tensor, cache: Any) -> tuple[Tensor, Any]:
    """Return the logits after the last token of `ids`, [N, V], and the cache if there is one."""
    name = cache_name(model)
    given = {} if cache is None else {name: cache}
    output = model(input_ids=ids, use_cache=True, **given)
    return output.logits[:, -1], getattr(output, name, None)


@torch.no_grad()
def _states(model: nn.Module, layers: Sequence[int], texts: Tensor) -> dict[int, Tensor]:
    """Return the states at the outputs of layers, [N (T - 1), D], fp32."""
    stack = decoder_layers(model)
    decoder = owner_of(model, stack)  # without the logits of all tokens
    with watching([stack[layer] for layer in layers]) as seen:
        for part in torch.split(texts, _AT_ONCE):
            decoder(input_ids=part.to(input_device(model)), use_cache=False)
    return {
        layer: torch.cat([_hidden(output)[:, 1:].flatten(0, 1).float() for output in outputs])
        for layer, outputs in zip(layers, seen, strict=True)
    }


def _hidden(output: Any) -> Tensor:
    """Return the hidden states in a layer's output; older transformers return tuples."""
    return cast(Tensor, output[0] if isinstance(output, tuple) else output)
