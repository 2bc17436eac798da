"""Rehearsal: past edits that are learned again beside each new one. Not in the paper.

An edit overwrites earlier ones because learning it never looks at them. The memory keeps their
requests (text, no weights), and each optimisation step takes some of them along.
"""

import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from baft_easyedit.files.messages import short
from baft_easyedit.files.reading import taken
from baft_easyedit.hparams import BaFTHyperParams
from baft_easyedit.training.requests import EditRequest, TextRow


class PastEdit(NamedTuple):
    """An edit that is remembered."""

    request: EditRequest
    loss: float
    """Its answer loss when it was last looked at, in nats per token."""


class RehearsalMemory:
    """The past edits of one model, the oldest first; a prompt is in it once."""

    def __init__(self) -> None:
        self._past: dict[str, PastEdit] = {}
        self._num_seen = 0
        self.tokenised: dict[str, tuple[Any, Sequence[TextRow]]] = {}
        """By prompt the rows of its request, and the settings they were made with, to save time; no
        part of the `state`."""

    def __len__(self) -> int:
        return len(self._past)

    def __iter__(self) -> Iterator[PastEdit]:
        return iter(self._past.values())

    def __getitem__(self, prompt: str) -> PastEdit:
        return self._past[prompt]

    def copy(self) -> "RehearsalMemory":
        """Return one of the same edits."""
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

    def remember(
        self, requests: Sequence[EditRequest], losses: Sequence[float], hparams: BaFTHyperParams
    ) -> None:
        """Add what was learned; a request with a prompt that is remembered replaces that one.

        Args:
            requests: What was learned.
            losses: Their answer losses.
            hparams: Whether anything is remembered, how many edits at most, and which then: with
                the policy `reservoir` any past edit is as likely as another, else the latest.
        """
        generator = self.generator(hparams)
        for request, loss in zip(requests, losses, strict=True):
            self._num_seen += 1
            self._past.pop(request.prompt, None)
            if hparams.rehearsal and self._make_room(hparams, generator):
                self._past[request.prompt] = PastEdit(request, loss)
        self._forget_rows()

    def _forget_rows(self) -> None:
        """Keep no rows of what is not remembered."""
        for prompt in self.tokenised.keys() - self._past.keys():
            del self.tokenised[prompt]

    def _make_room(self, hparams: BaFTHyperParams, generator: random.Random) -> bool:
        """Forget an edit if the memory is full; return whether the new one is to be kept."""
        limit = hparams.rehearsal_memory
        if limit is None or len(self._past) < limit:
            return True
        forgotten = 0
        if hparams.rehearsal_policy == "reservoir":
            forgotten = generator.randrange(self._num_seen)
        if forgotten < limit:
            del self._past[list(self._past)[forgotten]]
        return forgotten < limit

    def note(self, losses: Mapping[str, float]) -> None:
        """Take note of the answer losses of past edits, by prompt."""
        for prompt, loss in losses.items():
            self._past[prompt] = self._past[prompt]._replace(loss=loss)

    def state(self) -> dict[str, Any]:
        """Return all of it as JSON values, for `restore`; empty if nothing was learned."""
        if not self._num_seen:
            return {}
        past = [{"request": p.request.to_dict(), "loss": p.loss} for p in self]
        return {"num_seen": self._num_seen, "past": past}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go back to a `state`.

        Raises:
            ValueError: If it is not one; nothing has changed then.
            TypeError: If a value of a request has the wrong type; likewise.
        """
        where = "the rehearsal memory"
        if not state:
            self._past, self._num_seen = {}, 0
            self._forget_rows()
            return
        past = {}
        num_seen = taken(state, "num_seen", int, where)
        for item in taken(state, "past", list, where):
            if not isinstance(item, Mapping):
                raise TypeError(
                    f"a past edit in {where} must be a mapping; got {type(item).__name__}"
                )
            request = EditRequest.from_dict(taken(item, "request", dict, where))
            loss = taken(item, "loss", (int, float), where)
            if isinstance(loss, int) and abs(loss) > sys.float_info.max:
                raise ValueError(f"a loss in {where} must be a number of nats per token")
            past[request.prompt] = PastEdit(request, float(loss))
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
        hparams: How many, and by which policy.
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
        self._prompts = [p.request.prompt for p in memory if p.request.prompt not in prompts]
        self._memory = memory
        self._drawn: list[str] = []

    def __len__(self) -> int:
        """How many past edits a step takes."""
        return min(self._hparams.rehearsal, len(self._prompts))

    def draw(self) -> list[TextRow]:
        """Return the rows of the next step: past edits, then irrelevant prompts of some of them."""
        self._drawn = self._choose(len(self))
        rows = [self._rows_of(self._memory[prompt].request) for prompt in self._drawn]
        with_irrelevant = rows[: self._hparams.rehearsal_irrelevant]
        return [*(r[0] for r in rows), *(row for r in with_irrelevant for row in r[1:])]

    def _choose(self, count: int) -> list[str]:
        """Return the prompts of the next step."""
        if self._hparams.rehearsal_policy != "most-forgotten":
            return self._generator.sample(self._prompts, count)
        by_loss = sorted(self._prompts, key=lambda prompt: -self._memory[prompt].loss)
        first = count - count // 2
        # A loss is known only since its edit was drawn last: half are any, to look at them again.
        return by_loss[:first] + self._generator.sample(by_loss[first:], count - first)

    def note(self, losses: Sequence[float]) -> None:
        """Take note of the losses of the rows drawn last."""
        self._memory.note(dict(zip(self._drawn, losses, strict=False)))


class Review(Rehearsal):
    """A rehearsal that goes over all past edits in turn, in a random order."""

    _rest: list[str]

    def _choose(self, count: int) -> list[str]:
        """Return the next prompts; the order is drawn anew once all had their turn."""
        rest = getattr(self, "_rest", [])
        if len(rest) < count:
            rest = rest + self._generator.sample(self._prompts, len(self._prompts))
        self._rest = rest[count:]
        return list(dict.fromkeys(rest[:count]))
