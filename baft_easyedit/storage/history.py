"""The history of an edit: every change is made as a whole or not at all, and can be undone.

A `History` keeps the states before the latest changes in memory. While a directory is open, each
change is also committed to it before the call returns. How older states come back says
`storage.relearning`, and how one edit of many is taken out `storage.forgetting`.

Several editors, each with a history, can change one model. An undo may only take back the model's
latest change. So each history keeps a hash of the state that its change led to, and
`ModelEdit.latest_change` names the latest change by anyone.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from baft_easyedit.files.messages import cut, short
from baft_easyedit.hparams import BaFTHyperParams
from baft_easyedit.model.edit import Author, Change
from baft_easyedit.model.hooks import attached_edit
from baft_easyedit.storage.config import KeptConfig, environment, hparams_of, method_of, versions
from baft_easyedit.storage.directory import KeptDirectory
from baft_easyedit.storage.fingerprint import Fingerprint
from baft_easyedit.storage.forgetting import Forgetting
from baft_easyedit.storage.journal import Entry, Journal
from baft_easyedit.storage.loading import check_same_shape
from baft_easyedit.storage.reading import lacking, read_history
from baft_easyedit.storage.relearning import restore_entry
from baft_easyedit.storage.state import StateFile, present, state_hash
from baft_easyedit.training.learner import EditState, Learner
from baft_easyedit.training.loop import EditReport
from baft_easyedit.training.requests import EditRequest

_CHANGED = "changed by other means than its editor since"


class Step(NamedTuple):
    """A change, and what is needed to undo it."""

    position: int
    """The journal's position before the change; 0 without a journal."""
    before: EditState
    """The state before the change."""
    previous: Change | None
    """The edit's `latest_change` before the change."""
    after: str | None
    """Hash of the state after the change; None with a directory, whose journal has the hash."""


class History:
    """Makes, keeps and undoes the changes of one edit; `undo_depth` states are kept in memory."""

    def __init__(self, learner: Learner, hparams: BaFTHyperParams, undo_depth: int) -> None:
        self.hparams = hparams
        """Hyper-parameters of the next edits; may be replaced."""
        self.origin: KeptConfig | None = None
        """The configuration that a kept edit came with; None for an edit begun on this model."""
        self.recent: deque[Step] = deque(maxlen=undo_depth)
        """The latest changes that this history made."""
        self._author = Author("another editor")
        self._learner = learner
        self._directory: KeptDirectory | None = None
        self._journal: Journal | None = None
        """The journal of a loaded edit, in memory; None for a new edit."""
        self._snapshot_of = "an edit that was in memory only"
        """Without a journal, `save` writes a snapshot, whose entry 0 says this of its origin."""
        self._starts: set[str] = set()
        """The lines of entry 0 of earlier saves, which `save` may replace by newer snapshots."""

    @property
    def journal(self) -> Journal | None:
        """The journal of the directory, open or closed since; else that of a loaded edit."""
        return self._journal if self._directory is None else self._directory.journal

    def config(self) -> KeptConfig:
        """Return the configuration to keep with the edit: its method, model, and versions."""
        config = self.origin or KeptConfig.of(self._learner.model, self.hparams)
        return replace(config, hparams=self._method(), versions=versions())

    def _method(self) -> dict[str, Any]:
        """Return the hyper-parameters to keep; ValueError if invalid, or not those of the edit."""
        method = method_of(self.hparams)
        read = hparams_of(method, self._learner.model, "this editor")
        check_same_shape(self._learner.edit, read, "this edit")
        return method

    # ---- the directory

    def go_on(self, kept: StateFile, directory: Path) -> None:
        """Continue a loaded edit in memory, with its journal if that is intact."""
        last, entries = kept.entries[-1], []
        if self._is_on_another_model(last):
            return
        with suppress(ValueError, OSError):
            entries = read_history(directory)[: last.id + 1]
        if entries[last.id :] == [last]:
            self._journal = Journal(entries)
            self._starts.add(entries[0].line)
        else:
            self._end_journal(last, "the journal before it could not be read")

    def _is_on_another_model(self, last: Entry) -> bool:
        """Tell whether the model is not that of a loaded edit; then it is an edit of this one."""
        origin = self.origin
        if origin is None or not origin.fingerprint.difference(Fingerprint.of(self._learner.model)):
            return False
        self.origin = None
        self._end_journal(last, f"learned on another model, {origin.base_model}")
        return True

    def _end_journal(self, last: Entry, why: str) -> None:
        """Drop the journal, as the present state does not follow from its last entry."""
        self._journal = None
        self._snapshot_of = f"{last.reference}; {why}"

    def open(self, directory: KeptDirectory) -> None:
        """Commit all later changes to a directory, whose latest state is the present one."""
        self._directory = directory
        self._author = Author(f"the editor of {directory.path}")
        self._keep_settings()
        directory.ensure_checkpoint()

    def close(self) -> None:
        """Unlock the directory, if one is open."""
        if self._directory is not None:
            self._directory.close()

    def save(self, path: Path, overwrite: bool) -> None:
        """Write the present state, and the journal that led to it, into a directory."""
        own = self._directory
        if own is not None and path.exists() and own.path.exists() and path.samefile(own.path):
            self._check_as_kept(own)
            self._keep_settings()  # the directory has every other change already
            return
        entries, state = self._to_save()
        config, replaceable = self.config(), None if overwrite else self._starts
        with closing(KeptDirectory(path)) as target:
            missing = lacking(target.path, target.journal.entries, entries, replaceable)
            if missing or target.latest is None or config != target.latest.config:
                target.commit_all(missing or entries[-1:], state, config, with_checkpoint=False)
        self._starts.add(entries[0].line)

    def _to_save(self) -> tuple[list[Entry], EditState]:
        """Return the entries that led to the state, or a snapshot's only entry; and the state."""
        state, journal, snapshot_of = self._learner.state(), self.journal, self._snapshot_of
        if journal is not None:
            as_kept = present(state, journal)
            if as_kept is not None:
                return journal.entries, as_kept
            snapshot_of = f"{journal.entries[-1].reference}; {_CHANGED}"
        content = {**self._settings(), "snapshot_of": snapshot_of}
        return [Journal().next("start", state_hash(state), content)], state

    def _settings(self) -> dict[str, Any]:
        """Return what the result of an edit depends on beside the state and the requests."""
        return {"hparams": self._method(), "environment": environment(self._learner.model)}

    def _keep_settings(self) -> None:
        """Add an entry with the settings if they have changed."""
        journal, settings = self.journal, self._settings()
        if journal is not None and not journal.ends_with(settings):
            self.origin = self.config()
            self.commit("settings" if len(journal) else "start", settings)

    def commit(self, kind: str, content: Mapping[str, Any]) -> None:
        """Add the change that led to the present state to the journal, if there is one."""
        state = self._learner.state()
        if self._directory is not None:
            self._directory.commit(kind, state, self.config(), content)
        elif self._journal is not None:
            self._journal.add(kind, state_hash(state), content)

    # ---- whether the present state is this history's

    def _check_as_kept(self, directory: KeptDirectory) -> None:
        """Raise ValueError if the directory is closed, or its latest state is not the edit's."""
        directory.lock.check()
        self._check_present(
            present(self._learner.state(), directory.journal) is not None,
            f"the edit must be as {directory.path} keeps it",
            f"call rollback(to={directory.journal.position}) first, or save() it elsewhere",
        )

    def _check_can_learn(self, directory: KeptDirectory) -> None:
        """Raise ValueError if the edit is not as kept, or the model's weights changed since."""
        self._check_as_kept(directory)
        self.config().check_model(self._learner.model, str(directory.path))

    def _check_present(self, is_as_left: bool, rule: str, remedy: str = "") -> None:
        """Raise ValueError by a rule, and name the latest change, unless this history made it."""
        is_other = attached_edit(self._learner.model) not in (None, self._learner.edit)
        if is_as_left and not is_other:
            return
        problem = self._others_change() or "it was changed by other means than this editor"
        off = "undo that first, or take it off: attached_edit(model).detach()"
        raise ValueError(f"{rule}, but {problem}: {off if is_other else remedy}")

    def _others_change(self) -> str:
        """Describe the latest change of the model if another editor made it; "" if not."""
        own = self._learner.edit
        edit = attached_edit(self._learner.model) or own
        latest = edit.latest_change
        if latest is None:
            return "" if edit is own else "the model carries another edit, attached by other means"
        return "" if latest.by is self._author else f"the latest change of the model is {latest}"

    def _values(self) -> str:
        """Return the hash of the learned state, the same whether the edit is attached or not."""
        return state_hash(self._learner.state()._replace(attached=True))

    # ---- changes

    @contextmanager
    def change(self, kind: str, requests: Sequence[EditRequest] = ()) -> Iterator[None]:
        """Make a change in this context, which must call `commit`; an error before undoes it."""
        with self._learner.lock.changing():
            journal = self._journal
            if self._directory is not None:
                self._check_can_learn(self._directory)
            elif (
                journal is not None
                and not self._is_on_another_model(journal.entries[-1])
                and present(self._learner.state(), journal) is None
            ):
                self._end_journal(journal.entries[-1], _CHANGED)
            self._keep_settings()
        about = f" of {cut(repr(requests[0].prompt), 82)}" if requests else ""
        more = f" and {len(requests) - 1} more" if len(requests) > 1 else ""
        with self._noted(f"the {kind}{about}{more}"):
            yield

    @contextmanager
    def _noted(self, what: str) -> Iterator[None]:
        """Make a change that `undo` can take back; restore the state if the change fails."""
        with self._taken_back() as before:
            position = 0 if self.journal is None else self.journal.position
            yield
            edit, after = self._learner.edit, None if self._directory else self._values()
            self.recent.append(Step(position, before, edit.latest_change, after))
            edit.latest_change = Change(what, self._author)

    @contextmanager
    def _taken_back(self) -> Iterator[EditState]:
        """Lock the model during a change; an error before the change is kept restores the state."""
        recent, edit = self.recent.copy(), self._learner.edit
        size, latest = len(self.journal or ()), edit.latest_change

        def is_kept() -> bool:
            return len(self.journal or ()) > size

        try:
            with self._learner.alone(is_kept) as before:
                yield before
        except BaseException:
            if not is_kept():
                self.recent, edit.latest_change = recent, latest
            raise

    # ---- going back

    def undo(self) -> None:
        """Go back to before the latest change."""
        directory = self._directory
        if directory is None:  # nothing may follow: an interrupt there would come too late
            return self._undo_in_memory()
        with self._learner.lock.changing():
            parent = directory.journal.entries[directory.journal.position].parent
            if parent is None:
                self._refuse_undo("the state is that of entry 0")
            self._check_as_kept(directory)
            self._return(directory, "undo", parent)

    def _undo_in_memory(self) -> None:
        """Take back the latest change of this history, which must be the model's latest."""
        with self._taken_back():  # outermost: an interrupt on the way out takes the undo back
            if not self.recent:
                self._refuse_undo("edit() was not called, or undo_depth is used up")
            step = self.recent[-1]
            self._check_present(
                step.after == self._values(),
                "an undo must take back the latest change of the model",
                "undo that first, with its editor or the weights_copy of its EasyEdit call; or "
                "take the whole edit off: attached_edit(model).detach()",
            )
            self._learner.restore(step.before)
            self._learner.edit.latest_change = step.previous
            if self._journal is not None:
                if self._journal.has_hash(step.position, state_hash(step.before)):
                    self.commit("undo", {"to": step.position})
                else:
                    self._end_journal(self._journal.entries[-1], _CHANGED)
            self.recent.pop()

    def _refuse_undo(self, why: str) -> NoReturn:
        """Raise ValueError as no change is left to undo; name another editor's latest change."""
        nothing = f"there is no edit to undo: {why}"
        raise ValueError("; ".join(filter(None, (nothing, self._others_change()))))

    def rollback(self, to: int) -> None:
        """Go to the state after an entry of the journal."""
        directory = self._open_directory("rollback")
        if not 0 <= to < len(directory.journal):
            ids = f"[0, {len(directory.journal) - 1}], the journal's ids"
            raise ValueError(f"to must be in {ids}; got {short(to)}")
        self._return(directory, "rollback", to)

    def forget(self, prompt: str, tell: Callable[[EditReport], object]) -> list[EditReport]:
        """Go back to before the first edit of a prompt, and make the later edits again."""
        directory = self._open_directory("forget")
        with self._learner.lock.changing():
            self._check_can_learn(directory)
            forgetting = Forgetting(self._learner, directory, prompt)
            with self._noted(f"the forgetting of {cut(repr(prompt), 82)}"):
                entries, reports = forgetting.run(self._known(), tell)
                directory.commit_all(entries, self._learner.state(), self.config())
        return reports

    def _known(self) -> dict[int, EditState]:
        """Return the states before the latest changes, by the journal's positions."""
        return {step.position: step.before for step in self.recent}

    def _open_directory(self, action: str) -> KeptDirectory:
        """Return the open directory; raise ValueError if there is none."""
        if self._directory is None:
            raise ValueError(
                f"{action} needs the journal of a directory, and none is open: use "
                "BaFTEditor.open(), or undo()"
            )
        return self._directory

    def _return(self, directory: KeptDirectory, kind: str, to: int) -> None:
        """Go to the state after an entry from any other state, and commit that as a change."""
        directory.lock.check()
        self._check_present(True, f"the model must carry no edit but that of {directory.path}")
        with self._noted(f"the {kind} to entry {to}"):
            restore_entry(self._learner, directory, to, self._known())
            self.commit(kind, {"to": to})
