"""A kept directory, open for writing: commit changes atomically, and recover after a crash.

Two files cannot be replaced at once. So the state file also holds the newest journal entries: one
`os.replace` of it is the commit, and the journal file follows, at once or at the next opening.
"""

import contextlib
import json
import logging
import os
import shutil
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from baft_easyedit.files.paths import check_own, expanded, read_regular
from baft_easyedit.files.writing import TEMPORARY, sync, write_durably, written_whole
from baft_easyedit.storage.config import KeptConfig
from baft_easyedit.storage.journal import REPAIR, Entry, Journal, parse_lines, read_lines
from baft_easyedit.storage.lock import DirectoryLock
from baft_easyedit.storage.reading import (
    CHECKPOINTS,
    CONFIG,
    JOURNAL,
    STATE,
    checkpoint_files,
    holds_edit,
    id_of,
    read_latest,
    read_whole,
    whole_history,
)
from baft_easyedit.storage.state import StateFile, encode, state_hash
from baft_easyedit.training.learner import EditState

logger = logging.getLogger(__name__)


class KeptDirectory:
    """A directory that is locked, so that only this process writes to it, until `close`.

    The arguments and errors are those of `BaFTEditor.open`. A repair goes on by a rollback if the
    journal has the entry of the newest intact state, else with a new journal.
    """

    def __init__(
        self, path: str | os.PathLike[str], checkpoint_every: int = 100, repair: bool = False
    ) -> None:
        if checkpoint_every < 1:
            raise ValueError(f"checkpoint_every must be at least 1; got {checkpoint_every}")
        self.path = expanded(path)
        self.journal = Journal()
        self.latest: StateFile | None = None
        """The content of the state file; None if there is none."""
        self._checkpoint_every = checkpoint_every
        self._size = 0
        """Bytes of the journal file that hold complete, committed lines."""
        self._pending: tuple[Entry, ...] = ()
        """Committed entries that the journal file does not have yet."""
        if not self.path.is_dir():
            self.path.mkdir(parents=True)
            sync(self.path.parent)
        self.lock = DirectoryLock(self.path)
        try:
            self._recover(repair)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Unlock the directory."""
        self.lock.release()

    def commit(
        self, kind: str, state: EditState, config: KeptConfig, content: Mapping[str, Any]
    ) -> None:
        """Write a change to the disk, with what is after it; it outlives a crash once this returns.

        Raises:
            OSError: If the disk did not take the change; the directory is then as before.
            ValueError: If the state is not the one that the journal names, or cannot be kept.
        """
        entry = self.journal.next(kind, state_hash(state), content)
        if entry.to is not None and not self.journal.has_hash(entry.to, entry.state_hash):
            raise ValueError(
                f"the state after entry {entry.to} of {self.path} must have the hash in the "
                "journal, and has not: roll back to an entry with a checkpoint"
            )
        self.commit_all([entry], state, config)

    def commit_all(
        self,
        entries: Sequence[Entry],
        state: EditState,
        config: KeptConfig,
        with_checkpoint: bool = True,
    ) -> None:
        """Write several changes, and the state after the last of them, in one commit.

        A checkpoint is written if it is due and wanted.

        Raises:
            OSError: If the disk did not take the changes; the directory is then as before.
        """
        self.lock.check()
        pending = () if entries[0].id == 0 else self._pending
        content = StateFile(state, (*pending, *entries), config)
        data = encode(content)
        try:
            if with_checkpoint and any(map(self._is_due, entries)):
                self._write_checkpoint(entries[-1].id, data)
            self._write_config(config)
            self._replace_state(data, content)
        except OSError as error:
            raise OSError(
                error.errno,
                f"{self.path} could not take journal entry {entries[-1].id}: "
                f"{error.strerror or error}; the change was undone: free space or make it "
                "writable, then repeat it",
            ) from error
        try:
            sync(self.path)
            self._write_journal()
        except (OSError, ValueError) as error:
            logger.warning(
                "%s holds the change, but %s could not be brought up to date (%s); the next change "
                "or opening does that",
                self.path / STATE,
                JOURNAL,
                error,
            )

    def _is_due(self, entry: Entry) -> bool:
        """Tell whether a checkpoint is due after an entry.

        One is due where the environment changes, as what came before may come out otherwise there.
        """
        if entry.kind == "settings" and len(self.journal):
            last = self.journal.settings_of(len(self.journal) - 1)
            if entry.content["environment"] != last["environment"]:
                return True
        return entry.kind in ("start", "install") or entry.id % self._checkpoint_every == 0

    def ensure_checkpoint(self) -> None:
        """Write a checkpoint if there is none: `save` writes none, and `rollback` needs one."""
        if self.latest is not None and not checkpoint_files(self.path):
            self._write_checkpoint(len(self.journal) - 1, encode(self.latest))

    def nearest(
        self, entry_id: int, state_at: Callable[[int], EditState | None]
    ) -> tuple[int, EditState]:
        """Return the position and state from which the fewest edits lead to an entry's state.

        Of the states that `state_at` returns for positions, those without the journal's hash are
        not used.

        Raises:
            ValueError: If no such state is known or intact.
        """
        files = [f for f in checkpoint_files(self.path) if id_of(f) < len(self.journal)]
        for position in self.journal.ancestors(entry_id):
            state = state_at(position)
            if state is not None and self.journal.has_hash(position, state_hash(state)):
                return position, state
            for file in files:
                if self.journal.position_of(id_of(file)) == position:
                    content = self._read_known(file)
                    if content is not None:
                        return position, content.state
        raise ValueError(
            f"{self.path} has no intact checkpoint of entry {entry_id} or before it; the states "
            f"after entries {self.exact_ids()} are kept"
        )

    def exact_ids(self) -> list[int]:
        """Return the ids of the entries that have an intact checkpoint."""
        return sorted(id_of(f) for f in checkpoint_files(self.path) if self._read_known(f))

    # ---- writing

    def _replace_state(self, data: bytes, content: StateFile) -> None:
        """Replace the state file, which is the commit; update memory even if interrupted then."""
        file, new = self.path / STATE, None
        try:
            with written_whole(file) as stream:
                stream.write(data)
                new = os.fstat(stream.fileno())
                self.lock.check()
        finally:
            if new is not None and file.exists() and os.path.samestat(new, os.stat(file)):
                self._take_note(content)

    def _take_note(self, content: StateFile) -> None:
        """Update the journal in memory after a commit."""
        first = content.entries[0].id
        if first == 0:
            self.journal, self._pending = Journal(), ()
        new = content.entries[len(self.journal) - first :]
        for entry in new:
            self.journal.append(entry)
        self.latest, self._pending = content, (*self._pending, *new)

    def _write_journal(self) -> None:
        """Append the committed entries to the journal file; entry 0 begins a new file."""
        if not self._pending:
            return
        file = self.path / JOURNAL
        data = _text(entry.line for entry in self._pending)
        if self._pending[0].id == 0:
            self._size = 0
            write_durably(file, data)
        else:
            check_own(file)
            with open(file, "r+b") as stream:
                stream.truncate(self._size)  # a line that a crash left incomplete
                stream.seek(self._size)
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
        self._size, self._pending = self._size + len(data), ()

    def _write_config(self, config: KeptConfig) -> None:
        """Write the readable copy of the configuration, unless it is there."""
        text = f"{json.dumps(config.to_json(), indent=2, sort_keys=True)}\n".encode()
        with contextlib.suppress(ValueError, OSError):
            if read_regular(self.path / CONFIG) == text:
                return
        write_durably(self.path / CONFIG, text)

    def _write_checkpoint(self, entry_id: int, data: bytes) -> None:
        """Write the bytes of a state file as the checkpoint of an entry."""
        folder = self.path / CHECKPOINTS
        if not folder.exists():
            folder.mkdir()
            sync(self.path)
        write_durably(folder / f"{entry_id:08d}.safetensors", data)

    # ---- recovery

    def _recover(self, repair: bool) -> None:
        """Read everything, and finish a commit that a crash interrupted."""
        for leftover in (*self.path.glob(f".*{TEMPORARY}"), *self.path.glob(f"*/.*{TEMPORARY}")):
            with contextlib.suppress(OSError):  # a leftover does no harm
                leftover.unlink()
        if not holds_edit(self.path):
            return
        try:
            self._read()
        except ValueError:  # an OSError may pass: it is no damage
            if not repair:
                raise
            self._repair()

    def _read(self) -> None:
        """Read everything; bring the journal file and the copy of the configuration up to date."""
        for name in self._misplaced():
            kind = "folder" if name.name == CHECKPOINTS else "regular file, not a link to one"
            raise ValueError(
                f"{name} must be a {kind}: put a copy of what it should be in its place, or use "
                f"{REPAIR}, which keeps it aside"
            )
        lines, rest = read_lines(self.path / JOURNAL)
        latest = read_latest(self.path)
        whole, last = whole_history(self.path, lines, latest.entries), latest.entries[-1].id
        if len(whole) > last + 1 or (rest and len(lines) == last + 1):
            raise ValueError(
                f"{self.path / JOURNAL} must end with entry {last}, as {STATE} does, and has "
                f"{len(lines)} lines{' and a part of one' if rest else ''}: if an older "
                f"{STATE} was put back, {REPAIR} goes on from it or from the newest checkpoint; "
                "else restore the directory from a backup"
            )
        self.journal = parse_lines(whole, str(self.path / JOURNAL))
        if whole[: len(lines)] == lines:
            self._size, self._pending = len(_text(lines)), (*self.journal.entries[len(lines) :],)
        else:  # another snapshot, whose journal is to be replaced
            self._pending = latest.entries
        self.latest = latest
        self._write_journal()
        self._write_config(latest.config)

    def _repair(self) -> None:
        """Go on from the newest intact state; keep all other files aside."""
        file, state = self.path / JOURNAL, read_whole(self.path / STATE)
        self._read_left(state)
        found = self._newest(state)
        entry = found.entries[-1]
        old = [f for f in checkpoint_files(self.path) if self._read_known(f) is None]
        folder = _keep_aside(self.path, {self.path / STATE, file, *self._misplaced(), *old})
        if self._knows(found):
            data = _text(entry.line for entry in self.journal.entries)
            write_durably(file, data)  # a new file, as a hard link may keep the old one aside
            self._size = len(data)
            self.commit("rollback", found.state, found.config, {"to": entry.id})
        else:
            is_lost = not (folder / JOURNAL).exists()
            why = f"{JOURNAL}, now in {folder.name}, could not be read, or did not lead to it"
            why = f"{JOURNAL} was lost" if is_lost else why
            settings = {"hparams": found.config.hparams, "environment": found.config.versions}
            content = {**settings, "snapshot_of": f"{entry.reference}; {why}"}
            self.journal = Journal()
            self.commit("start", found.state, found.config, content)
        for checkpoint in old:
            if id_of(checkpoint) != len(self.journal) - 1:  # that one was just written anew
                checkpoint.unlink(missing_ok=True)

    def _read_left(self, state: StateFile | None) -> None:
        """Read the journal as far as it is intact, completed by the state."""
        file, lines = self.path / JOURNAL, list[str]()
        with contextlib.suppress(ValueError):
            check_own(file)
            lines, _ = read_lines(file)
            self.journal = parse_lines(lines, str(file))
        if state is not None:
            with contextlib.suppress(ValueError):
                whole = whole_history(self.path, lines, state.entries)
                self.journal = parse_lines(whole, str(file))

    def _misplaced(self) -> list[Path]:
        """Return those of journal, configuration and checkpoint folder that are of a wrong kind."""
        files = (self.path / JOURNAL, self.path / CONFIG)
        found = [f for f in files if os.path.lexists(f) and (f.is_symlink() or not f.is_file())]
        folder = self.path / CHECKPOINTS
        return found + [folder] * (os.path.lexists(folder) and not folder.is_dir())

    def _newest(self, state: StateFile | None) -> StateFile:
        """Return the newer of the intact state and checkpoint; with a journal, of those in it.

        Raises:
            ValueError: If there is no intact state.
        """
        read = self._read_known if len(self.journal) else read_whole
        checkpoint = next(filter(None, map(read, checkpoint_files(self.path))), None)
        found = [c for c in (state, checkpoint) if c is not None]
        if not found:
            raise ValueError(
                f"{self.path} cannot be repaired: neither {STATE} nor a checkpoint is whole; "
                "restore the directory from a backup"
            )
        if all(map(self._knows, found)):
            return max(found, key=lambda content: content.entries[-1].id)
        return max(found, key=lambda content: content.entries[-1].time)  # perhaps two histories

    def _read_known(self, file: Path) -> StateFile | None:
        """Read a state file; None if it is damaged, or its entry is not in the journal."""
        content = read_whole(file)
        return content if content is not None and self._knows(content) else None

    def _knows(self, content: StateFile) -> bool:
        """Tell whether the journal has the entry of a state."""
        entry = content.entries[-1]
        return self.journal.entries[entry.id : entry.id + 1] == [entry]


def _text(lines: Iterable[str]) -> bytes:
    """Return the bytes of a journal file with these lines."""
    return "".join(f"{line}\n" for line in lines).encode()


def _keep_aside(directory: Path, files: Iterable[Path]) -> Path:
    """Keep copies (hard links, where possible) of files in a new folder `before-repair-N`.

    Anything that is not a regular file is moved there, to make room for the regular one.
    """
    folders = (directory / f"before-repair-{n}" for n in count(1))
    folder = next(folder for folder in folders if not os.path.lexists(folder))
    for file in filter(os.path.lexists, files):
        kept = folder / file.relative_to(directory)
        kept.parent.mkdir(parents=True, exist_ok=True)
        if not stat.S_ISREG(os.lstat(file).st_mode):
            os.rename(file, kept)
        else:
            try:
                os.link(file, kept)
            except OSError:  # some file systems have no links
                shutil.copyfile(file, kept)
        sync(kept.parent)
    sync(directory)
    return folder
