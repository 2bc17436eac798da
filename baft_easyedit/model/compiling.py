"""What torch.compile must leave alone."""

from collections.abc import Callable
from functools import cache, wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def not_compiled(function: Callable[P, R]) -> Callable[P, R]:
    """Let torch.compile call a function as it is, as `torch.compiler.disable` does.

    That one imports dynamo, which takes about a second, and so is applied at the first call.
    """

    @cache
    def disabled() -> Callable[P, R]:
        return torch.compiler.disable(function)  # type: ignore[no-untyped-call]

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        return disabled()(*args, **kwargs)

    return call
