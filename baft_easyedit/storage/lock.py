"""One writer at a time: a lock on a kept directory, for POSIX systems."""

import os
from pathlib import Path

from baft_easyedit.files.paths import open_own, read_regular

LOCK = "lock"
"""Name of the file that is locked; it holds the id of the process that locked it last."""


class DirectoryLock:
    """A lock that its process holds until `release`, or until it ends, however it ends.

    A file in the directory is locked. Where the directory or the file is moved, replaced or
    deleted, others may lock another file of that name; `is_in_place` tells the first owner.

    Args:
        directory: An existing directory, absolute.

    Raises:
        BlockingIOError: If another editor holds the lock.
        OSError: If the file system has no locks.
        ValueError: If something else stands in the place of the file.
    """

    def __init__(self, directory: Path) -> None:
        self._file = directory / LOCK
        self._owner = os.getpid()
        self._descriptor: int | None = None
        self._descriptor = open_own(self._file, os.O_RDWR | os.O_CREAT)
        try:
            self._acquire(self._descriptor)
        except BaseException:
            self._close()
            raise

    def __del__(self) -> None:
        self._close()  # a lost editor's lock goes with it

    def _acquire(self, descriptor: int) -> None:
        """Lock the file, and write into it who has it."""
        import fcntl

        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = read_regular(self._file).decode("ascii", errors="replace").strip()
            raise BlockingIOError(
                f"{self._file.parent} must not be open in another editor; process "
                f"{owner[:20] or 'unknown'} has it: close that editor, or wait; reading needs no "
                "lock"
            ) from None
        except OSError as error:
            raise OSError(
                error.errno,
                f"{self._file.parent} must be on a file system with locks, so that one editor at a "
                f"time writes to it; flock says: {error.strerror or error}: keep the edit on a "
                "local disk, and save() it there",
            ) from None
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{self._owner}\n".encode())

    @property
    def is_held(self) -> bool:
        """Whether this process holds the lock; a fork of it does not."""
        return self._descriptor is not None and self._owner == os.getpid()

    @property
    def is_in_place(self) -> bool:
        """Whether the file's name still means the locked file."""
        try:
            return self._descriptor is not None and os.path.samestat(
                os.fstat(self._descriptor), os.stat(self._file)
            )
        except OSError:
            return False

    def release(self) -> None:
        """Let others have the directory."""
        if self.is_held and self._descriptor is not None:
            import fcntl

            fcntl.flock(self._descriptor, fcntl.LOCK_UN)  # a fork may have it open, too
            self._close()

    def _close(self) -> None:
        """Close the file."""
        if self._descriptor is not None:
            descriptor, self._descriptor = self._descriptor, None
            os.close(descriptor)
