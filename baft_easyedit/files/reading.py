"""Read JSON and YAML that others wrote; every error names its place and what is wrong.

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


def parse_json(text: bytes | str, where: str, is_strict: bool = False) -> Any:
    """Read JSON, which messages call `where`.

    Duplicate keys are refused, and strictly NaN and infinities, which Python's `json` accepts.

    Raises:
        ValueError: If the text is not JSON, or is nested too deeply.
    """
    try:
        constants: Any = {"parse_constant": _refuse_constant} if is_strict else {}
        value = json.loads(text, object_pairs_hook=_without_doubles, **constants)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} must be JSON, and is not: {cut(error, 500)}") from None
    _check_depth(value, where)
    return value


def parse_object(text: bytes | str, where: str, is_strict: bool = True) -> dict[str, Any]:
    """Read a JSON object; see `parse_json`.

    Raises:
        ValueError: If the text is not JSON, nested too deeply, or not an object.
    """
    value = parse_json(text, where, is_strict)
    if not isinstance(value, dict):
        raise ValueError(f"{where} must be a JSON object; got {type(value).__name__}")
    return value


def read_yaml(file: Path, what: str) -> dict[str, Any]:
    """Read a YAML file that holds a mapping; aliases, and tags that make objects, are refused.

    Messages call the content a mapping of `what`, such as `settings`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the content is not such YAML, or too large.
        TypeError: If the content is not a mapping with strings as keys.
    """
    text = read_regular(file, _MAX_YAML)
    try:
        content = yaml.load(text, _StrictLoader)
        json.dumps(content, default=str, ensure_ascii=False).encode()  # fails as later code would
    except _FAILURES as error:
        raise ValueError(f"{file} must be plain YAML, and is not: {cut(error, 500)}") from None
    _check_depth(content, str(file))
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise TypeError(f"{file} must hold a mapping of {what}; got {short(content)}")
    return content


class _StrictLoader(yaml.SafeLoader):
    """Refuses duplicate keys, and aliases, by which a small file can stand for a huge value."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Compose a value, unless it is an alias; pyyaml calls this."""
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has an alias: write what that stands for in its place")
        return super().compose_node(parent, index)

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Compose a mapping, unless a key comes twice; pyyaml calls this."""
        node = super().compose_mapping_node(anchor)
        names = [(key.tag, key.value) for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        double = _double(names)
        if double is not None:
            raise yaml.YAMLError(f"the key {short(double[1])} comes twice")
        return node


_FAILURES = (yaml.YAMLError, ValueError, TypeError, ArithmeticError, LookupError, AttributeError,
             RecursionError)  # fmt: skip
"""What pyyaml raises for bad input, such as AttributeError for `!!timestamp x`."""


def closest(name: str, known: Iterable[str], likeness: float = 0.6) -> str | None:
    """Return the known name most like a misspelt one; None if no known name is like it.

    `likeness` is difflib's least ratio, from 0 (anything) to 1 (the same but for capitals).
    """
    folded = {each.casefold(): each for each in known}
    found = get_close_matches(name.casefold(), folded, n=1, cutoff=likeness)
    return folded[found[0]] if found else None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return " (did you mean ...?)" for a message about an unknown name; "" if none is like it."""
    found = closest(name, known)
    return "" if found is None else f" (did you mean {found!r}?)"


def taken(content: Mapping[str, Any], key: str, kind: Any, where: str) -> Any:
    """Return `content[key]` of a JSON object, which messages call `where`.

    Its type must be `kind`, or one of a tuple; a bool does not count as an int.

    Raises:
        ValueError: If the key is missing, or its value has another type.
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
    """Raise ValueError for NaN and the infinities; `json` calls this in strict reading."""
    raise ValueError(f"{name} is no JSON number")


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object of its keys and values; raise ValueError for a duplicate key."""
    double = _double(name for name, _ in pairs)
    if double is not None:
        raise ValueError(f"the key {short(double)} comes twice")
    return dict(pairs)


def _double(names: Iterable[Any]) -> Any:
    """Return the first name that comes twice; None if none does."""
    return next((name for name, count in Counter(names).items() if count > 1), None)


def _check_depth(value: Any, where: str) -> None:
    """Raise ValueError if a value is nested so deeply that recursive code might fail on it."""
    level = [value]
    for _ in range(_MAX_DEPTH + 1):
        level = [part for part in level if isinstance(part, dict | list)]
        if not level:
            return
        parts = (part.values() if isinstance(part, dict) else part for part in level)
        level = [item for values in parts for item in values]
    raise ValueError(f"{where} must be nested at most {_MAX_DEPTH} deep; it is deeper")
