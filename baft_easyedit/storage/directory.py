"""A kept directory: commit each change before it counts, and recover what a crash interrupted."""

import contextlib
import json
import os
import stat
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

from baft_easyedit.files.paths import check_own, expanded, read_regular
from baft_easyedit.storage.config import KeptConfig
from baft_easyedit.storage.files import (
    append_durably,
    keep_aside,
    parse_object,
    remove_temporaries,
    set_aside,
    sync_directory,
    temporary_of,
    truncate_durably,
    write_durably,
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
        """The content of the state file when it was opened; None if there was none."""
        self._checkpoint_every = checkpoint_every
        self._is_sound = True
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
        if not self._is_sound:
            raise ValueError(
                f"{self.path} could not be brought back after a failure: close this editor and open"
                " it again"
            )
        self._check_place()

    def _check_place(self) -> None:
        """Raise ValueError if a path now leads to what is not of this directory."""
        check_own(self.path / JOURNAL)
        problem = self._lock.problem()
        if problem is not None:
            raise ValueError(
                f"{problem} must be what it was when this editor opened {self.path}; it has been "
                "moved, replaced or deleted since: close this editor, and open the directory again "
                "where it is"
            )

    def commit(
        self, kind: str, state: EditState, config: KeptConfig, content: Mapping[str, Any]
    ) -> None:
        """Write a change; once this returns, it outlives a crash.

        Args:
            kind: One of `journal.KINDS`.
            state: The state after it.
            config: What belongs to it.
            content: What the entry holds beside; see `Entry.content`.

        Raises:
            OSError: If it could not be written; the directory is as before then.
            ValueError: If the state is not what the journal says it is, or cannot be kept.
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
        """Write a whole journal and its state, in one commit.

        Args:
            entries: The journal.
            state: The state after it.
            config: What belongs to it.
            replaceable: Lines of snapshots that may be replaced; None for any.

        Raises:
            ValueError: If the directory holds another journal that may not be replaced.
        """
        missing = lacking(self.path, self.journal.entries, entries, replaceable)
        if missing:
            self._write(missing, state, config)

    def ensure_checkpoint(self) -> None:
        """Write a checkpoint of the present state if there is none at all, as after `save`."""
        if self.latest is not None and not self._checkpoint_ids():
            self._write_checkpoint(
                len(self.journal) - 1, read_regular(self.path / STATE, MAX_STATE)
            )

    def nearest(
        self, entry_id: int, known: Mapping[int, EditState]
    ) -> tuple[int, EditState] | None:
        """Find the nearest exact state from which an entry grew, or its own.

        Args:
            entry_id: The entry.
            known: States in memory, by their positions; those that were changed do not count.

        Returns:
            The state and its position; None if there is none.
        """
        checkpoints: dict[int, list[int]] = {}
        for i in self._checkpoint_ids():
            if i < len(self.journal):
                checkpoints.setdefault(self.journal.position_of(i), []).append(i)
        for position in self.journal.ancestors(entry_id):
            if position in known and is_after(known[position], self.journal, position):
                return position, known[position]
            for i in checkpoints.get(position, ()):
                content = self._read_checkpoint(i)
                if content is not None:
                    return position, content.state
        return None

    def exact_ids(self) -> list[int]:
        """Return the entries whose states are kept as intact checkpoints."""
        return sorted(i for i in self._checkpoint_ids() if self._read_checkpoint(i) is not None)

    # ---- writing

    def _write(
        self,
        entries: Sequence[Entry],
        state: EditState,
        config: KeptConfig,
        has_checkpoint: bool = False,
    ) -> None:
        """Commit entries and the state after the last of them, or change nothing."""
        data = encode(StateFile(state, tuple(entries), config))
        try:
            if has_checkpoint:
                self._write_checkpoint(entries[-1].id, data)
            if self.latest is None or config != self.latest.config:
                self._write_config(config)
            self._replace(data, entries)
        except OSError as error:
            if not self._is_sound:
                remedy = "it may hold it all the same: close this editor and open it again to see"
            else:
                remedy = "the change was undone: free space or make it writable, then repeat it"
            raise OSError(
                error.errno,
                f"{self.path} could not take journal entry {entries[-1].id}: "
                f"{error.strerror or error}; {remedy}",
            ) from error
        self.latest = StateFile(state, tuple(entries), config)
        if entries[0].id == 0:
            self.journal = Journal()
        for entry in entries:
            self.journal.append(entry)
        self._is_sound = True  # until here, an interruption leaves it to the next open
        self._tidy()

    def _tidy(self) -> None:
        """Remove temporary files, unless they are those of another directory."""
        if self._lock.problem() is None:
            remove_temporaries(self.path)

    def _replace(self, data: bytes, entries: Sequence[Entry]) -> None:
        """Replace the state file, which commits, and append to the journal; or do neither."""
        file, journal = self.path / STATE, self.path / JOURNAL
        try:
            before = set_aside(file), set_aside(journal)
            length = journal.stat().st_size if journal.exists() else 0
            write_temporary(file, data)
            self._check_place()
            self._is_sound = False
            os.replace(temporary_of(file), file)
            sync_directory(self.path)
            self._write_journal(entries)
        except BaseException:
            if not self._is_sound and not temporary_of(file).exists():  # it has been replaced
                _put_back(journal, before[1])
                if before[1] is not None:
                    truncate_durably(journal, length)
                _put_back(file, before[0])
                sync_directory(self.path)
            self._is_sound = True
            self._tidy()
            raise

    def _write_journal(self, entries: Sequence[Entry]) -> None:
        """Bring committed entries into the journal file; entry 0 begins it anew."""
        data = "".join(f"{entry.line}\n" for entry in entries).encode("ascii")
        if entries[0].id == 0:
            write_durably(self.path / JOURNAL, data)
        else:
            append_durably(self.path / JOURNAL, data)

    def _write_config(self, config: KeptConfig) -> None:
        """Write the copy of the configuration that people read."""
        text = json.dumps(config.to_json(), indent=2, sort_keys=True) + "\n"
        write_durably(self.path / CONFIG, text.encode())

    def _write_checkpoint(self, entry_id: int, data: bytes) -> None:
        """Keep the bytes of a state file."""
        folder = self.path / CHECKPOINTS
        if not folder.exists():
            folder.mkdir()
            sync_directory(self.path)
        write_durably(folder / f"{entry_id:08d}.safetensors", data)

    # ---- reading

    def _checkpoint_ids(self) -> list[int]:
        """Return the entries that have checkpoint files, the newest first."""
        return [int(file.stem) for file in _checkpoint_files(self.path)]

    def _read_checkpoint(self, entry_id: int) -> StateFile | None:
        """Read a checkpoint; None if it is damaged, or of an entry that was never completed."""
        return self._read_known(self.path / CHECKPOINTS / f"{entry_id:08d}.safetensors")

    def _read_known(self, file: Path) -> StateFile | None:
        """Read a state file; None if it is damaged, or not of an entry of the journal."""
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
        if (self.path / CHECKPOINTS).is_dir():
            remove_temporaries(self.path / CHECKPOINTS)
        if not holds_edit(self.path):
            return
        try:
            self._check_misplaced()
            lines, rest = read_lines(self.path / JOURNAL)
            latest = read_latest(self.path)
            missing = _missing_entries(lines, rest, latest.entries, self.path)
            known = [] if missing and missing[0].id == 0 else lines
            whole = [*known, *(entry.line for entry in missing)]
            self.journal = parse_lines(whole, str(self.path / JOURNAL))
        except (ValueError, OSError):
            if not repair:
                raise
            self._repair()
            return
        if rest:
            truncate_durably(self.path / JOURNAL, _size(lines))
        if missing:
            self._write_journal(missing)
        if not _holds(self.path / CONFIG, latest.config):
            self._write_config(latest.config)
        self.latest = latest

    def _repair(self) -> None:
        """Go on from the newest state that is whole; lose nothing of the rest."""
        journal, state = self.path / JOURNAL, self.path / STATE
        lines: list[str] = []
        rest = ""
        with contextlib.suppress(ValueError, OSError):
            check_own(journal)
            lines, rest = read_lines(journal)
            self.journal = parse_lines(lines, str(journal))
        found = self._newest()
        if found is None:
            raise ValueError(
                f"{self.path} cannot be repaired: neither {STATE} nor a checkpoint is whole; "
                "restore the directory from a backup"
            )
        is_known = self._knows(found)
        aside = [file for file in _checkpoint_files(self.path) if self._read_known(file) is None]
        others = {state, *self._misplaced(), *([journal] if rest or not is_known else [])}
        folder = keep_aside(self.path, [*aside, *others])
        entry = found.entries[-1]
        if is_known:
            if rest:  # a new file, for the old one is kept
                write_durably(journal, "".join(f"{line}\n" for line in lines).encode())
            self.commit("rollback", found.state, found.config, {"to": entry.id})
        else:
            why = f"{JOURNAL}, now in {folder.name}, could not be read, or did not lead to it"
            settings = {"hparams": found.config.hparams, "environment": found.config.versions}
            content = {**settings, "snapshot_of": f"{entry.reference}; {why}"}
            self.journal = Journal()
            self.commit("start", found.state, found.config, content)
        for file in aside:
            if int(file.stem) != len(self.journal) - 1:  # else it is a new one
                file.unlink(missing_ok=True)

    def _misplaced(self) -> list[Path]:
        """Return what stands where this directory has files, or a folder, of its own."""
        files = [self.path / name for name in (JOURNAL, CONFIG)]
        found = [f for f in files if os.path.lexists(f) and (f.is_symlink() or not f.is_file())]
        folder = self.path / CHECKPOINTS
        return found + [folder] * (os.path.lexists(folder) and not folder.is_dir())

    def _check_misplaced(self) -> None:
        """Raise ValueError if there is such a thing."""
        for name in self._misplaced():
            kind = "folder" if name.name == CHECKPOINTS else "regular file, not a link to one"
            raise ValueError(
                f"{name} must be a {kind}: put a copy of what it should be in its place, or open() "
                "with repair=True, which keeps it aside"
            )

    def _newest(self) -> StateFile | None:
        """Return the newest whole state; of the checkpoints, one that a sound journal knows."""
        read = self._read_known if len(self.journal) else _read_whole
        checkpoints = (read(file) for file in _checkpoint_files(self.path))
        found = [_read_whole(self.path / STATE), next(filter(None, checkpoints), None)]
        return max(filter(None, found), key=lambda c: c.entries[-1].time, default=None)


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
        or (os.path.lexists(directory / JOURNAL) and not _is_empty(directory / JOURNAL))
        or any(int(file.stem) for file in _checkpoint_files(directory))
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
    entries: tuple[Entry, ...] = ()
    with contextlib.suppress(ValueError, OSError):
        entries = read_entries(directory / STATE)  # first: a commit may come between
    lines, _ = read_lines(directory / JOURNAL)
    if entries and entries[0].id == 0 and len(lines) <= 1:
        lines = []
    for entry in entries:
        if lines[entry.id : entry.id + 1] != [entry.line] and entry.id < len(lines):
            raise ValueError(f"line {entry.id + 1} of {directory / JOURNAL} is damaged")
    lines += [entry.line for entry in entries if entry.id >= len(lines)]
    return parse_lines(lines, str(directory / JOURNAL)).entries


def _missing_entries(
    lines: Sequence[str], rest: str, entries: Sequence[Entry], path: Path
) -> Sequence[Entry]:
    """Return the entries of a state that its journal does not have yet.

    Args:
        lines: The complete lines of the journal.
        rest: What follows them: an incomplete line.
        entries: Those that the state was written with.
        path: The directory.

    Raises:
        ValueError: If the state and the journal are not of one history.
    """
    first, last = entries[0].id, entries[-1].id
    own = [entry.line for entry in entries]
    is_replaced = first == 0 and len(lines) <= 1 and lines[:1] != own[: len(lines)]
    if is_replaced:
        return entries
    done = len(lines) - first
    agrees = done >= 0 and list(lines[first : last + 1]) == own[:done]
    if not agrees or len(lines) > last + 1 or (rest and len(lines) == last + 1):
        raise ValueError(
            f"{path / JOURNAL} must end with entry {last}, as {STATE} does, and has "
            f"{len(lines)} lines{' and a part of one' if rest else ''}: if an older {STATE} was put"
            " back, open() with repair=True goes on from it or from the newest checkpoint; else "
            "restore the directory from a backup"
        )
    return entries[done:]


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


def _is_empty(file: Path) -> bool:
    """Tell whether a name is that of a regular file without content."""
    found = os.lstat(file)
    return stat.S_ISREG(found.st_mode) and found.st_size == 0


def _size(lines: Sequence[str]) -> int:
    """Return the bytes of complete lines in a journal."""
    return sum(len(line) + 1 for line in lines)


def _put_back(file: Path, aside: Path | None) -> None:
    """Undo a replacement."""
    if aside is None:
        file.unlink(missing_ok=True)
    else:
        os.replace(aside, file)
