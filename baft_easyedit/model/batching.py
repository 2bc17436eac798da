"""Group texts of similar length into batches, choose batch sizes, and pad. Needs torch only."""

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

_FIRST = 8
"""Edits learned at once on a CPU, and in a GPU's first batch, whose memory is then measured."""

_MOST = 128
"""Most edits learned at once; this number keeps any GPU busy."""

_SHARE = 0.8
"""The share of the free memory that a batch may take."""

_MOST_PADDING = 1.5
"""Largest allowed ratio of the longest to the shortest item of a batch."""


def alike(sizes: Sequence[int], kinds: Sequence[Hashable] | None = None) -> list[list[int]]:
    """Group items (by index) of one kind and similar size, the smallest first.

    Items of a batch are padded to the largest, so similar sizes waste least.

    Args:
        sizes: The size of each item, in tokens.
        kinds: The kind of each item; None if all are of one kind.
    """
    by_kind: dict[Hashable, list[list[int]]] = {}
    for i in sorted(range(len(sizes)), key=lambda i: sizes[i]):
        groups = by_kind.setdefault(None if kinds is None else kinds[i], [])
        if groups and sizes[i] <= _MOST_PADDING * sizes[groups[-1][0]]:
            groups[-1].append(i)
        else:
            groups.append([i])
    return [group for groups in by_kind.values() for group in groups]


class BatchSize:
    """The number of edits learned at once, `value`.

    Args:
        given: The caller's number; None for as many as the memory of a CUDA device holds.
        device: Device of the model.
    """

    def __init__(self, given: int | None, device: torch.device) -> None:
        self.value = _FIRST if given is None else given
        self._device = device
        self._is_measured = given is None and device.type == "cuda"
        self._before = 0

    def start(self) -> None:
        """Measure the memory in use before a batch is learned."""
        if self._is_measured:
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)

    def finish(self, num_edits: int) -> None:
        """Choose the next size from the memory that a batch took; it grows at most fourfold."""
        if not self._is_measured:
            return
        peak = torch.cuda.max_memory_allocated(self._device) - self._before
        unused = torch.cuda.memory_reserved(self._device) - self._before
        free = torch.cuda.mem_get_info(self._device)[0] + unused
        fitting = int(_SHARE * free * num_edits / max(1, peak))
        self.value = max(1, min(fitting, 4 * num_edits, _MOST))

    def fail(self, num_edits: int) -> None:
        """Halve the size after a batch ran out of memory; it is not measured again."""
        self.value = max(1, num_edits // 2)
        self._is_measured = False


def padded(rows: Sequence[Sequence[int]], tokenizer: Any, side: str) -> dict[str, Tensor]:
    """Pad the tokens of several texts to a batch.

    Args:
        rows: The tokens of each text.
        tokenizer: Gives the padding token. Without one, token 0 serves, as the mask hides padding.
        side: The padded side, `left` or `right`.

    Returns:
        `input_ids` and `attention_mask`, each [B, T].
    """
    width = max(map(len, rows))

    def beside(row: Sequence[int], fill: int) -> list[int]:
        padding = [fill] * (width - len(row))
        return [*padding, *row] if side == "left" else [*row, *padding]

    ids = [beside(row, tokenizer.pad_token_id or 0) for row in rows]
    mask = [beside([1] * len(row), 0) for row in rows]
    return {
        "input_ids": torch.tensor(ids, dtype=torch.long),
        "attention_mask": torch.tensor(mask, dtype=torch.long),
    }
