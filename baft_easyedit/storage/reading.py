"""Read a kept directory without its lock: the latest state, the history, the checkpoints."""

import contextlib
import logging
import os
from collections.abc import Container, Sequence
from pathlib import Path

from baft_easyedit.files.paths import expanded
from baft_easyedit.storage.journal import REPAIR, Entry, parse_lines, read_lines
from baft_easyedit.storage.state import StateFile, read_state

logger = logging.getLogger(__name__)

STATE = "baft.safetensors"
CONFIG = "baft_config.json"
JOURNAL = "journal.jsonl"
CHECKPOINTS = "checkpoints"


def holds_edit(path: str | os.PathLike[str]) -> bool:
    """Tell whether a directory keeps an edit, intact or damaged."""
    directory = expanded(path)
    is_begun = any(os.path.lexists(directory / name) for name in (STATE, JOURNAL))
    return is_begun or any(map(id_of, checkpoint_files(directory)))


def read_latest(path: Path) -> StateFile:
    """Read the state of a kept directory.

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
                f"begun there, for it has no {STATE}: open() with hparams begins, or "
                "`baft-easyedit apply`"
            ) from None
        problem = f"{path / STATE} is lost"
    except ValueError as error:
        problem = str(error)
    file = next(filter(read_whole, checkpoint_files(path)), None)
    if file is None:
        raise ValueError(
            f"{problem}; there is no intact checkpoint: restore the directory from a backup"
        )
    raise ValueError(
        f"{problem}; {REPAIR} goes on from {file}, the state after entry "
        f"{id_of(file)}, and rollback(to=...) can then learn the edits after it again"
    )


def read_to_use(path: Path) -> StateFile:
    """Read the state of a kept directory, as `read_latest`; warn if an older one was put back."""
    state = read_latest(path)
    with contextlib.suppress(ValueError, OSError):
        last = len(read_lines(path / JOURNAL)[0]) - 1
        # Another process may have made a change in between: its state is there before its line.
        if last > state.entries[-1].id == read_state(path / STATE).entries[-1].id:
            logger.warning(
                "%s is the state after entry %d, and the journal goes on to entry %d: an older "
                "file was put back; %s goes on from the newest state that is there",
                *(path / STATE, state.entries[-1].id, last, REPAIR),
            )
    return state


def read_whole(file: Path) -> StateFile | None:
    """Read a state file; None if it is damaged or absent."""
    try:
        return read_state(file)
    except (ValueError, FileNotFoundError):
        return None


def read_history(path: str | os.PathLike[str]) -> list[Entry]:
    """Read the journal of a kept directory, even if the state file is damaged.

    Raises:
        FileNotFoundError: If the directory keeps no edit.
        ValueError: If the journal is damaged.
    """
    directory = expanded(path)
    if not holds_edit(directory):
        read_latest(directory)
    state = read_whole(directory / STATE)  # first: a commit in between only adds journal lines
    lines, _ = read_lines(directory / JOURNAL)
    if state is not None:
        lines = whole_history(directory, lines, state.entries)
    if not lines:
        read_latest(directory)  # nothing is left of the journal
    return parse_lines(lines, str(directory / JOURNAL)).entries


def whole_history(path: Path, lines: list[str], entries: Sequence[Entry]) -> list[str]:
    """Return the complete lines of a journal file, completed by the entries of the state file.

    Raises:
        ValueError: If the two files are not of one history.
    """
    first, own = entries[0].id, [entry.line for entry in entries]
    if first == 0 and len(lines) <= 1:  # the state begins a history, or replaces a snapshot
        return own
    if len(lines) < first or lines[first:][: len(own)] != own[: len(lines) - first]:
        raise ValueError(
            f"{path / JOURNAL} and {STATE} must tell one history, and do not: restore one of them "
            f"from a backup, or use {REPAIR}"
        )
    return [*lines[:first], *own, *lines[first + len(own) :]]


def lacking(
    path: Path, kept: list[Entry], entries: list[Entry], replaceable: Container[str] | None
) -> list[Entry]:
    """Return what a save must write of a journal: its missing end; all, to replace a snapshot.

    The directory holds `kept`, and should hold `entries`; `replaceable` are the lines of entry 0
    of snapshots that may be replaced, None for any.

    Raises:
        ValueError: If the directory holds another journal that may not be replaced.
    """
    if kept == entries[: len(kept)]:
        return entries[len(kept) :]
    rule = f"{path} must be new, or an earlier save of this edit; it holds"
    if len(kept) > 1:
        raise ValueError(
            f"{rule} another edit with a history of {len(kept)} entries: choose another directory"
        )
    if replaceable is not None and kept[0].line not in replaceable:
        raise ValueError(
            f"{rule} a snapshot of another edit: choose another directory, or replace it by "
            "overwrite=True, on the command line --overwrite"
        )
    return entries


def check_target(
    target: str | os.PathLike[str], source: str | os.PathLike[str], overwrite: bool
) -> None:
    """Raise ValueError if `target` could not take a save of an edit that continues `source`."""
    if holds_edit(target):
        entries: list[Entry] = []
        with contextlib.suppress(ValueError):  # with a damaged journal, `save` writes a snapshot
            entries = read_history(source)
        lacking(expanded(target), read_history(target), entries, None if overwrite else ())


def checkpoint_files(path: Path) -> list[Path]:
    """Return the checkpoint files of a directory, the newest first."""
    files = (path / CHECKPOINTS).glob("*.safetensors")
    return sorted((file for file in files if file.stem.isdecimal()), reverse=True)


def id_of(checkpoint: Path) -> int:
    """Return the id of the entry whose state a checkpoint file holds."""
    return int(checkpoint.stem)
