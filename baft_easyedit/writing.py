"""Write files that are there as a whole or not at all, with the mode that any new file gets."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO
from uuid import uuid4

NEW_FILE = 0o666
"""Mode of a file that is made; the umask takes away from it, as it does for `open`."""


@contextmanager
def written_whole(file: Path) -> Iterator[IO[bytes]]:
    """Open a file that takes its name only when it is complete, so that several may write it.

    Args:
        file: Its directory is made if absent; what it held before stays until then.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    # Not `tempfile`, whose files are for their owner only.
    temporary = file.parent / f".{file.name}.{uuid4().hex}"
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, NEW_FILE)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            yield stream
        os.replace(temporary, file)
    except BaseException:
        temporary.unlink()
        raise
