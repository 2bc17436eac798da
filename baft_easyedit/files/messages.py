"""Put values into messages, cut to a readable length whatever the value is."""

import reprlib

MAX_MESSAGE = 2000
"""Most characters of a message."""
_MAX_VALUE = 200
"""Most characters of a value in a message."""


class _Shortened(reprlib.Repr):
    """Shows the first items of containers, and the two ends of long texts and numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = self.maxlong = _MAX_VALUE

    def repr_int(self, x: int, _level: int) -> str:
        """Show a number; Python itself refuses to show one of more than 4,300 digits."""
        return repr(x) if x.bit_length() < 1000 else f"an integer of {x.bit_length()} bits"


def short(value: object) -> str:
    """Return the `repr` of any value, without the middle of a long one. It never fails."""
    return cut(_Shortened().repr(value), _MAX_VALUE)


def cut(text: object, most: int = MAX_MESSAGE) -> str:
    """Return a text, without its middle if it has more than `most` characters."""
    whole = str(text)
    half = (most - 5) // 2
    return whole if len(whole) <= most else f"{whole[:half]} ... {whole[-half:]}"


def printable(text: str) -> str:
    """Return a text with control characters escaped, as a terminal would obey them."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
