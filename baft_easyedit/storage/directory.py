"""A kept directory: commit each change before it counts, and recover what a crash interrupted.

The state file tells all: its metadata hold the journal entries that the journal file may not have
yet. One `os.replace` of it is the commit; the journal file follows, now or at the next opening.
"""

import contextlib
import json
import logging
import os
import stat
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

from baft_easyedit.files.paths import check_own, expanded, read_regular
from baft_easyedit.storage.config import KeptConfig
from baft_easyedit.storage.files import (
    keep_aside,
    parse_object,
    remove_temporaries,
    sync_directory,
    write_durably,
    write_tail,
    write_temporary,
)
from baft_easyedit.storage.journal import Entry, Journal, parse_lines, read_lines
from baft_easyedit.storage.lock import DirectoryLock
from baft_easyedit.storage.state import (
    MAX_STATE,
    StateFile,
    encode,
    is_after,
    read_entries,
    read_state,
    state_hash,
)
from baft_easyedit.training.learner import EditState

logger = logging.getLogger(__name__)

STATE = "baft.safetensors"
CONFIG = "baft_config.json"
JOURNAL = "journal.jsonl"
CHECKPOINTS = "checkpoints"


class KeptDirectory:
    """A directory that this process alone writes to, until `close`.

    Args:
        path: The directory; made if there is none.
        checkpoint_every: Entries between two checkpoints, at least 1.
        repair: If its files are damaged, lost, or disagree, go on from the newest state that is
            whole: by a rollback if the journal knows it, else with a new journal. What cannot be
            read, or no longer belongs, is kept in a folder `before-repair-N`.

    Raises:
        BlockingIOError: If another editor has it open.
        OSError: If it cannot be locked or written.
        ValueError: If its files are damaged or disagree; the message says what to do.
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
            sync_directory(self.path.parent)
        self._lock = DirectoryLock(self.path)
        try:
            self._recover(repair)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let others have the directory."""
        self._lock.release()

    def is_at(self, path: Path) -> bool:
        """Tell whether a path leads to where this directory is."""
        try:
            return os.path.samefile(self.path, path)
        except OSError:  # one of them is nowhere
            return False

    def check_usable(self) -> None:
        """Raise ValueError if changes can no longer be committed."""
        if not self._lock.is_held:
            raise ValueError(
                f"{self.path} must be open in this process to take a change, and is closed: open it"
                " again"
            )
        check_own(self.path / JOURNAL)
        if not self._lock.is_in_place:
            raise ValueError(
                f"{self.path} must be what it was when this editor opened it; it or its lock has "
                "been moved, replaced or deleted since: close this editor, and open the directory "
                "again where it is"
            )

    def commit(
        self, kind: str, state: EditState, config: KeptConfig, content: Mapping[str, Any]
    ) -> None:
        """Write a change, which outlives a crash once this returns.

        Args:
            kind: One of `journal.KINDS`.
            state: The state after it.
            config: What belongs to it.
            content: What the entry holds beside; see `Entry.content`.

        Raises:
            OSError: If the disk did not take it; the directory is as before then.
            ValueError: If the state is not what the journal says, or cannot be kept.
        """
        self.check_usable()
        entry = self.journal.next(kind, state_hash(state), content)
        if entry.to is not None and not is_after(state, self.journal, entry.to):
            raise ValueError(
                f"the state after entry {entry.to} of {self.path} must have the hash in the "
                "journal, and has not: roll back to an entry with a checkpoint"
            )
        has_checkpoint = kind in ("start", "install") or entry.id % self._checkpoint_every == 0
        self._write([entry], state, config, has_checkpoint)

    def take_over(
        self,
        entries: Sequence[Entry],
        state: EditState,
        config: KeptConfig,
        replaceable: Container[str] | None = (),
    ) -> None:
        """Write a whole journal and its state, in one commit; see `lacking`."""
        missing = lacking(self.path, self.journal.entries, entries, replaceable)
        if missing:
            self._write(missing, state, config)

    def ensure_checkpoint(self) -> None:
        """Write a checkpoint of the present state if there is none at all, as after `save`."""
        if self.latest is not None and not _checkpoint_files(self.path):
            data = read_regular(self.path / STATE, MAX_STATE)
            self._write_checkpoint(len(self.journal) - 1, data)

    def nearest(
        self, entry_id: int, known: Mapping[int, EditState]
    ) -> tuple[int, EditState] | None:
        """Find the nearest exact state from which an entry grew, or its own, and its position.

        Args:
            entry_id: The entry.
            known: States in memory, by their positions; those that were changed do not count.
        """
        ids = [i for i in map(_id_of, _checkpoint_files(self.path)) if i < len(self.journal)]
        for position in self.journal.ancestors(entry_id):
            if position in known and is_after(known[position], self.journal, position):
                return position, known[position]
            for i in ids:
                if self.journal.position_of(i) == position:
                    content = self._read_known(_checkpoint_file(self.path, i))
                    if content is not None:
                        return position, content.state
        return None

    def exact_ids(self) -> list[int]:
        """Return the entries whose states are kept as intact checkpoints."""
        return sorted(_id_of(f) for f in _checkpoint_files(self.path) if self._read_known(f))

    # ---- writing

    def _write(
        self,
        entries: Sequence[Entry],
        state: EditState,
        config: KeptConfig,
        has_checkpoint: bool = False,
    ) -> None:
        """Commit entries and the state after the last of them, or change nothing."""
        is_anew = entries[0].id == 0
        content = StateFile(state, (*(() if is_anew else self._pending), *entries), config)
        data = encode(content)
        try:
            if has_checkpoint:
                self._write_checkpoint(entries[-1].id, data)
            if self.latest is None or config != self.latest.config:
                self._write_config(config)
            self._replace_state(data, content)
        except OSError as error:
            raise OSError(
                error.errno,
                f"{self.path} could not take journal entry {entries[-1].id}: "
                f"{error.strerror or error}; the change was undone: free space or make it "
                "writable, then repeat it",
            ) from error
        finally:
            if self._lock.is_in_place:  # else the temporary files are those of another directory
                remove_temporaries(self.path)
        try:
            sync_directory(self.path)
            self._write_journal()
        except (OSError, ValueError) as error:
            logger.warning(
                "%s holds the change, but %s could not be brought up to date (%s); the next change "
                "or opening does that",
                self.path / STATE,
                JOURNAL,
                error,
            )

    def _replace_state(self, data: bytes, content: StateFile) -> None:
        """Replace the state file, which commits; take note of it, whatever interrupts."""
        temporary = write_temporary(self.path / STATE, data)
        self.check_usable()
        try:
            os.replace(temporary, self.path / STATE)
        finally:
            if not temporary.exists():
                self._take_note(content)

    def _take_note(self, content: StateFile) -> None:
        """Follow a commit in memory."""
        first = content.entries[0].id
        if first == 0:
            self.journal = Journal()
        for entry in content.entries[len(self.journal) - first :]:
            self.journal.append(entry)
        self.latest, self._pending = content, content.entries

    def _write_journal(self) -> None:
        """Bring committed entries into the journal file; entry 0 begins it anew."""
        if not self._pending:
            return
        data = "".join(f"{entry.line}\n" for entry in self._pending).encode("ascii")
        if self._pending[0].id == 0:
            write_durably(self.path / JOURNAL, data)
            self._size, self._pending = len(data), ()
        else:
            write_tail(self.path / JOURNAL, self._size, data)
            self._size, self._pending = self._size + len(data), ()

    def _write_config(self, config: KeptConfig) -> None:
        """Write the copy of the configuration that people read."""
        text = json.dumps(config.to_json(), indent=2, sort_keys=True) + "\n"
        write_durably(self.path / CONFIG, text.encode())

    def _write_checkpoint(self, entry_id: int, data: bytes) -> None:
        """Keep the bytes of a state file."""
        file = _checkpoint_file(self.path, entry_id)
        if not file.parent.exists():
            file.parent.mkdir()
            sync_directory(self.path)
        write_durably(file, data)

    # ---- reading

    def _read_known(self, file: Path) -> StateFile | None:
        """Read a state file; None if it is damaged, or its entry was never completed."""
        content = _read_whole(file)
        return content if content is not None and self._knows(content) else None

    def _knows(self, content: StateFile) -> bool:
        """Tell whether a state is of an entry of the journal."""
        entry = content.entries[-1]
        is_known = [entry.line] == [e.line for e in self.journal.entries[entry.id : entry.id + 1]]
        if is_known and content.is_converted:
            self.journal.note_hash(entry.id, state_hash(content.state))
        return is_known

    # ---- recovery

    def _recover(self, repair: bool) -> None:
        """Read everything, and finish what a crash interrupted."""
        remove_temporaries(self.path)
        remove_temporaries(self.path / CHECKPOINTS)
        if not holds_edit(self.path):
            return
        try:
            _check_misplaced(self.path)
            lines, rest = read_lines(self.path / JOURNAL)
            latest = read_latest(self.path)
            whole = _whole_history(lines, latest.entries)
            last = latest.entries[-1].id
            if whole is None or len(whole) > last + 1 or (rest and len(lines) == last + 1):
                raise ValueError(
                    f"{self.path / JOURNAL} must end with entry {last}, as {STATE} does, and has "
                    f"{len(lines)} lines{' and a part of one' if rest else ''}: if an older "
                    f"{STATE} was put back, open() with repair=True goes on from it or from the "
                    "newest checkpoint; else restore the directory from a backup"
                )
            self.journal = parse_lines(whole, str(self.path / JOURNAL))
        except (ValueError, OSError):
            if not repair:
                raise
            self._repair()
            return
        if whole[: len(lines)] == lines:
            self._size, self._pending = _size(lines), tuple(self.journal.entries[len(lines) :])
        else:  # another snapshot, whose journal is to be replaced
            self._pending = latest.entries
        self.latest = latest
        self._write_journal()
        if not _holds(self.path / CONFIG, latest.config):
            self._write_config(latest.config)

    def _repair(self) -> None:
        """Go on from the newest state that is whole; lose nothing of the rest."""
        file = self.path / JOURNAL
        lines: list[str] = []
        rest = ""
        with contextlib.suppress(ValueError, OSError):
            check_own(file)
            lines, rest = read_lines(file)
            self.journal = parse_lines(lines, str(file))
        found = self._newest()
        if found is None:
            raise ValueError(
                f"{self.path} cannot be repaired: neither {STATE} nor a checkpoint is whole; "
                "restore the directory from a backup"
            )
        is_known, entry = self._knows(found), found.entries[-1]
        old = [f for f in _checkpoint_files(self.path) if self._read_known(f) is None]
        aside = {self.path / STATE, *_misplaced(self.path), *old}
        folder = keep_aside(self.path, aside if is_known and not rest else {*aside, file})
        if is_known:
            self._size = _size(lines)
            if rest:  # a new file, for the old one is kept
                write_durably(file, "".join(f"{line}\n" for line in lines).encode())
            self.commit("rollback", found.state, found.config, {"to": entry.id})
        else:
            why = f"{JOURNAL}, now in {folder.name}, could not be read, or did not lead to it"
            settings = {"hparams": found.config.hparams, "environment": found.config.versions}
            content = {**settings, "snapshot_of": f"{entry.reference}; {why}"}
            self.journal = Journal()
            self.commit("start", found.state, found.config, content)
        for checkpoint in old:
            if _id_of(checkpoint) != len(self.journal) - 1:  # else it is a new one
                checkpoint.unlink(missing_ok=True)

    def _newest(self) -> StateFile | None:
        """Return the newest whole state; of the checkpoints, one that a sound journal knows."""
        read = self._read_known if len(self.journal) else _read_whole
        checkpoints = (read(file) for file in _checkpoint_files(self.path))
        found = [_read_whole(self.path / STATE), next(filter(None, checkpoints), None)]
        return max(filter(None, found), key=lambda c: c.entries[-1].time, default=None)


def _misplaced(path: Path) -> list[Path]:
    """Return what stands where a directory has files, or a folder, of its own."""
    files = [path / name for name in (JOURNAL, CONFIG)]
    found = [f for f in files if os.path.lexists(f) and (f.is_symlink() or not f.is_file())]
    folder = path / CHECKPOINTS
    return found + [folder] * (os.path.lexists(folder) and not folder.is_dir())


def _check_misplaced(path: Path) -> None:
    """Raise ValueError if there is such a thing."""
    for name in _misplaced(path):
        kind = "folder" if name.name == CHECKPOINTS else "regular file, not a link to one"
        raise ValueError(
            f"{name} must be a {kind}: put a copy of what it should be in its place, or open() "
            "with repair=True, which keeps it aside"
        )


def lacking(
    path: Path,
    kept: Sequence[Entry],
    entries: Sequence[Entry],
    replaceable: Container[str] | None,
) -> Sequence[Entry]:
    """Return what a directory lacks of a journal: the rest of it, or all if it is replaced.

    Args:
        path: The directory.
        kept: Its own journal.
        entries: The journal that is to be there.
        replaceable: Lines of snapshots that may be replaced; None for any.

    Raises:
        ValueError: If it holds another journal that may not be replaced.
    """
    own, lines = ([entry.line for entry in journal] for journal in (kept, entries))
    if own == lines[: len(own)]:
        return entries[len(own) :]
    rule = f"{path} must be new, or an earlier save of this edit; it holds"
    if len(own) > 1:
        raise ValueError(
            f"{rule} another edit with a history of {len(own)} entries: choose another directory"
        )
    if replaceable is not None and own[0] not in replaceable:
        raise ValueError(
            f"{rule} a snapshot of another edit: choose another directory, or replace it by "
            "overwrite=True, on the command line --overwrite"
        )
    return entries


def check_target(
    target: str | os.PathLike[str], source: str | os.PathLike[str], overwrite: bool
) -> None:
    """Raise ValueError if an edit that begins with a kept one could not be saved in a directory."""
    if holds_edit(target):
        entries: list[Entry] = []
        with contextlib.suppress(ValueError):  # it is saved as a snapshot then
            entries = read_history(source)
        lacking(expanded(target), read_history(target), entries, None if overwrite else ())


def read_latest(path: Path) -> StateFile:
    """Read the state of a kept directory; this needs no lock.

    Raises:
        FileNotFoundError: If there is no such directory, or it keeps no edit.
        ValueError: If the state is damaged or lost; the message tells how to go on.
    """
    try:
        return read_state(path / STATE)
    except FileNotFoundError:
        if not holds_edit(path):
            raise FileNotFoundError(
                f"{path} must be a directory with an edit that save() or open() kept; nothing was "
                f"begun there, for it has no {STATE}: open() with hparams begins"
            ) from None
        problem = f"{path / STATE} is lost"
    except (ValueError, OSError) as error:
        problem = str(error)
    raise ValueError(f"{problem}; {_way_on(path)}")


def holds_edit(path: str | os.PathLike[str]) -> bool:
    """Tell whether an edit was begun in a directory, be it whole or damaged now."""
    directory = expanded(path)
    return (
        os.path.lexists(directory / STATE)
        or _has_content(directory / JOURNAL)
        or any(map(_id_of, _checkpoint_files(directory)))
    )


def read_history(path: str | os.PathLike[str]) -> list[Entry]:
    """Read the journal of a kept directory; this needs no lock, and no intact state.

    Raises:
        FileNotFoundError: If the directory keeps no edit.
        ValueError: If the journal is damaged.
    """
    directory = expanded(path)
    if not holds_edit(directory):
        read_latest(directory)
    whole: list[str] | None
    try:
        entries = read_entries(directory / STATE)  # first: a commit may come between
        lines, _ = read_lines(directory / JOURNAL)
        whole = _whole_history(lines, entries)
    except (ValueError, OSError):
        whole, _ = read_lines(directory / JOURNAL)
    if whole is None:
        raise ValueError(f"{directory / JOURNAL} and {STATE} must tell one history, and do not")
    return parse_lines(whole, str(directory / JOURNAL)).entries


def _whole_history(lines: Sequence[str], entries: Sequence[Entry]) -> list[str] | None:
    """Return the lines of a journal file, and those of a state file that it lacks.

    Args:
        lines: The complete lines of the journal file.
        entries: Those that the state was written with.

    Returns:
        All lines; None if the two are not of one history.
    """
    first, own = entries[0].id, [entry.line for entry in entries]
    if first == 0 and len(lines) <= 1:  # the state begins a history, or replaces a snapshot
        return own
    if len(lines) < first or list(lines[first:])[: len(own)] != own[: len(lines) - first]:
        return None
    return [*lines[:first], *own, *lines[first + len(own) :]]


def _way_on(path: Path) -> str:
    """Say how to go on from the newest intact checkpoint."""
    for file in _checkpoint_files(path):
        with contextlib.suppress(ValueError, OSError):
            entry = read_state(file).entries[-1]
            return (
                f"open() with repair=True goes on from {file}, the state after entry {entry.id}, "
                "and rollback(to=...) can then learn the edits after it again"
            )
    return "there is no intact checkpoint: restore the directory from a backup"


def _checkpoint_files(path: Path) -> list[Path]:
    """Return the checkpoint files of a directory, the newest first."""
    files = (path / CHECKPOINTS).glob("*.safetensors")
    return sorted((file for file in files if file.stem.isdecimal()), reverse=True)


def _checkpoint_file(path: Path, entry_id: int) -> Path:
    """Return where the state after an entry is kept."""
    return path / CHECKPOINTS / f"{entry_id:08d}.safetensors"


def _id_of(checkpoint: Path) -> int:
    """Return the entry whose state is in a checkpoint file."""
    return int(checkpoint.stem)


def _holds(file: Path, config: KeptConfig) -> bool:
    """Tell whether a configuration file is a true copy."""
    try:
        return bool(parse_object(read_regular(file), str(file)) == config.to_json())
    except (OSError, ValueError):
        return False


def _read_whole(file: Path) -> StateFile | None:
    """Read a state file; None if it is damaged."""
    try:
        return read_state(file)
    except (ValueError, OSError):
        return None


def _has_content(file: Path) -> bool:
    """Tell whether there is anything of a name but an empty file."""
    if not os.path.lexists(file):
        return False
    found = os.lstat(file)
    return found.st_size > 0 or not stat.S_ISREG(found.st_mode)


def _size(lines: Sequence[str]) -> int:
    """Return the bytes of complete lines in a journal."""
    return sum(len(line) + 1 for line in lines)
