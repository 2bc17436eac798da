"""One writer at a time: a lock on a kept directory."""

import contextlib
import os
from pathlib import Path
from types import ModuleType

from baft_easyedit.files.paths import open_own, read_regular

LOCK = "lock"
"""Name of a file that is locked, too, and says which process it was."""


def _fcntl() -> ModuleType | None:
    """Return the standard module, where the platform has it."""
    try:
        import fcntl
    except ImportError:
        return None
    return fcntl


class DirectoryLock:
    """A lock that its process holds until `release`, or until it ends, however it ends.

    What is locked is the directory itself, and a file in it: names can go, and another file of the
    same name is not locked. Where only the file can be locked, as on NFS, `problem` tells when it
    is another one.

    Where there is no `fcntl`, the lock is a file that exists and is open, which Windows therefore
    lets nobody delete or move; one that a crash left behind has to be deleted by hand, as the
    message says.

    Args:
        directory: An existing directory, absolute.

    Raises:
        BlockingIOError: If another editor holds the lock.
        OSError: If the file system has no locks.
        ValueError: If something else stands in the place of the file.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._file = directory / LOCK
        self._fcntl = _fcntl()
        self._owner = os.getpid()
        self._held: dict[Path, int] = {}
        """Descriptors of what is open, by its names."""
        self._must_stay = {self._file}
        """Names that must not come to mean anything else."""
        try:
            self._acquire()
        except BaseException:
            self._close()
            raise

    def __del__(self) -> None:
        self._close()  # a lost editor's lock goes with it

    def _acquire(self) -> None:
        """Open and lock all that can be."""
        flags = os.O_RDWR | os.O_CREAT | (0 if self._fcntl else os.O_EXCL)
        try:
            self._held[self._file] = open_own(self._file, flags)
        except FileExistsError:
            raise BlockingIOError(self._refusal(f"delete {self._file} if it is not")) from None
        if self._fcntl is not None:
            self._held[self._directory] = os.open(self._directory, os.O_RDONLY)
            self._lock_with(self._fcntl)
        os.ftruncate(self._held[self._file], 0)
        os.write(self._held[self._file], f"{self._owner}\n".encode())

    def _lock_with(self, fcntl: ModuleType) -> None:
        """Lock the directory and the file, or one of them where the other cannot be."""
        failures: dict[Path, OSError] = {}
        for path in (self._directory, self._file):
            try:
                fcntl.flock(self._held[path], fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                remedy = "close that editor, or wait; reading needs no lock"
                raise BlockingIOError(self._refusal(remedy)) from None
            except OSError as failure:
                failures[path] = failure
        self._must_stay = {self._directory, *({self._file} if self._directory in failures else ())}
        if len(failures) == 2:
            error = failures[self._file]
            raise OSError(
                error.errno,
                f"{self._directory} must be on a file system with locks, so that one editor at a "
                f"time writes to it; flock says: {error.strerror or error}: keep the edit on a "
                "local disk, and save() it there",
            )

    @property
    def is_held(self) -> bool:
        """Whether this process holds the lock; a fork of it does not."""
        return bool(self._held) and self._owner == os.getpid()

    def problem(self) -> str | None:
        """Return what has been moved, replaced or deleted since; None if nothing has."""
        return next((str(path) for path in self._must_stay if not self._is_there(path)), None)

    def _is_there(self, path: Path) -> bool:
        """Tell whether a name still means what is open."""
        try:
            return os.path.samestat(os.fstat(self._held[path]), os.stat(path))
        except OSError:
            return False

    def release(self) -> None:
        """Let others have the directory."""
        if not self.is_held:
            return
        is_mine = self._fcntl is None and self.problem() is None
        if self._fcntl is not None:  # a fork may have them open, too
            for descriptor in self._held.values():
                with contextlib.suppress(OSError):  # one of them may not have been locked
                    self._fcntl.flock(descriptor, self._fcntl.LOCK_UN)
        self._close()
        if is_mine:
            self._file.unlink(missing_ok=True)

    def _close(self) -> None:
        """Close what is open."""
        while self._held:
            os.close(self._held.popitem()[1])

    def _refusal(self, remedy: str) -> str:
        """Say who holds the lock."""
        try:
            owner = read_regular(self._file, 20).decode("ascii", errors="replace").strip()
        except (OSError, ValueError):
            owner = ""
        return (
            f"{self._directory} must not be open in another editor; process {owner or 'unknown'} "
            f"has it: {remedy}"
        )
