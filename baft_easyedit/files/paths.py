"""Paths that users name: `~` is expanded to the home directory, and only regular files are opened.

Opening a FIFO would wait until another process writes to it, and reading a device may never end.
"""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

MAX_FILE = 2**29
"""Most bytes of a file that is read as a whole."""
_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFLNK: "a symbolic link, through which nothing is written: put a copy in its place",
}


def expanded(path: str | os.PathLike[str]) -> Path:
    """Return an absolute path, with the home directory in place of `~`; ValueError if empty."""
    if not os.fspath(path):
        raise ValueError("a path must not be empty: name a file or directory, '.' for this one")
    return Path(os.path.expanduser(path)).absolute()


def check_own(file: str | os.PathLike[str]) -> None:
    """Raise ValueError unless a path to write to is a regular file, not a link, or is free."""
    if os.path.lexists(file):
        _check(os.lstat(file), file)


@contextmanager
def open_regular(file: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Open a regular file, or a link to one, for reading.

    Raises:
        ValueError: If the path is something else.
        OSError: If the file cannot be read; the error names it, also if reading fails later.
    """
    _check(os.stat(file) if os.path.exists(file) else os.lstat(file), file)  # links may loop
    with open(file, "rb") as stream:
        try:
            yield stream
        except OSError as error:
            error.filename = error.filename or str(file)
            raise


def read_regular(file: str | os.PathLike[str], most: int = MAX_FILE) -> bytes:
    """Return the content of a regular file.

    Raises:
        ValueError: If the path is something else, or the file has more than `most` bytes, or has
            not as many as its size says, as in `/proc`.
        OSError: If the file cannot be read.
    """
    with open_regular(file) as stream:
        size = os.fstat(stream.fileno()).st_size
        if size > most:
            raise ValueError(f"{file} must have at most {most:,} bytes; it has {size:,}")
        content = stream.read(size + 1)
    if len(content) != size:
        raise ValueError(f"{file} must have the {size:,} bytes that it says; it has others")
    return content


def read_text(file: str | os.PathLike[str]) -> str:
    """Return the text of a regular file; errors are those of `read_regular`.

    Raises:
        ValueError: If the content is not UTF-8.
    """
    try:
        return read_regular(file).decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} must be UTF-8 text, and is not: {error}") from None


def _check(found: os.stat_result, file: str | os.PathLike[str]) -> None:
    """Raise ValueError unless what was found is a regular file."""
    if not stat.S_ISREG(found.st_mode):
        kind = _KINDS.get(stat.S_IFMT(found.st_mode), "something else")
        raise ValueError(f"{file} must be a regular file; it is {kind}")
