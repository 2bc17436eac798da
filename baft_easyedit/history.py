"""History: each change of an edit happens wholly or not at all, and can be gone back to.

The latest states are in memory. Once a directory is open, every change is in it, too, before it
counts; states that are no longer in memory come from its checkpoints, and what lies between two of
them is learned again.
"""

import os
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from baft_easyedit.hparams import BaFTHyperParams
from baft_easyedit.keeping.config import KeptConfig, environment, hparams_of, method_of
from baft_easyedit.keeping.directory import KeptDirectory
from baft_easyedit.keeping.journal import Entry, Journal, report_dict
from baft_easyedit.keeping.state import state_hash
from baft_easyedit.learner import EditState, Learner
from baft_easyedit.learning import EditReport
from baft_easyedit.requests import EditRequest, as_requests

_NOTHING_TO_UNDO = "there is no edit to undo: edit() was not called, or undo_depth is used up"


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

    @property
    def journal(self) -> Journal | None:
        """The journal of the directory that is open, or was."""
        return None if self._directory is None else self._directory.journal

    def config(self) -> KeptConfig:
        """Describe the edit as it is kept: its method, model, and versions."""
        config = self.origin or KeptConfig.of(self._learner.model, self.hparams)
        return config.with_settings(self.hparams)

    # ---- the directory

    def open(self, directory: KeptDirectory) -> None:
        """Keep all changes from now on; the present state is the latest of the directory."""
        self._directory = directory
        self._keep_settings()
        directory.ensure_checkpoint()

    def close(self) -> None:
        """Let others open the directory, if one is open."""
        if self._directory is not None:
            self._directory.close()

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write the present state, and the journal that led to it, into a directory."""
        own = self._directory
        if own is not None and os.path.isdir(directory) and os.path.samefile(own.path, directory):
            own.check_usable()
            self._check_untouched(own)  # all else is there already
            return
        state = self._learner.state()
        present = None if own is None else own.present(state)
        if own is None or present is None:
            entries = [Journal().next("start", state_hash(state), self._settings())]
        else:
            entries, state = own.journal.entries, present
        target = KeptDirectory(directory)
        try:
            target.take_over(entries, state, self.config())
        finally:
            target.close()

    def _settings(self) -> dict[str, Any]:
        """Return what learning depends on beside the state and the requests."""
        model = self._learner.model
        return {"hparams": method_of(self.hparams), "environment": environment(model)}

    def _keep_settings(self) -> None:
        """Note in the journal how edits are learned from now on, unless it says so already."""
        if self._directory is None:
            return
        journal, settings = self._directory.journal, self._settings()
        if len(journal) and journal.settings_of(len(journal) - 1).content == settings:
            return
        self.origin = self.config()
        kind = "settings" if len(journal) else "start"
        self._directory.commit(kind, self._learner.state(), self.origin, settings)

    def _check_untouched(self, directory: KeptDirectory) -> None:
        """Raise ValueError if the edit is not as the directory keeps it."""
        if directory.present(self._learner.state()) is None:
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
            with self._learner.lock.changing():
                self._directory.check_usable()
                self._check_untouched(self._directory)
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
        """Commit a change to the open directory, if there is one."""
        if self._directory is None:
            return
        content: dict[str, Any] = {"to": to}
        if report is not None:
            content = {
                "requests": [request.to_dict() for request in requests],
                "report": report_dict(report),
            }
        self._directory.commit(kind, self._learner.state(), self.config(), content)

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """Go back if anything goes wrong before the change is kept."""
        with self._taken_back() as before:
            journal = self.journal
            position = 0 if journal is None else journal.position
            yield
            self.recent.append((position, before))

    @contextmanager
    def _taken_back(self) -> Iterator[EditState]:
        """Change the state alone; an error before the change is kept takes it back."""
        journal, recent = self.journal, list(self.recent)
        size = 0 if journal is None else len(journal)

        def is_kept() -> bool:
            return journal is not None and len(journal) > size

        try:
            with self._learner.alone(is_kept) as before:
                yield before
        except BaseException:
            if not is_kept():
                self.recent.clear()
                self.recent.extend(recent)
            raise

    # ---- going back

    def undo(self) -> None:
        """Go back to before the latest change."""
        if self.journal is None:
            with self._taken_back():
                if not self.recent:
                    raise ValueError(_NOTHING_TO_UNDO)
                self._learner.restore(self.recent[-1][1])
                self.recent.pop()
            return
        with self._learner.lock.changing():
            parent = self.journal.entries[self.journal.position].parent
            if parent is None:  # that of entry 0
                raise ValueError(_NOTHING_TO_UNDO)
            self._return("undo", parent)

    def rollback(self, to: int) -> None:
        """Go to the state after an entry of the journal."""
        journal = self.journal
        if journal is None:
            raise ValueError(
                "rollback needs the journal of a directory, and none is open: use "
                "BaFTEditor.open(), or undo()"
            )
        if not 0 <= to < len(journal):
            raise ValueError(f"to must be in [0, {len(journal) - 1}], the journal's ids; got {to}")
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
