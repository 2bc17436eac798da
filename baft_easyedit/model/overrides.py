"""Override the methods by which a model generates, while the model carries an edit.

Why: an edit acts on the end of a prompt and on the answer, but the forwards of a generation do not
say where the prompt ends (they may use a cache of a part of it, no cache, chunks, or guessed
tokens). `generate` gets the whole prompts, so its override tells the edit their width. Continuous
batching is refused, because it packs several sequences into one row, in a thread of its own.
"""

import functools
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from baft_easyedit.model.inspect import generating_part, num_virtual_tokens

if TYPE_CHECKING:  # `hooks` imports this module
    from baft_easyedit.model.hooks import ModelEdit


def override(edit: "ModelEdit", model: nn.Module) -> list["Override"]:
    """Override the methods of `model`, or of the model inside it that generates (PEFT wraps it)."""
    generator = generating_part(model)
    if generator is None:
        return []
    return [kind(edit, generator) for kind in OVERRIDES if hasattr(generator, kind.name)]


class Override:
    """A method of one model that replaces the model's own until `remove`.

    A deep copy of the model gets an override for the copy. Neither model nor edit is kept alive.
    """

    name: str

    def __init__(self, edit: "ModelEdit", model: nn.Module) -> None:
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
    """Override of `generate` that tells the edit the width of the prompts."""

    name = "generate"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Generate as the model does.

        Raises:
            ValueError: If `guidance_scale` asks for a second prompt beside each.
        """
        edit, model = self._edit(), cast(Any, self._model())
        assert edit is not None  # the model carries the edit
        if edit.contexts.now.enabled:
            _check_guidance(model, args, kwargs)
        # PEFT lends the model a method of its own for this.
        wrapper = getattr(model.prepare_inputs_for_generation, "__self__", None)
        with edit.generating(_prompt_width(args, kwargs), num_virtual_tokens(wrapper)):
            return self._original()(*args, **kwargs)


class ContinuousBatching(Override):
    """Override of the method by which every continuous batching begins; it refuses."""

    name = "init_continuous_batching"

    def __call__(self, *_args: Any, **_kwargs: Any) -> Any:
        """Raise ValueError."""
        raise ValueError(
            "an edited model must have one sequence in each row, but continuous batching "
            "(generate_batch) packs many into one: use generate, with padding on the left"
        )


OVERRIDES: tuple[type[Override], ...] = (Generate, ContinuousBatching)
"""All overrides."""


def _prompt_width(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """Return how many columns the prompts of a call of `generate` have; None without prompts.

    The mask counts too: with a cache, a caller may pass the new tokens, but the mask of all tokens.
    """
    names = ("inputs", "input_ids", "inputs_embeds", "attention_mask")
    given = [*args[:1], *(kwargs.get(name) for name in names)]
    widths = [t.shape[1] for t in given if isinstance(t, Tensor) and t.dim() in (2, 3)]
    return max(widths, default=None)


def _check_guidance(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise ValueError if `generate` would run a second prompt, of another width, beside each."""
    configs = (kwargs.get("generation_config"), *args[1:2], model.generation_config)
    scales = (getattr(config, "guidance_scale", None) for config in configs)
    first = next((scale for scale in scales if scale is not None), None)
    scale = kwargs.get("guidance_scale", first)
    if scale not in (None, 1):
        raise ValueError(
            "guidance_scale must be 1 or None in generation with an edit, which cannot tell where "
            f"the negative prompt ends; got {scale}: leave it out, or turn the edit off"
        )
