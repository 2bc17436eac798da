"""Several named edits of one model, each of which acts only where a caller turns it on.

All of them are attached, but off. A context turns some of them on for its thread or asyncio task,
so these may use different edits side by side. An edit that is off leaves every hidden state
bit-equal.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

from torch import nn

from baft_easyedit.files.messages import short
from baft_easyedit.model.hooks import ModelEdit


class NamedEdits:
    """Several edits attached to one model. None acts outside `active`.

    Active edits with a layer in common act there one after the other, in the order of `edits`; in
    higher layers, each of them receives hidden states that the others changed. They were trained
    separately, so their joint effect was never trained.

    Args:
        model: The model; it must carry no edit now.
        edits: The edits by their names, not attached.

    Raises:
        ValueError: If there are none, a name is unusable, an edit does not fit, or the model
            carries an edit.
    """

    def __init__(self, model: nn.Module, edits: Mapping[str, ModelEdit]) -> None:
        check_names(edits)
        self._edits = dict(edits)
        try:
            for edit in reversed(self._edits.values()):  # the last attached acts first
                edit.share(other for other in self._edits.values() if other is not edit)
                edit.attach(model)
        except BaseException:
            self.detach()
            raise

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the edits, in the order in which they act."""
        return tuple(self._edits)

    @contextmanager
    def active(self, *names: str) -> Iterator[None]:
        """Run the model with these edits, and no other, inside this context and thread (or task).

        Args:
            names: Names of edits; none of them for the unedited model.

        Raises:
            ValueError: If there is no edit of a name.
            RuntimeError: At the end, if it is not the innermost one; see `Contexts`.
        """
        for name in names:
            if name not in self._edits:
                raise ValueError(f"there is no edit {short(name)}; there are {short(self.names)}")
        with ExitStack() as switches:
            for name, edit in self._edits.items():
                switches.enter_context(edit.switched(name in names))
            yield

    def detach(self) -> None:
        """Take all edits off the model, which then computes exactly what it did before."""
        for edit in self._edits.values():  # the reverse of how they were attached
            if edit.handles:
                edit.detach()


def check_names(names: Iterable[str]) -> None:
    """Raise ValueError if there is no name, or one is empty or reserved: 'base', or with a '+'."""
    given = list(names)
    if not given:
        raise ValueError("edits must hold at least one edit; got none")
    for name in given:
        if not name or name == "base" or "+" in name:
            raise ValueError(
                f"the name of an edit must not be empty or 'base', or hold a '+'; got {name!r}"
            )
