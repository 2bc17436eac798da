"""One writer at a time: a lock on a kept directory."""

import os
from pathlib import Path
from types import ModuleType
from typing import BinaryIO

from baft_easyedit.writing import NEW_FILE

LOCK = "lock"
"""Name of the locked file."""


def _fcntl() -> ModuleType | None:
    """Return the standard module, where the platform has it."""
    try:
        import fcntl
    except ImportError:
        return None
    return fcntl


class DirectoryLock:
    """A lock that its process holds until `release`, or until it ends, however it ends.

    Where there is no `fcntl`, the lock is a file that exists; one that a crash left behind has to
    be deleted by hand, as the message says.

    Args:
        directory: An existing directory.

    Raises:
        BlockingIOError: If another editor holds the lock.
    """

    def __init__(self, directory: Path) -> None:
        self._file = directory / LOCK
        self._fcntl = _fcntl()
        self._owner = os.getpid()
        self._stream: BinaryIO | None = None
        flags = os.O_RDWR | os.O_CREAT
        try:
            descriptor = os.open(self._file, flags if self._fcntl else flags | os.O_EXCL, NEW_FILE)
        except FileExistsError:
            raise BlockingIOError(self._refusal(f"delete {self._file} if it is not")) from None
        stream = os.fdopen(descriptor, "r+b")  # a lost editor's lock goes with it
        try:
            if self._fcntl is not None:
                self._fcntl.flock(stream, self._fcntl.LOCK_EX | self._fcntl.LOCK_NB)
            stream.truncate(0)
            stream.write(f"{self._owner}\n".encode())
            stream.flush()
        except BlockingIOError:
            stream.close()
            raise BlockingIOError(
                self._refusal("close that editor, or wait; reading needs no lock")
            ) from None
        except BaseException:
            stream.close()
            raise
        self._stream = stream

    @property
    def is_held(self) -> bool:
        """Whether this process holds the lock; a fork of it does not."""
        return self._stream is not None and self._owner == os.getpid()

    def release(self) -> None:
        """Let others have the directory."""
        if self._stream is None or not self.is_held:
            return
        if self._fcntl is None:
            self._file.unlink(missing_ok=True)
        else:
            self._fcntl.flock(self._stream, self._fcntl.LOCK_UN)
        self._stream.close()
        self._stream = None

    def _refusal(self, remedy: str) -> str:
        """Say who holds the lock."""
        try:
            owner = self._file.read_text(encoding="ascii", errors="replace")[:20].strip()
        except OSError:
            owner = ""
        return (
            f"{self._file.parent} must not be open in another editor; process {owner or 'unknown'} "
            f"has it: {remedy}"
        )
