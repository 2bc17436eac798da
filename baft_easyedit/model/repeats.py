"""Find the forward pass that a backward pass repeats a part of, as gradient checkpointing does.

A layer is repeated without its model being called, in any thread of autograd's, and maybe after
other forward passes. So each forward pass leaves a note of its positions. Needs torch only.
"""

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef


class Repeatable(dict[StorageWeakRef, list[Tensor | None]]):
    """The positions of the forward passes that a backward pass may repeat, by a layer's input.

    A checkpointed layer is repeated on the very storage that it was called on. A storage of several
    passes with other positions, such as `inputs_embeds` for two calls, has two entries.
    """

    def remember(self, args: tuple[Any, ...], positions: Tensor | None) -> None:
        """Remember where a layer is edited on these arguments."""
        for key in _storages(args):
            known = self.setdefault(key, [positions])
            if not _equal(known[0], positions):
                known[1:] = [positions]

    def of(self, args: tuple[Any, ...]) -> list[Tensor | None]:
        """Return where a layer was edited on these arguments: one entry if that is known."""
        return [positions for key in _storages(args) for positions in self.get(key, ())]

    def forget_freed(self) -> None:
        """Forget the passes whose tensors are gone."""
        for key in [*self]:
            if key.expired():
                self.pop(key, None)

    def __reduce__(self) -> Any:
        return Repeatable, ()


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    """Tell whether two passes are edited at the same positions."""
    if one is None or other is None:
        return one is other
    return one is other or torch.equal(one, other)


def _storages(args: tuple[Any, ...]) -> list[StorageWeakRef]:
    """Return a reference to the storage of a layer's first argument, its input; none in vmap."""
    storages = []
    with suppress(NotImplementedError):
        storages = [t.untyped_storage() for t in args[:1] if isinstance(t, Tensor)]
    return [StorageWeakRef(storage) for storage in storages]  # type: ignore[no-untyped-call]
