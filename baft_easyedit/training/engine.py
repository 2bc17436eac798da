"""Choose how steps repeat a model's forward: on a cached prefix where the model allows it."""

import logging
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from torch import Tensor, nn

from baft_easyedit.hparams import ENGINES
from baft_easyedit.model.hooks import ModelEdit
from baft_easyedit.training.forward import CannotCacheError, Forward
from baft_easyedit.training.prefix_cache import Edits, FullForward, PrefixCache
from baft_easyedit.training.recordings import Recordings
from baft_easyedit.training.requests import TextRow

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


class Stepped(Protocol):
    """What a step gives."""

    @property
    def row_losses(self) -> Tensor:
        """Mean loss of each row's answer tokens, [R]."""
        ...


First = TypeVar("First", bound=Stepped)


class Engine:
    """Prepares forwards of a model by the fastest way that it allows.

    Args:
        model: A model that `edit` is attached to.
        edit: The edit.
        name: One of `ENGINES`. With `auto`, a model that cannot use a cached prefix gets
            the full forward, and a warning in the log.
        recordings: What is known of texts already; it is added to.
        rounds: Whether to pad to one of few sizes, so that steps can be repeated by later edits.

    Raises:
        ValueError: If there is no such engine.
    """

    def __init__(
        self,
        model: nn.Module,
        edit: ModelEdit,
        name: str,
        recordings: Recordings | None = None,
        rounds: bool = False,
    ) -> None:
        if name not in ENGINES:
            raise ValueError(f"engine must be one of {', '.join(ENGINES)}; got {name!r}")
        self.note: str | None = None
        """Why the model uses no cached prefix; None if it is, or nobody asked for that."""
        self._model = model
        self._may_fall_back = name == "auto"
        self._full = FullForward(model, edit)
        caches = name != "full"
        self._cache = PrefixCache(model, edit, recordings, rounds) if caches else None

    @property
    def name(self) -> str:
        """What the next forward will be, as far as is known: `cached` or `full`."""
        return "full" if self._cache is None else "cached"

    def prepare(self, edits: Edits, rehearsed: Sequence[TextRow] = ()) -> Forward:
        """Prepare a forward; the model is in eval mode, as it will be in each step.

        Args:
            edits: The rows of each edit.
            rehearsed: Rows that each edit learns again beside its own.

        Raises:
            ValueError: If the engine is `cached`, and the model cannot use a cached prefix.
        """
        forward = self._cached(lambda cache: cache.prepare(edits, rehearsed))
        return self._full.prepare(edits, rehearsed) if forward is None else forward

    def start(self, edits: Edits, step: Callable[[Forward], First]) -> tuple[Forward, First]:
        """Prepare a forward and take the first step on it, by which it is checked.

        Args:
            edits: The rows of each edit.
            step: Computes a step; called again if the model turns out to use no cached prefix.

        Returns:
            The forward, and what its first step gave.

        Raises:
            ValueError: As above.
        """

        def cached(cache: PrefixCache) -> tuple[Forward, First]:
            forward = cache.prepare_unchecked(edits)
            first = step(forward)
            cache.check(forward, edits, first.row_losses)
            return forward, first

        started = self._cached(cached)
        if started is not None:
            return started
        forward = self._full.prepare(edits)
        return forward, step(forward)

    def _cached(self, compute: Callable[[PrefixCache], Result]) -> Result | None:
        """Return what the prefix cache gives; None, from then on, if the model cannot use it."""
        if self._cache is None:
            return None
        try:
            return compute(self._cache)
        except CannotCacheError as error:
            self.note = f"{type(self._model).__name__} cannot use a cached prefix ({error})"
            if not self._may_fall_back:
                raise ValueError(
                    f"engine must be auto or full for this model: {self.note}; got 'cached'"
                ) from error
        # Not above, where the error holds on to what had been computed until then.
        logger.warning("full forward: %s", self.note)
        self._cache = None
        return None
