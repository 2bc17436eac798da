"""Write files and directories atomically: under their names they are complete or absent.

Each is written under a temporary name, then renamed. Modes are those of any new file or directory.
"""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO
from uuid import uuid4

UNFINISHED = ".unfinished-"
"""Part of the temporary name of a directory: a dot, the directory's name, this, random digits."""
TEMPORARY = ".baft-tmp"
"""End of the temporary name of a file: a dot, the file's name, random digits, this."""
NEW_FILE = 0o666
"""Mode of new files before the umask, as for `open`."""


@contextmanager
def written_whole(file: Path) -> Iterator[IO[bytes]]:
    """Open a file for writing that gets its name only when it is complete and on the disk.

    Until then the old content stays. If several processes write the file, the last one wins. Its
    directory is made if absent.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    # Not by `tempfile`, whose files only their owner can read.
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


def write_durably(file: Path, data: bytes) -> None:
    """Write a file to the disk atomically: after a crash it is there as a whole or not at all."""
    with written_whole(file) as stream:
        stream.write(data)
    sync(file.parent)


def sync(path: Path) -> None:
    """Flush a file, or the new and replaced names in a directory, to the disk.

    Some network file systems cannot flush directories; nothing happens there.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


@contextmanager
def directory_made_whole(directory: Path, num_bytes: int) -> Iterator[Path]:
    """Yield an empty directory that gets its name only when this context ends without an error.

    The final directory must be absent or empty; its parent is made if absent.

    Raises:
        OSError: If the disk has less room than `num_bytes`; nothing has been written then.
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
        for path in (*temporary.rglob("*"), temporary):
            sync(path)  # the content must be on the disk before the rename
        if directory.is_dir():
            directory.rmdir()  # raises if it is not empty
        os.rename(temporary, directory)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync(directory.parent)
