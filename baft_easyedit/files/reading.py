"""Read JSON and YAML that others wrote; whatever is wrong with it, the error says where.

Nothing that is read is executed. Needs the standard library and pyyaml.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from baft_easyedit.files.messages import cut, short
from baft_easyedit.files.paths import read_regular

_MAX_DEPTH = 100
_MAX_YAML = 64 * 2**10
"""Most bytes of a YAML file; pyyaml is slow."""
_MAX_BITS = 14_000
"""Most bits of an integer in YAML; Python writes none of more than 4,300 digits."""
_MAX_VALUES = 100_000
"""Most values on a level of a YAML file; its aliases can stand for more than fit into memory."""


def parse_json(text: bytes | str, where: str, is_strict: bool = False) -> Any:
    """Read JSON.

    Args:
        text: What somebody else wrote.
        where: Its name in messages.
        is_strict: Refuse NaN and infinities, which Python writes, and a key that comes twice.

    Raises:
        ValueError: If it is not JSON, or too deep.
    """
    try:
        value = json.loads(text, **(_STRICT if is_strict else {}))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} must be JSON, and is not: {cut(error, 500)}") from None
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
    text = read_regular(file, _MAX_YAML)
    try:
        content = yaml.load(text, _StrictLoader)
    except FAILURES_OF_YAML as error:
        raise ValueError(f"{file} must be plain YAML, and is not: {cut(error, 500)}") from None
    _check_size(content, str(file), _MAX_VALUES)
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise TypeError(f"{file} must hold a mapping of {what}; got {short(content)}")
    return content


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key that a mapping has twice, an integer too long to be shown, and half a pair."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Read a mapping."""
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            name = (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else key
            if name in seen:
                problem = f"the key {short(key.value)} comes twice"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            seen.add(name)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Make a value."""
        value = super().construct_object(node, deep)
        if isinstance(value, str):
            value.encode()  # a lone surrogate has no bytes
        elif isinstance(value, int) and value.bit_length() > _MAX_BITS:
            problem = f"an integer of {value.bit_length()} bits is too long"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
        return value


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


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object of its keys and values."""
    content = dict(pairs)
    if len(content) < len(pairs):
        double = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {short(double)} comes twice")
    return content


_STRICT: Mapping[str, Any] = {
    "parse_constant": _refuse_constant,
    "object_pairs_hook": _without_doubles,
}


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
