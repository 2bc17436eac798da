"""Check the fields of settings by their annotations; errors name field, rule and value."""

import json
import math
import sys
from dataclasses import fields
from typing import Any, get_args, get_origin, get_type_hints

from baft_easyedit.files.messages import short


def check_types(settings: Any) -> None:
    """Check every field of a dataclass against its annotation; a float may be a whole number.

    Raises:
        TypeError: If a value has the wrong type.
        ValueError: If a float is not finite.
    """
    hints = get_type_hints(type(settings))
    for f in fields(settings):
        value, hint = getattr(settings, f.name), hints[f.name]
        is_float = float in (hint, *get_args(hint))
        if is_float and type(value) is int and abs(value) <= sys.float_info.max:
            value = float(value)
            setattr(settings, f.name, value)
        if not _has_type(value, hint):
            wanted = str(hint) if get_args(hint) else hint.__name__
            yaml = is_float and isinstance(value, str)
            raise TypeError(
                f"{f.name} must be of type {wanted}; got {short(value)} of type "
                f"{type(value).__name__}{' (YAML reads 1e-4 as text: write 1.0e-4)' * yaml}"
            )
        numbers = value if isinstance(value, list) else [value]
        if any(isinstance(number, int) and number.bit_length() > 64 for number in numbers):
            raise ValueError(f"{f.name} must have at most 64 bits; got {short(value)}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{f.name} must be a finite number; got {value!r}")


def _has_type(value: object, hint: Any) -> bool:
    """Tell whether a value fits a plain annotation."""
    kinds = [get_origin(kind) or kind for kind in get_args(hint) or (hint,)]
    whole = not isinstance(value, list) or all(type(item) is int for item in value)
    return type(value) in kinds and whole


def is_json(value: object) -> bool:
    """Tell whether a value stays equal when written as JSON and read again."""
    try:
        return bool(json.loads(json.dumps(value)) == value)
    except (TypeError, ValueError):
        return False
