"""Check parsed JSON and YAML by pydantic models; errors name the place, field, rule and value.

Pydantic's own words reach no user: `in_words` is where they become the project's.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from baft_easyedit.files.messages import cut, short
from baft_easyedit.files.reading import did_you_mean

M = TypeVar("M", bound=BaseModel)
_RULES: Mapping[str, str] = {
    "missing": "must be given",
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), "must be an integer"),
    **dict.fromkeys(("float_type", "float_parsing"), "must be a number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "must be true or false"),
    **dict.fromkeys(("list_type", "tuple_type"), "must be a list"),
    **dict.fromkeys(("dict_type", "model_type", "model_attributes_type"), "must be a mapping"),
    "string_type": "must be a text",
    "string_too_short": "must not be empty",
    "string_unicode": "must not have half of a surrogate pair",
    "string_pattern_mismatch": "must match {pattern}",
    "finite_number": "must be finite",
    "literal_error": "must be {expected}",
    "greater_than": "must be above {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be below {lt}",
    "less_than_equal": "must be at most {le}",
    "too_short": "must not be empty",
    "json_invalid": "must be JSON, and is not: {error}",
}
"""By pydantic's type of a problem; of others its message is told, which begins alike."""
_KINDS = ("int", "str", "list[str]")
"""What pydantic puts behind the name of a field that may be of several types."""


def validated(model: type[M], content: Any, place: str, known: Iterable[str] = ()) -> M:
    """Read parsed JSON or YAML into a model; `known` names are suggested for a misspelt key.

    Raises:
        ValueError: If a rule is broken; the first problem is told, and how many others there are.
    """
    try:
        return model.model_validate(content)
    except ValidationError as error:
        problem = in_words(error.errors(include_url=False), known)
        between = " " if problem.startswith("must ") else ": "
        raise ValueError(f"{place}{between}{problem}") from None


def in_words(found: Sequence[Any], known: Iterable[str] = ()) -> str:
    """Return what pydantic's `errors()` has found: field, rule and value of the first problem."""
    # If every entry of a list is wrong, pydantic reports the list as too short as well.
    problems = [problem for problem in found if problem["type"] != "too_short"] or found
    first, field = problems[0], _field(problems[0])
    alike = [problem for problem in problems if _field(problem) == field]
    rules = list(dict.fromkeys(_rule(problem) for problem in alike))
    rule = " or ".join([rules[0], *(other.removeprefix("must be ") for other in rules[1:])])
    others = len(problems) - len(alike)
    more = f" (and {others} more problem{'s' * (others > 1)})" if others else ""
    if first["type"] == "extra_forbidden":
        return f"{field} is unknown{did_you_mean(str(first['loc'][-1]), known)}{more}"
    between = "" if not field else " " if rule.startswith("must ") else ": "
    value = "" if "; got " in rule else f"; got {short(first['input'])}"
    return f"{field}{between}{rule}{value}{more}"


def _field(problem: Mapping[str, Any]) -> str:
    """Return the path of a problem's field, with dots between its parts; "" for the whole."""
    return cut(".".join(str(part) for part in problem["loc"] if part not in _KINDS), 200)


def _rule(problem: Mapping[str, Any]) -> str:
    """Return the rule that a problem breaks."""
    if problem["type"] in _RULES:
        bounds = {k: str(v).removesuffix(".0") for k, v in problem.get("ctx", {}).items()}
        return _RULES[problem["type"]].format(**bounds)
    return re.sub(r"^\w+ should ", "must ", problem["msg"].removeprefix("Value error, "))
