"""What is computed side by side, and how much of it at once. Needs torch only."""

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

_FIRST = 8
"""Edits learned at once before the memory that they take is known; on a CPU always."""

_MOST = 128
"""A GPU is full with so many, whatever the model."""

_SHARE = 0.8
"""Of the free memory that is used."""

_MOST_PADDING = 1.5
"""How much longer than the shortest something computed beside it may be."""


def alike(sizes: Sequence[int], kinds: Sequence[Hashable] | None = None) -> list[list[int]]:
    """Group things, by index, of one kind and about one size, the smallest first.

    What is computed side by side is padded to the largest of it.

    Args:
        sizes: Of each thing, in tokens.
        kinds: Of each thing; all of one kind if None.
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
    """How many edits are learned at once.

    Args:
        given: How many the caller wants; if None, on a CUDA device as many as its memory holds.
        device: Where the model is.
    """

    def __init__(self, given: int | None, device: torch.device) -> None:
        self.value = _FIRST if given is None else given
        self._device = device
        self._is_measured = given is None and device.type == "cuda"
        self._before = 0

    def start(self) -> None:
        """Take note that edits are about to be learned."""
        if self._is_measured:
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)

    def finish(self, num_edits: int) -> None:
        """Choose anew by the memory that so many edits took; it grows by 4 at most each time."""
        if not self._is_measured:
            return
        peak = torch.cuda.max_memory_allocated(self._device) - self._before
        unused = torch.cuda.memory_reserved(self._device) - self._before
        free = torch.cuda.mem_get_info(self._device)[0] + unused
        fitting = int(_SHARE * free * num_edits / max(1, peak))
        self.value = max(1, min(fitting, 4 * num_edits, _MOST))

    def fail(self, num_edits: int) -> None:
        """Take note that so many edits are too many for the memory."""
        self.value = max(1, num_edits // 2)
        self._is_measured = False


def padded(rows: Sequence[Sequence[int]], tokenizer: Any, side: str) -> dict[str, Tensor]:
    """Return tokens as a batch.

    Args:
        rows: The tokens of each text.
        tokenizer: Its padding token is used; 0, which the mask hides as well, if it has none.
        side: Where padding goes, `left` or `right`.

    Returns:
        `input_ids` and `attention_mask`, each [B, T].
    """
    width = max(map(len, rows))
    fill = tokenizer.pad_token_id or 0
    gaps = [width - len(row) for row in rows]
    ids = [_beside(row, [fill] * gap, side) for row, gap in zip(rows, gaps, strict=True)]
    mask = [_beside([1] * len(row), [0] * gap, side) for row, gap in zip(rows, gaps, strict=True)]
    return {
        "input_ids": torch.tensor(ids, dtype=torch.long),
        "attention_mask": torch.tensor(mask, dtype=torch.long),
    }


def _beside(row: Sequence[int], padding: list[int], side: str) -> list[int]:
    """Put padding to a side of a row."""
    return [*padding, *row] if side == "left" else [*row, *padding]
