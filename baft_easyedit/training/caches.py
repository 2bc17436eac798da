"""Key-value caches of training, with the interface of transformers' caches.

`Recorder` collects a text's keys and values once; `FrozenPrefix` then gives them to every step.
Shapes: B bins, S columns of the past, N heads, H head size.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache


class FrozenPrefix(DynamicCache):
    """A key-value cache that never stores new columns, so that every step can use it again.

    Args:
        states: Keys and values by layer, [B, N, S, H]; a layer that is missing has no past.
        length: S.
    """

    def __init__(self, states: Mapping[int, tuple[Tensor, Tensor]], length: int) -> None:
        super().__init__()
        self.states = states
        self.length = length

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_args: Any, **_kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Return past and new keys and values, joined."""
        if layer_idx not in self.states:
            return key_states, value_states
        keys, values = self.states[layer_idx]
        return torch.cat([keys, key_states], -2), torch.cat([values, value_states], -2)

    @property
    def is_sliding(self) -> list[bool]:
        """False: the masks cover all columns and take care of sliding windows."""
        return [False]

    def get_seq_length(self, *_args: Any, **_kwargs: Any) -> int:
        """Return the number of past columns."""
        return self.length

    def get_query_offset(self, *_args: Any, **_kwargs: Any) -> int:
        """Return the column of the first new token."""
        return self.length

    def get_mask_sizes(self, query: Any, *_args: Any) -> tuple[int, int]:
        """Return the number of columns attended to, and the first column.

        Args:
            query: The number of new tokens, or (older transformers) their columns.
        """
        num_new = query.shape[0] if isinstance(query, Tensor) else int(query)
        return self.length + num_new, 0

    def __len__(self) -> int:
        return len(self.states)

    def __bool__(self) -> bool:
        return True  # a cache without states is still a cache


class Recorder(FrozenPrefix):
    """An empty cache that collects the keys and values which layers pass to it, in `seen`.

    Args:
        first_layer: The lowest layer that is collected.
    """

    def __init__(self, first_layer: int) -> None:
        super().__init__({}, 0)
        self.seen: dict[int, tuple[Tensor, Tensor]] = {}
        self._first_layer = first_layer

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_args: Any, **_kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Return new keys and values."""
        if layer_idx >= self._first_layer:
            self.seen[layer_idx] = (key_states, value_states)
        return key_states, value_states
