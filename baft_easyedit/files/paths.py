"""Files that users name: `~` stands for their home, and only a regular file is opened.

To open a FIFO waits for whoever writes to it, a device can go on for ever, and both can stand where
a file was expected.
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
    """Return a path as an absolute one, with the home directory for `~`."""
    return Path(os.path.expanduser(path)).absolute()


def check_regular(file: str | os.PathLike[str]) -> None:
    """Raise ValueError unless a name is that of a regular file or of a link to one.

    Raises:
        FileNotFoundError: If there is nothing of that name.
    """
    _check(os.stat(file), file)


def check_own(file: str | os.PathLike[str]) -> None:
    """Raise ValueError unless a name, which is written to, is that of a regular file, or free."""
    if os.path.lexists(file):
        _check(os.lstat(file), file)


@contextmanager
def open_regular(file: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Open a regular file, or a link to one, for reading.

    Raises:
        ValueError: If it is something else.
        OSError: If it cannot be read; it names the file, also if reading fails later.
    """
    check_regular(file)
    with open(file, "rb") as stream:
        try:
            yield stream
        except OSError as error:
            error.filename = error.filename or str(file)
            raise


def read_regular(file: str | os.PathLike[str], most: int = MAX_FILE) -> bytes:
    """Return the content of a regular file.

    Raises:
        ValueError: If it is something else, or has more than `most` bytes, or more than it says, as
            those of `/proc` do.
        OSError: If it cannot be read.
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
        ValueError: If it is not UTF-8.
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
