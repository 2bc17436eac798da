"""Values in messages: no message is longer than a person reads, whatever it is about."""

import reprlib

MAX_MESSAGE = 2000
"""Most characters of a message."""
_MAX_VALUE = 200
"""Most characters of a value in it."""


class _Shortened(reprlib.Repr):
    """Writes the first values of containers, and the ends of long texts and numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = self.maxlong = _MAX_VALUE

    def repr_int(self, x: int, _level: int) -> str:
        """Write a number; Python itself writes none of more than 4,300 digits."""
        return repr(x) if x.bit_length() < 1000 else f"an integer of {x.bit_length()} bits"


def short(value: object) -> str:
    """Return the `repr` of any value; of a long one, its ends. It never fails."""
    return cut(_Shortened().repr(value), _MAX_VALUE)


def cut(text: object, most: int = MAX_MESSAGE) -> str:
    """Return a text of at most `most` characters: a longer one without its middle."""
    whole = str(text)
    half = (most - 5) // 2
    return whole if len(whole) <= most else f"{whole[:half]} ... {whole[-half:]}"


def printable(text: str) -> str:
    """Return a text with nothing in it that could upset a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
