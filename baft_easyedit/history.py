"""History: each change of an edit happens wholly or not at all, and can be gone back to.

The latest states are in memory. Once a directory is open, every change is in it, too, before it
counts; states that are no longer in memory come from its checkpoints, and what lies between two of
them is learned again.
"""

import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from baft_easyedit.hparams import BaFTHyperParams
from baft_easyedit.keeping.config import KeptConfig, environment, hparams_of, method_of
from baft_easyedit.keeping.directory import KeptDirectory
from baft_easyedit.keeping.journal import Entry, Journal, report_dict
from baft_easyedit.keeping.state import is_after, present, state_hash
from baft_easyedit.learner import EditState, Learner
from baft_easyedit.learning import EditReport
from baft_easyedit.messages import short
from baft_easyedit.paths import expanded
from baft_easyedit.requests import EditRequest, as_requests

_CHANGED = "changed by other means than its editor since"


class History:
    """What an edit went through.

    Args:
        learner: What changes.
        hparams: How it learns from now on; may be replaced.
        undo_depth: How many states are in memory.
    """

    def __init__(self, learner: Learner, hparams: BaFTHyperParams, undo_depth: int) -> None:
        self.hparams = hparams
        self.origin: KeptConfig | None = None
        """What a kept edit said of its model; None for an edit of this model."""
        self.recent: deque[tuple[int, EditState]] = deque(maxlen=undo_depth)
        """States before the latest changes, each with its position in the journal."""
        self._learner = learner
        self._directory: KeptDirectory | None = None
        self._journal: Journal | None = None
        """What a loaded edit went through; None for a new one."""
        self._snapshot_of = "an edit that was in memory only"
        """What `save` writes a snapshot of while there is no journal."""
        self._starts: set[str] = set()
        """Snapshots of this edit that `save` may replace by newer ones: lines of entries 0."""

    @property
    def journal(self) -> Journal | None:
        """The journal of the directory that is open, or was; else that of a loaded edit."""
        return self._journal if self._directory is None else self._directory.journal

    def config(self) -> KeptConfig:
        """Describe the edit as it is kept: its method, model, and versions."""
        config = self.origin or KeptConfig.of(self._learner.model, self.hparams)
        return config.with_settings(self.hparams)

    # ---- the directory

    def go_on(self, journal: Journal) -> None:
        """Go on, in memory, with the journal that led to the present state."""
        self._journal = journal
        self._starts.add(journal.entries[0].line)

    def end_journal(self, last: Entry, why: str) -> None:
        """Go on without a journal: the present state does not follow from its last entry."""
        self._journal = None
        self._snapshot_of = f"{last.reference}; {why}"

    def open(self, directory: KeptDirectory) -> None:
        """Keep all changes from now on; the present state is the latest of the directory."""
        self._directory = directory
        self._keep_settings()
        directory.ensure_checkpoint()

    def close(self) -> None:
        """Let others open the directory, if one is open."""
        if self._directory is not None:
            self._directory.close()

    def save(self, path: str | os.PathLike[str], overwrite: bool) -> None:
        """Write the present state, and the journal that led to it, into a directory."""
        own, path = self._directory, expanded(path)
        if own is not None and own.is_at(path):
            own.check_usable()
            self._check_untouched(own)  # all else is there already
            return
        entries, state = self._told()
        target = KeptDirectory(path)
        try:
            target.take_over(entries, state, self.config(), None if overwrite else self._starts)
        finally:
            target.close()
        self._starts.add(entries[0].line)

    def _told(self) -> tuple[list[Entry], EditState]:
        """Return the journal that leads to the present state, or a snapshot that says of what."""
        state, journal, snapshot_of = self._learner.state(), self.journal, self._snapshot_of
        if journal is not None:
            as_told = present(state, journal)
            if as_told is not None:
                return journal.entries, as_told
            snapshot_of = f"{journal.entries[-1].reference}; {_CHANGED}"
        content = {**self._settings(), "snapshot_of": snapshot_of}
        return [Journal().next("start", state_hash(state), content)], state

    def _settings(self) -> dict[str, Any]:
        """Return what learning depends on beside the state and the requests."""
        model = self._learner.model
        return {"hparams": method_of(self.hparams), "environment": environment(model)}

    def _keep_settings(self) -> None:
        """Note in the journal how edits are learned from now on, unless it says so already."""
        journal, settings = self.journal, self._settings()
        if journal is None or (
            len(journal) and journal.settings_of(len(journal) - 1).content == settings
        ):
            return
        self.origin = self.config()
        self._commit("settings" if len(journal) else "start", settings)

    def _commit(self, kind: str, content: Mapping[str, Any]) -> None:
        """Note in the journal, if there is one, what led to the present state."""
        state = self._learner.state()
        if self._directory is not None:
            self._directory.commit(kind, state, self.config(), content)
        elif self._journal is not None:
            self._journal.append(self._journal.next(kind, state_hash(state), content))

    def _check_untouched(self, directory: KeptDirectory) -> None:
        """Raise ValueError if the edit is not as the directory keeps it."""
        if present(self._learner.state(), directory.journal) is None:
            raise ValueError(
                f"the edit must be as {directory.path} keeps it, and was changed by other means "
                f"than this editor: call rollback(to={directory.journal.position}) first, or "
                "save() it elsewhere"
            )

    # ---- changes

    @contextmanager
    def change(self) -> Iterator[None]:
        """Make a change that ends with `keep`; if anything goes wrong before, it is taken back."""
        if self._directory is not None:
            self._directory.check_usable()
            self._check_untouched(self._directory)
        elif self._journal is not None and present(self._learner.state(), self._journal) is None:
            self.end_journal(self._journal.entries[-1], _CHANGED)
        self._keep_settings()
        with self._all_or_nothing():
            yield

    def keep(
        self,
        kind: str,
        requests: Sequence[EditRequest] = (),
        report: EditReport | None = None,
        to: int | None = None,
    ) -> None:
        """Commit a change to the open directory, or note it in the journal of a loaded edit."""
        if self.journal is None:
            return
        content: dict[str, Any] = {"to": to}
        if report is not None:
            content = {
                "requests": [request.to_dict() for request in requests],
                "report": report_dict(report),
            }
        self._commit(kind, content)

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """Go back if anything goes wrong before the change is kept."""
        before, journal = self._learner.state(), self.journal
        position, size = (0, 0) if journal is None else (journal.position, len(journal))
        try:
            yield
            self.recent.append((position, before))
        except BaseException:
            if journal is None or len(journal) == size:  # else it is complete already
                self._learner.restore(before)
            raise

    # ---- going back

    def undo(self) -> None:
        """Go back to before the latest change."""
        journal = None if self._directory is None else self._directory.journal
        if journal is not None and journal.position > 0:
            parent = journal.entries[journal.position].parent
            assert parent is not None  # only entry 0 has none
            self._return("undo", parent)
        elif journal is None and self.recent:
            position, state = self.recent.pop()
            self._learner.restore(state)
            self._note_undo(position)
        else:
            raise ValueError(
                "there is no edit to undo: edit() was not called, or undo_depth is used up"
            )

    def _note_undo(self, to: int) -> None:
        """Note in the journal of a loaded edit that its state is an earlier one again."""
        if self._journal is None:
            return
        if is_after(self._learner.state(), self._journal, to):
            self._commit("undo", {"to": to})
        else:
            self.end_journal(self._journal.entries[-1], _CHANGED)

    def rollback(self, to: int) -> None:
        """Go to the state after an entry of the journal."""
        journal = None if self._directory is None else self._directory.journal
        if journal is None:
            raise ValueError(
                "rollback needs the journal of a directory, and none is open: use "
                "BaFTEditor.open(), or undo()"
            )
        if not 0 <= to < len(journal):
            raise ValueError(
                f"to must be in [0, {len(journal) - 1}], the journal's ids; got {short(to)}"
            )
        self._return("rollback", to)

    def _return(self, kind: str, to: int) -> None:
        """Go to the state after an entry, whatever the present one is, and keep that."""
        assert self._directory is not None
        self._directory.check_usable()
        with self._all_or_nothing():
            self._restore_entry(self._directory, to)
            self.keep(kind, to=to)

    def _restore_entry(self, directory: KeptDirectory, to: int) -> None:
        """Restore the state after a journal entry, or learn it again from the nearest one."""
        journal = directory.journal
        known = {**dict(self.recent), journal.position: self._learner.state()}
        found = directory.nearest(to, known)
        if found is None:
            raise ValueError(
                f"{directory.path} has no intact checkpoint of entry {to} or before it; the states "
                f"after entries {directory.exact_ids()} are kept"
            )
        self._learner.restore(found[1])
        path = [i for i in journal.ancestors(to) if i > found[0]]
        for i in reversed(path):
            self._repeat(directory, journal.entries[i], journal.settings_of(i).content)

    def _repeat(self, directory: KeptDirectory, entry: Entry, settings: dict[str, Any]) -> None:
        """Learn an entry of the journal again, and compare."""
        model, where = self._learner.model, str(directory.path)
        if entry.kind in ("edit", "consolidate"):
            hparams = hparams_of(settings["hparams"], model, where)
            if entry.kind == "edit":
                self._learner.learn(as_requests(entry.requests), hparams)
            else:
                self._learner.consolidate(entry.report["num_steps"], hparams)
            if state_hash(self._learner.state()) == entry.state_hash:
                return
        then, now = settings["environment"], environment(model)
        different = [f"{k} {then.get(k)} then, {now[k]} now" for k in now if then.get(k) != now[k]]
        raise ValueError(
            f"entry {entry.id} of {where} ({entry.kind}) could not be learned again bit for bit "
            f"({'; '.join(different) or 'the environment looks the same'}); the states after "
            f"entries {directory.exact_ids()} are kept as checkpoints: roll back to one of them"
        )
