"""The methods of a model that generate, while it carries an edit.

Only the caller of `generate` knows where its prompts end: their width is told to the edit, whatever
forwards follow (a cache that holds a part of the prompt, none, chunks, guesses). Continuous
batching packs sequences into one row, in a thread of its own: it is refused before that begins.
"""

import functools
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor, nn


class Edit(Protocol):
    """What is told how wide prompts are."""

    def generating(self, prompt_width: int | None) -> AbstractContextManager[None]:
        """Return a context in which the model's forwards are those of a generation."""


def override(edit: Edit, model: nn.Module) -> list["Override"]:
    """Take over the methods of the model, or of the one inside it, that generates."""
    generator = next((m for m in model.modules() if _can_generate(m)), None)
    if generator is None:
        return []
    return [kind(edit, generator) for kind in OVERRIDES if hasattr(generator, kind.name)]


def _can_generate(module: nn.Module) -> bool:
    """Tell whether `generate` is a module's own, not that of a model inside it."""
    can_generate = getattr(type(module), "can_generate", None)
    return can_generate is not None and bool(can_generate())


class Override:
    """A method of one model, in place of its own until `remove`; a copy is one of the copy.

    Args:
        edit: The edit that the model carries.
        model: The model; neither is kept alive.
    """

    name: str

    def __init__(self, edit: Edit, model: nn.Module) -> None:
        self._edit, self._model = weakref.ref(edit), weakref.ref(model)
        self._replaced: Callable[..., Any] | None = vars(model).get(self.name)
        vars(model)[self.name] = self

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        return type(self), (self._edit(), self._model())

    def remove(self) -> None:
        """Give the model its own method back."""
        model = self._model()
        if model is not None and vars(model).get(self.name) is self:
            del vars(model)[self.name]
            if self._replaced is not None:
                vars(model)[self.name] = self._replaced

    def _original(self) -> Callable[..., Any]:
        """Return the model's own method."""
        model = self._model()
        return self._replaced or functools.partial(getattr(type(model), self.name), model)


class Generate(Override):
    """`generate`, which tells the edit how wide its prompts are."""

    name = "generate"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Generate as the model does."""
        edit = self._edit()
        assert edit is not None  # the model carries it
        with edit.generating(_prompt_width(args, kwargs)):
            return self._original()(*args, **kwargs)


class ContinuousBatching(Override):
    """What all of continuous batching begins with."""

    name = "init_continuous_batching"

    def __call__(self, *_args: Any, **_kwargs: Any) -> Any:
        """Raise ValueError."""
        raise ValueError(
            "an edited model must have one sequence in each row, but continuous batching "
            "(generate_batch) packs many into one: use generate, with padding on the left"
        )


OVERRIDES: tuple[type[Override], ...] = (Generate, ContinuousBatching)
"""All that is taken over."""


def _prompt_width(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """Return how many columns the prompts of a call of `generate` have; None if it has none.

    Behind a cache a caller may pass new tokens only, and the mask of all.
    """
    names = ("inputs", "input_ids", "inputs_embeds", "attention_mask")
    given = [*args[:1], *(kwargs.get(name) for name in names)]
    widths = [t.shape[1] for t in given if isinstance(t, Tensor) and t.dim() in (2, 3)]
    return max(widths, default=None)
