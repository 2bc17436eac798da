"""What callers set for the forward passes of an edited model, each in their own thread or task.

The settings are in a context variable, so that asyncio tasks do not see each other's, and
`asyncio.to_thread` takes them along. Shapes: B batch, T tokens of a forward, D hidden size, r rank.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar, Token
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from baft_easyedit.model.positions import PromptLengths


@dataclass(repr=False)
class GateRecord:
    """Basis weights and hidden states of the latest forward inside `ModelEdit.recording`."""

    positions: Tensor | None = None
    """True where the intervention applies, [B, T]."""
    weights: dict[int, Tensor] = field(default_factory=dict)
    """Basis weights w(h) of each edited layer, [B, T, r], fp32, with their autograd graph."""
    hidden: dict[int, Tensor] = field(default_factory=dict)
    """Hidden states h at each edited layer, before the edit, [B, T, D], without their graph."""


@dataclass(frozen=True, repr=False, eq=False)
class Settings:
    """What the contexts of a `ModelEdit` (`disabled`, `prompt_lengths`, ...) set together."""

    enabled: bool
    prompt_lengths: PromptLengths | None = None
    prompt_width: int | None = None
    """Columns of the prompts in the present generation; None outside one."""
    num_virtual: int = 0
    """Virtual tokens of PEFT before each prompt of the present generation, not counted above."""
    given_positions: Tensor | None = None
    """True where the intervention applies, [B, T]."""
    record: GateRecord | None = None
    is_learning: bool = False
    """Whether an edit is being learned, in which past edits take no part."""
    outer: "Settings | None" = None
    """Those of the context around this one."""

    def are_in(self, other: "Settings | None") -> bool:
        """Tell whether these are other settings, or those of a context around them."""
        while other is not None and other is not self:
            other = other.outer
        return other is self


class Contexts:
    """The settings of each thread, and of each of its asyncio tasks."""

    def __init__(self, is_on: bool = True) -> None:
        self.is_on = is_on
        outside = Settings(is_on)
        self._present = ContextVar("settings", default=outside)

    def __reduce__(self) -> Any:
        return Contexts, (self.is_on,)

    @property
    def now(self) -> Settings:
        """The present settings; whoever sets them ends the contexts that are open."""
        return self._present.get()

    @now.setter
    def now(self, settings: Settings) -> None:
        self._present.set(settings)

    @contextmanager
    def within(self, **changed: Any) -> Iterator[None]:
        """Change settings until this context ends, and with it those that began inside.

        One that ends elsewhere, such as a half-read stream that another thread drops, changes
        nothing there.

        Raises:
            RuntimeError: At the end, if it is not the innermost context.
        """
        before = self.now
        inside = replace(before, outer=before, **changed)
        token = self._present.set(inside)
        try:
            yield
            if self.now is not inside:
                raise RuntimeError(
                    "contexts of an edit (active, disabled, prompt_lengths, ...) must end in the "
                    "reverse order of their beginning, in the thread or task where they began; one "
                    "did not, and has ended those inside it: use nested `with` statements"
                )
        finally:
            if inside.are_in(self.now):
                self._reset(token, before)

    def _reset(self, token: Token[Settings], before: Settings) -> None:
        """Set what was before; by the token, which leaves nothing behind, where it is of use."""
        try:
            self._present.reset(token)
        except ValueError:  # a task that began inside the context has a copy of its own
            self.now = before
