"""Check parsed JSON and YAML by pydantic models; errors name the place, field, rule and value."""

from collections.abc import Iterable
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from baft_easyedit.files.messages import cut, short
from baft_easyedit.files.reading import did_you_mean

M = TypeVar("M", bound=BaseModel)


def validated(model: type[M], content: Any, place: str, known: Iterable[str] = ()) -> M:
    """Read parsed JSON or YAML into a model; `known` names are suggested for a misspelt key.

    Raises:
        ValueError: If a rule is broken; the first problem is told, and how many others there are.
    """
    try:
        return model.model_validate(content)
    except ValidationError as error:
        found = error.errors(include_url=False)
        # If every entry of a list is wrong, pydantic reports the list as too short as well.
        problems = [problem for problem in found if problem["type"] != "too_short"] or found
        others = f" (and {len(problems) - 1} more problems)" if len(problems) > 1 else ""
        raise ValueError(f"{place}: {_told(problems[0], known)}{others}") from None


def _told(problem: Any, known: Iterable[str]) -> str:
    field = cut(".".join(map(str, problem["loc"])), 200)
    if problem["type"] == "extra_forbidden":
        return f"{field} is unknown{did_you_mean(str(problem['loc'][-1]), known)}"
    rule = problem["msg"].removeprefix("Value error, ")
    found = "" if "; got " in rule else f"; got {short(problem['input'])}"
    return ": ".join(filter(None, (field, rule))) + found
