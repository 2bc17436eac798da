"""Forgetting the edits of one prompt: the state that the other edits lead to without them.

It starts from the state before the first edit of the prompt. Each later edit is learned again
there, or taken over from the present state where that gives the same: with `min_similarity` an
edit is learned as if it were the first, and stays as it is until another takes states from it.
"""

from collections.abc import Callable, Mapping, Sequence

from baft_easyedit.files.messages import short
from baft_easyedit.model.edit import Snapshot
from baft_easyedit.storage.config import environment
from baft_easyedit.storage.directory import KeptDirectory
from baft_easyedit.storage.journal import Entry, Journal, edit_content
from baft_easyedit.storage.relearning import hparams_at, learn_entry, restore_entry
from baft_easyedit.storage.state import state_hash
from baft_easyedit.training.learner import EditState, Learner
from baft_easyedit.training.loop import EditReport
from baft_easyedit.training.requests import EditRequest, as_requests


class Forgetting:
    """Makes the state without the edits of a prompt, and the entries that lead to it.

    Raises:
        ValueError: If the present state holds no edit of the prompt, or it or a later change is no
            edit, which could be learned again.
    """

    def __init__(self, learner: Learner, directory: KeptDirectory, prompt: str) -> None:
        self._learner = learner
        self._directory = directory
        self._prompt = prompt
        self._path = directory.journal.path_from(prompt, str(directory.path))
        """The entries that led to the present state, from the first edit of the prompt on."""
        self._journal = Journal(directory.journal.entries)
        """The directory's journal, to which the entries are added."""

    def run(
        self, known: Mapping[int, EditState], tell: Callable[[EditReport], object]
    ) -> tuple[list[Entry], list[EditReport]]:
        """Make the state; return the new entries, and the reports of edits learned again.

        `known` has states by positions of the journal; `tell` is given each report once it is
        there.
        """
        present, kept = self._learner.edit.snapshot(), self._kept_edits()
        num_entries, to = len(self._journal), self._path[0].parent or 0
        restore_entry(self._learner, self._directory, to, known)
        if not self._has_same_statistics():
            kept = {}
        self._add("rollback", {"to": to, "forgotten": self._prompt})
        reports = []
        for entry in self._path:
            rest = [r for r in as_requests(entry.requests) if r.prompt != self._prompt]
            if entry.id in kept and len(rest) == len(entry.requests):
                self._take_over(entry, present, kept[entry.id])
            elif rest:
                reports.append(self._learn_again(entry, rest))
                tell(reports[-1])
        if self._begins_with_a_snapshot:
            self._check_forgotten()
        return self._journal.entries[num_entries:], reports

    @property
    def _begins_with_a_snapshot(self) -> bool:
        """Whether the journal begins with edits that it does not list."""
        return bool(self._journal.entries[0].content.get("snapshot_of"))

    def _add(self, kind: str, content: Mapping[str, object]) -> None:
        """Add the entry of the change that led to the present state."""
        self._journal.add(kind, state_hash(self._learner.state()), content)

    def _add_settings(self, settings: Mapping[str, object]) -> None:
        """Add an entry with the settings of the next edits, if they have changed."""
        if not self._journal.ends_with(settings):
            self._add("settings", settings)

    # ---- taking over

    def _kept_edits(self) -> dict[int, list[int]]:
        """Return the indices of the past edits that entries made, by the ids of the entries.

        An entry is left out unless each of its edits has all states that it was learned at, none of
        them taken by another edit.
        """
        edit = self._learner.edit
        if edit.min_similarity is None or self._begins_with_a_snapshot:
            return {}
        try:
            made = self._made()
        except ValueError:  # what was learned then cannot be read by this tokenizer
            return {}
        past, kept = edit.past(edit.layers[0]).edits, dict[int, list[int]]()
        if len(made) != len(past):
            return {}
        for index, (entry, num_states) in enumerate(made):
            if num_states == len(past[index].states):
                kept.setdefault(entry.id, []).append(index)
        entries = self._journal.entries
        return {i: own for i, own in kept.items() if len(own) == len(entries[i].requests)}

    def _made(self) -> list[tuple[Entry, int]]:
        """Return of each present past edit, in order, its entry and how many states it learned at.

        An edit goes when another of the same prompt is made: of the same tokens, that is.
        """
        journal = self._journal
        made = dict[tuple[int, ...], tuple[Entry, int]]()
        for entry in (journal.entries[i] for i in sorted(journal.ancestors(journal.position))):
            for request in as_requests(entry.requests) if entry.requests else ():
                hparams = hparams_at(self._learner, journal, entry)
                prompt, num_states = self._learner.place_of(request, hparams)
                made.pop(prompt, None)
                made[prompt] = entry, num_states
        return [*made.values()]

    def _has_same_statistics(self) -> bool:
        """Tell whether without the prompt's edits the first edit measures what the present one did.

        The restored state, the one before the first entry of the path, has the statistics unless
        all of its edits are to be made again.
        """
        edit = self._learner.edit
        if edit.min_similarity is None or edit.whitening(edit.layers[0]).is_known:
            return True
        rest = (e for e in self._path if any(r["prompt"] != self._prompt for r in e.requests))
        first = self._path[0]
        before, now = (
            self._learner.frames(hparams_at(self._learner, self._journal, entry))
            for entry in (first, next(rest, first))
        )
        return before == now

    def _take_over(self, entry: Entry, present: Snapshot, indices: Sequence[int]) -> None:
        """Make the edits of an entry as they are in the present state."""
        self._add_settings(self._journal.settings_of(entry.id))
        for index in indices:
            self._learner.take_over(present, index)
        self._add("edit", {name: entry.content[name] for name in ("requests", "report")})

    # ---- learning again

    def _learn_again(self, entry: Entry, requests: Sequence[EditRequest]) -> EditReport:
        """Learn requests of an entry with its hyper-parameters."""
        settings = self._journal.settings_of(entry.id)
        self._add_settings({**settings, "environment": environment(self._learner.model)})
        report = learn_entry(self._learner, self._journal, entry, requests)
        self._add("edit", edit_content(requests, report))
        return report

    def _check_forgotten(self) -> None:
        """Raise ValueError if the model, and not the base model, answers as a forgotten edit."""
        hparams = hparams_at(self._learner, self._journal, self._path[0])
        requests = as_requests([request for entry in self._path for request in entry.requests])
        asked = [request for request in requests if request.prompt == self._prompt]
        edited = self._learner.holds(asked, hparams)
        with self._learner.edit.disabled():
            base = self._learner.holds(asked, hparams)
        if any(now and not before for now, before in zip(edited, base, strict=True)):
            raise ValueError(
                "prompt must be that of an edit that can be taken out; "
                f"{short(self._prompt)} is still edited by the snapshot that the journal begins "
                "with, whose edits are not told apart: edit it to the answer that it should have"
            )
