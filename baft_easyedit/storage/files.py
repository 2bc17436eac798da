"""Write files that survive a crash, and JSON as a kept directory has it."""

import contextlib
import json
import os
import shutil
import stat
from collections.abc import Iterable
from itertools import count
from pathlib import Path
from typing import Any

from baft_easyedit.files.messages import cut
from baft_easyedit.files.paths import open_own
from baft_easyedit.files.reading import parse_json

_TEMPORARY = ".baft-tmp"


def temporary_of(file: Path) -> Path:
    """Return where `write_temporary` writes."""
    return file.parent / f".{file.name}{_TEMPORARY}"


def write_temporary(file: Path, data: bytes) -> Path:
    """Write `data` beside `file`, down to the disk; return where, for `os.replace`."""
    temporary = temporary_of(file)
    temporary.unlink(missing_ok=True)  # what is there may be a link to a file of others
    descriptor = open_own(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    with os.fdopen(descriptor, "wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    return temporary


def write_durably(file: Path, data: bytes) -> None:
    """Write a file so that it is there as a whole or not at all, whatever happens."""
    os.replace(write_temporary(file, data), file)
    sync_directory(file.parent)


def write_tail(file: Path, size: int, data: bytes) -> None:
    """Let `data` follow the first `size` bytes of a file that exists, down to the disk."""
    with os.fdopen(open_own(file, os.O_RDWR), "r+b") as stream:
        stream.truncate(size)
        stream.seek(size)
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def keep_aside(directory: Path, files: Iterable[Path]) -> Path:
    """Keep files under their names in a new folder, so that they outlive a replacement.

    What is not a regular file is moved there, and makes way.

    Args:
        directory: Where the folder is made, if there is something to keep.
        files: Names in that directory; those that do not exist are passed over.

    Returns:
        The folder, `before-repair-1` or the next that is free.
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
        sync_directory(kept.parent)
    sync_directory(directory)
    return folder


def remove_temporaries(directory: Path) -> None:
    """Remove what interrupted writes left behind."""
    for leftover in directory.glob(f".*{_TEMPORARY}"):
        with contextlib.suppress(OSError):  # only untidy
            leftover.unlink()


def sync_directory(directory: Path) -> None:
    """Bring the names in a directory down to the disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def to_json(value: Any) -> str:
    """Return a value as one line of ASCII, the same for equal values.

    Raises:
        ValueError: If it is not JSON: NaN, an infinity, a key or value of another type, a cycle.
    """
    try:
        return json.dumps(value, allow_nan=False, separators=(",", ":"), sort_keys=True)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"what is kept must be JSON; {cut(error, 500)}") from None


def parse_object(text: bytes | str, where: str) -> dict[str, Any]:
    """Read a JSON object that somebody else wrote.

    Raises:
        ValueError: If it is not JSON (NaN and infinities are not), too deep, or not an object.
    """
    value = parse_json(text, where, is_strict=True)
    if not isinstance(value, dict):
        raise ValueError(f"{where} must be a JSON object; got {type(value).__name__}")
    return value
