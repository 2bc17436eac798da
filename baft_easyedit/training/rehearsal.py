"""Rehearsal: past requests are trained again beside each new one (ours; not in the paper).

A new edit damages earlier ones, because its objective does not contain them. So a memory keeps the
past requests (texts, no weights), and each training step learns a random sample of them as well.
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

from baft_easyedit.files.messages import short
from baft_easyedit.files.reading import taken
from baft_easyedit.hparams import BaFTHyperParams
from baft_easyedit.training.requests import EditRequest, TextRow


class RehearsalMemory:
    """The past requests of one edit, the oldest first, one for each prompt."""

    def __init__(self) -> None:
        self._past: dict[str, EditRequest] = {}
        self._num_seen = 0

    def __len__(self) -> int:
        return len(self._past)

    def __iter__(self) -> Iterator[EditRequest]:
        return iter(self._past.values())

    def __getitem__(self, prompt: str) -> EditRequest:
        return self._past[prompt]

    @property
    def num_seen(self) -> int:
        """How many requests were learned so far, remembered or not."""
        return self._num_seen

    def generator(self, hparams: BaFTHyperParams) -> random.Random:
        """Return a random generator seeded by the hyper-parameters and the number of requests."""
        return random.Random(f"{hparams.seed} {self._num_seen}")

    def remember(self, requests: Sequence[EditRequest], hparams: BaFTHyperParams) -> None:
        """Add learned requests; a request replaces an earlier one with the same prompt."""
        generator = self.generator(hparams)
        for request in requests:
            self._num_seen += 1
            self._past.pop(request.prompt, None)
            if hparams.rehearsal and self._make_room(hparams.rehearsal_memory, generator):
                self._past[request.prompt] = request

    def _make_room(self, limit: int | None, generator: random.Random) -> bool:
        """Forget a request if the memory is full; return whether the new one is kept.

        Each past request has the same chance to stay (Vitter's algorithm R).
        """
        if limit is None or len(self._past) < limit:
            return True
        forgotten = generator.randrange(self._num_seen)
        if forgotten < limit:
            del self._past[list(self._past)[forgotten]]
        return forgotten < limit

    def state(self) -> dict[str, Any]:
        """Return the memory as JSON values, for `restore`; empty if nothing was learned."""
        if not self._num_seen:
            return {}
        return {"num_seen": self._num_seen, "past": [request.to_dict() for request in self]}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go back to a `state`.

        Raises:
            ValueError: If `state` is not one; nothing has changed then.
            TypeError: If a value of a request has the wrong type; nothing has changed then.
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


class Rehearsal:
    """Draws the past requests that each step of one edit call learns again.

    `rows_of` tokenises one request: its edit first, then its irrelevant prompts. Past requests with
    the prompt of a `new` one are left out.
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
        self._rows_of = cache(rows_of)
        self._generator = memory.generator(hparams)
        self._past = [request for request in memory if request.prompt not in prompts]

    def __len__(self) -> int:
        """How many past requests a step takes."""
        return min(self._hparams.rehearsal, len(self._past))

    def draw(self) -> list[TextRow]:
        """Return the next step's rows: past edits, then irrelevant prompts of some of them."""
        rows = [self._rows_of(r) for r in self._generator.sample(self._past, len(self))]
        with_irrelevant = rows[: self._hparams.rehearsal_irrelevant]
        return [*(r[0] for r in rows), *(row for r in with_irrelevant for row in r[1:])]
