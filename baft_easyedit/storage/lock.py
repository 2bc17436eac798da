"""A lock on a kept directory, so that one process at a time writes to it. POSIX systems only."""

import contextlib
import os
import weakref
from pathlib import Path

from baft_easyedit.files.paths import check_own
from baft_easyedit.files.writing import NEW_FILE

LOCK = "lock"
"""Name of the locked file, which holds the id of the last process that locked it."""


class DirectoryLock:
    """A lock that its process holds until `release`, or until the process ends or is killed.

    Raises:
        BlockingIOError: If another editor holds the lock.
        OSError: If the file system has no locks.
        ValueError: If the lock file is not a regular file.
    """

    def __init__(self, directory: Path) -> None:
        import fcntl

        self._file = directory / LOCK
        self._owner = os.getpid()
        check_own(self._file)
        descriptor = self._descriptor = os.open(self._file, os.O_RDWR | os.O_CREAT, NEW_FILE)
        self._close = weakref.finalize(self, os.close, descriptor)  # unlocks if an editor is lost
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(descriptor, 20).decode("ascii", errors="replace").strip()
            self._close()
            raise BlockingIOError(
                f"{directory} must not be open in another editor; process {owner or 'unknown'} has "
                "it: close that editor, or wait; reading needs no lock"
            ) from None
        except OSError as error:
            self._close()
            raise OSError(
                error.errno,
                f"{directory} must be on a file system with locks, so that one editor at a "
                f"time writes to it; flock says: {error.strerror or error}: keep the edit on a "
                "local disk; to read one needs no lock",
            ) from None
        with contextlib.suppress(OSError):  # only told to others: a full disk can be read
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"{self._owner}\n".encode())

    def check(self) -> None:
        """Raise ValueError unless this process holds the lock, and the lock file is in its place.

        A forked process does not hold the lock. If the directory or the lock file was moved,
        replaced or deleted, another process may have locked the new file of that name.
        """
        directory = self._file.parent
        if not self._close.alive or self._owner != os.getpid():
            raise ValueError(
                f"{directory} must be open in this process to take a change, and is closed: open it"
                " again"
            )
        try:
            is_in_place = os.path.samestat(os.fstat(self._descriptor), os.stat(self._file))
        except OSError:
            is_in_place = False
        if not is_in_place:
            raise ValueError(
                f"{directory} must be what it was when this editor opened it; it or its lock has "
                "been moved, replaced or deleted since: close this editor, and open the directory "
                "again where it is"
            )

    def release(self) -> None:
        """Unlock the directory."""
        if self._close.alive and self._owner == os.getpid():
            import fcntl

            fcntl.flock(self._descriptor, fcntl.LOCK_UN)  # closing does not, while a fork has it
            self._close()
