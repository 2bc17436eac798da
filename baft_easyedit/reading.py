"""Read JSON and YAML that others wrote; whatever is wrong with it, the error says where.

Nothing that is read is executed. Needs the standard library and pyyaml.
"""

import json
import reprlib
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

_MAX_DEPTH = 100
_MAX_YAML = 64 * 2**10
"""Most bytes of a YAML file; pyyaml is slow."""
_MAX_VALUES = 100_000
"""Most values on a level of a YAML file; its aliases can stand for more than fit into memory."""


def parse_json(text: bytes | str, where: str, allow_nan: bool = True) -> Any:
    """Read JSON.

    Args:
        text: What somebody else wrote.
        where: Its name in messages.
        allow_nan: Accept NaN and infinities, which Python writes.

    Raises:
        ValueError: If it is not JSON, or too deep.
    """
    try:
        value = json.loads(text, parse_constant=None if allow_nan else _refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} must be JSON, and is not: {error}") from None
    _check_size(value, where)
    return value


def read_yaml(file: Path, what: str) -> dict[str, Any]:
    """Read a YAML file that holds a mapping, without tags that would make objects.

    Args:
        file: The file.
        what: What it should hold, for messages.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is not such YAML, or too large.
        TypeError: If it holds no mapping with names as keys.
    """
    with open(file, "rb") as stream:
        text = stream.read(_MAX_YAML + 1)
    if len(text) > _MAX_YAML:
        raise ValueError(f"{file} must have at most {_MAX_YAML} bytes, as settings do; it has more")
    try:
        content = yaml.safe_load(text)
    except FAILURES_OF_YAML as error:
        raise ValueError(f"{file} must be plain YAML, and is not: {error}") from None
    _check_size(content, str(file), _MAX_VALUES)
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise TypeError(f"{file} must hold a mapping of {what}; got {reprlib.repr(content)}")
    return content


FAILURES_OF_YAML = (
    yaml.YAMLError,
    ValueError,
    TypeError,
    ArithmeticError,
    LookupError,
    AttributeError,
    RecursionError,
)
"""What pyyaml raises for bad input, such as AttributeError for `!!timestamp x`."""


def closest(name: str, known: Iterable[str], likeness: float = 0.6) -> str | None:
    """Return which known name a misspelt one was meant to be; None if it is like none of them.

    Args:
        name: What somebody wrote.
        known: Names that there are.
        likeness: difflib's least ratio, from 0 (anything) to 1 (the same but for capitals).
    """
    folded = {each.casefold(): each for each in known}
    found = get_close_matches(name.casefold(), folded, n=1, cutoff=likeness)
    return folded[found[0]] if found else None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return what to add to an unknown name in a message: the known one that was meant, if any."""
    found = closest(name, known)
    return "" if found is None else f" (did you mean {found!r}?)"


def taken(content: Mapping[str, Any], key: str, kind: Any, where: str) -> Any:
    """Return `content[key]`, checked.

    Args:
        content: A JSON object.
        key: Its key.
        kind: A type, or a tuple of types; a bool is no int.
        where: The name of `content` in messages.

    Raises:
        ValueError: If the key is missing, or its value of another type.
    """
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if key not in content:
        raise ValueError(f"{where} must have the key {key!r}, and has not")
    if type(content[key]) not in kinds:
        names = " or ".join("null" if k is type(None) else k.__name__ for k in kinds)
        raise ValueError(
            f"{where} must have a {names} as {key!r}; got {type(content[key]).__name__}"
        )
    return content[key]


def _refuse_constant(name: str) -> Any:
    """Refuse NaN and the infinities."""
    raise ValueError(f"{name} is no JSON number")


def _check_size(value: Any, where: str, most: float = float("inf")) -> None:
    """Raise ValueError if a value is too deep for the code after this, or too wide."""
    level = [value]
    for _ in range(_MAX_DEPTH):
        level = [
            item
            for part in level
            if isinstance(part, dict | list)
            for item in (part.values() if isinstance(part, dict) else part)
        ]
        if len(level) > most:
            raise ValueError(f"{where} must hold at most {most:,} values; it holds more")
        if not level:
            return
    raise ValueError(f"{where} must be nested at most {_MAX_DEPTH} deep; it is deeper")
