"""A store of what training may use again, within limits. Needs nothing."""

import sys
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from typing import Any, Generic, Protocol, TypeVar


class _Sized(Protocol):
    @property
    def num_bytes(self) -> int:
        """Memory that the value takes."""
        ...


Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value", bound=_Sized)


class Recent(Generic[Key, Value]):
    """The values used last; beyond a limit, the least recently used ones are dropped.

    A copy or pickle is empty: another model makes its own values.

    Args:
        most_bytes: Limit of the memory of all values.
        most: Limit of their number.
    """

    def __init__(self, most_bytes: int = 2**28, most: int = sys.maxsize) -> None:
        self.num_bytes = 0
        """Memory of all values."""
        self._limits = most_bytes, most
        self._values: OrderedDict[Key, Value] = OrderedDict()
        self._made_with: Hashable = None

    def __len__(self) -> int:
        return len(self._values)

    def __iter__(self) -> Iterator[Key]:
        return iter(self._values)

    def __contains__(self, key: object) -> bool:
        return key in self._values

    def __reduce__(self) -> Any:
        return type(self), ()

    def make_valid_for(self, version: Hashable) -> None:
        """Forget all values that another version (of the model, say) made."""
        if version != self._made_with:
            self.clear()
            self._made_with = version

    def clear(self) -> None:
        """Forget all values."""
        self._values.clear()
        self.num_bytes = 0

    def get(self, key: Key) -> Value | None:
        """Return the value of a key; None if there is none, or no longer."""
        if key in self._values:
            self._values.move_to_end(key)
        return self._values.get(key)

    def put(self, key: Key, value: Value) -> None:
        """Keep a value; the least recently used ones make room for it."""
        self._values[key] = value
        self.num_bytes += value.num_bytes
        most_bytes, most = self._limits
        while self.num_bytes > most_bytes or len(self) > most:
            self.num_bytes -= self._values.popitem(last=False)[1].num_bytes
