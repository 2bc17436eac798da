"""Rehearsal: past edits that are learned again beside each new one. Not in the paper.

An edit overwrites earlier ones because learning it never looks at them. The memory keeps their
requests (text, no weights), and each optimisation step takes some of them along.
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from baft_easyedit.files.messages import short
from baft_easyedit.files.reading import taken
from baft_easyedit.hparams import BaFTHyperParams
from baft_easyedit.training.requests import EditRequest, TextRow


class RehearsalMemory:
    """The past edits of one model, the oldest first; a prompt is in it once."""

    def __init__(self) -> None:
        self._past: dict[str, EditRequest] = {}
        self._num_seen = 0
        self.tokenised: dict[str, tuple[Any, Sequence[TextRow]]] = {}
        """By prompt the rows of its request, and the settings they were made with, to save time; no
        part of the `state`."""

    def __len__(self) -> int:
        return len(self._past)

    def __iter__(self) -> Iterator[EditRequest]:
        return iter(self._past.values())

    def __getitem__(self, prompt: str) -> EditRequest:
        return self._past[prompt]

    def copy(self) -> "RehearsalMemory":
        """Return a memory of the same edits."""
        other = RehearsalMemory()
        other._past, other._num_seen = dict(self._past), self._num_seen
        other.tokenised = self.tokenised
        return other

    @property
    def num_seen(self) -> int:
        """How many requests were learned so far, remembered or not."""
        return self._num_seen

    def generator(self, hparams: BaFTHyperParams) -> random.Random:
        """Return a source of random draws that depends on the seed and on what was learned only."""
        return random.Random(f"{hparams.seed} {self._num_seen}")

    def remember(self, requests: Sequence[EditRequest], hparams: BaFTHyperParams) -> None:
        """Add learned requests; one with a prompt that is remembered replaces that one.

        Args:
            requests: What was learned.
            hparams: Whether anything is remembered, and how many edits at most.
        """
        generator = self.generator(hparams)
        for request in requests:
            self._num_seen += 1
            self._past.pop(request.prompt, None)
            if hparams.rehearsal and self._make_room(hparams.rehearsal_memory, generator):
                self._past[request.prompt] = request
        self._forget_rows()

    def _forget_rows(self) -> None:
        """Keep no rows of what is not remembered."""
        for prompt in self.tokenised.keys() - self._past.keys():
            del self.tokenised[prompt]

    def _make_room(self, limit: int | None, generator: random.Random) -> bool:
        """Forget an edit if the memory is full; return whether the new one is to be kept.

        Any past edit is as likely to stay as another (Vitter's algorithm R).
        """
        if limit is None or len(self._past) < limit:
            return True
        forgotten = generator.randrange(self._num_seen)
        if forgotten < limit:
            del self._past[list(self._past)[forgotten]]
        return forgotten < limit

    def state(self) -> dict[str, Any]:
        """Return all of it as JSON values, for `restore`; empty if nothing was learned."""
        if not self._num_seen:
            return {}
        return {"num_seen": self._num_seen, "past": [request.to_dict() for request in self]}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go back to a `state`.

        Raises:
            ValueError: If it is not one; nothing has changed then.
            TypeError: If a value of a request has the wrong type; likewise.
        """
        where = "the rehearsal memory"
        num_seen, requests = 0, []
        if state:
            num_seen = taken(state, "num_seen", int, where)
            requests = [EditRequest.from_dict(r) for r in taken(state, "past", list, where)]
        past = {request.prompt: request for request in requests}
        if num_seen < len(past):
            raise ValueError(
                f"num_seen must be at least the {len(past)} edits of the memory; got "
                f"{short(num_seen)}"
            )
        self._past, self._num_seen = past, num_seen
        self._forget_rows()


class Rehearsal:
    """The past edits that the steps of one edit call learn again.

    Args:
        memory: Where they come from.
        hparams: How many.
        rows_of: Tokenises one request: its edit, then its irrelevant prompts.
        new: What the edit call learns; past edits of the same prompts are left out.
    """

    def __init__(
        self,
        memory: RehearsalMemory,
        hparams: BaFTHyperParams,
        rows_of: Callable[[EditRequest], Sequence[TextRow]],
        new: Sequence[EditRequest] = (),
    ) -> None:
        prompts = {request.prompt for request in new}
        self._hparams = hparams
        self._rows_of = rows_of
        self._generator = memory.generator(hparams)
        self._past = [request for request in memory if request.prompt not in prompts]

    def __len__(self) -> int:
        """How many past edits a step takes."""
        return min(self._hparams.rehearsal, len(self._past))

    def draw(self) -> list[TextRow]:
        """Return the rows of the next step: past edits, then irrelevant prompts of some of them."""
        rows = [self._rows_of(request) for request in self._choose(len(self))]
        with_irrelevant = rows[: self._hparams.rehearsal_irrelevant]
        return [*(r[0] for r in rows), *(row for r in with_irrelevant for row in r[1:])]

    def _choose(self, count: int) -> list[EditRequest]:
        """Return the past edits of the next step."""
        return self._generator.sample(self._past, count)


class Review(Rehearsal):
    """A rehearsal that goes over all past edits in turn, in a random order."""

    _rest: list[EditRequest]

    def _choose(self, count: int) -> list[EditRequest]:
        """Return the next past edits; the order is drawn anew once all had their turn."""
        rest = getattr(self, "_rest", [])
        if len(rest) < count:
            rest = rest + self._generator.sample(self._past, len(self._past))
        self._rest = rest[count:]
        return list({request.prompt: request for request in rest[:count]}.values())
