"""Which edits are learned side by side, and how many at once. Needs torch only."""

from collections.abc import Sequence

import torch

from baft_easyedit.requests import TextRow

_FIRST = 8
"""Edits learned at once before the memory that they take is known; on a CPU always."""

_MOST = 128
"""A GPU is full with so many, whatever the model."""

_SHARE = 0.8
"""Of the free memory that is used."""

_MOST_PADDING = 1.5
"""How much longer than the shortest an edit learned beside it may be."""


def alike(edits: Sequence[Sequence[TextRow]]) -> list[list[int]]:
    """Group edits, by index, that have as many rows, and not much longer ones.

    Only the former are learned side by side; and each is padded to the longest one beside it.
    """
    sizes = [sum(len(row.ids) for row in rows) for rows in edits]
    groups: list[list[int]] = []
    for i in sorted(range(len(edits)), key=lambda i: (len(edits[i]), sizes[i])):
        first = groups[-1][0] if groups else i
        is_alike = len(edits[i]) == len(edits[first]) and sizes[i] <= _MOST_PADDING * sizes[first]
        if groups and is_alike:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


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
