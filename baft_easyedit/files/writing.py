"""Write files and directories that are there as a whole or not at all, with any new one's mode."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO
from uuid import uuid4

UNFINISHED = ".unfinished-"
"""What the name of a directory has in it, behind a dot and its own, until it is complete."""
TEMPORARY = ".baft-tmp"
"""What the name of a file ends with, behind a dot and its own, until it is complete."""
NEW_FILE = 0o666
"""Mode of a file that is made; the umask takes away from it, as it does for `open`."""


@contextmanager
def written_whole(file: Path) -> Iterator[IO[bytes]]:
    """Open a file that takes its name only when it is complete and on the disk.

    Several may write it: the last one counts.

    Args:
        file: Its directory is made if absent; what it held before stays until then.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    # Not `tempfile`, whose files are for their owner only.
    temporary = file.parent / f".{file.name}.{uuid4().hex}{TEMPORARY}"
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, NEW_FILE)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(descriptor)
        os.replace(temporary, file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sync_directory(directory: Path) -> None:
    """Bring the names in a directory down to the disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def directory_made_whole(directory: Path, num_bytes: int) -> Iterator[Path]:
    """Give an empty directory that takes its name only when this context ends without an error.

    Args:
        directory: Absent or empty; what it lies in is made if absent.
        num_bytes: How much will be written.

    Raises:
        OSError: If the disk has less room, before anything is written.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(directory.parent).free
    if free < num_bytes:
        raise OSError(
            f"{directory} needs {num_bytes / 1e6:,.0f} MB, and {free / 1e6:,.0f} MB are free "
            "there: make room, or choose another disk"
        )
    temporary = directory.parent / f".{directory.name}{UNFINISHED}{uuid4().hex}"
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.iterdir():
            with open(file, "rb+") as stream:  # its content before its name means anything
                os.fsync(stream.fileno())
        if directory.is_dir():
            directory.rmdir()  # it is empty, or this fails
        os.rename(temporary, directory)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
