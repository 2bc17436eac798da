"""What commands show beside their results."""

import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any


def note(text: str) -> None:
    """Print a line that is no result."""
    print(f"baft-easyedit: {text}", file=sys.stderr)


NOTHING_RUN = 1
"""Exit status if no row of a benchmark has scores."""


def status_of(rows: Sequence[Mapping[str, Any]]) -> int:
    """Return the exit status of a benchmark; if no row has scores, say so."""
    if any(row["error"] is None for row in rows):
        return 0
    note("no method could be run; the tables say why")
    return NOTHING_RUN


def silence_loading() -> None:
    """Keep the progress bars and retries of model loading out of what the command prints."""
    import_module("transformers.utils.logging").disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


@contextmanager
def without_warnings_of(module: str) -> Iterator[None]:
    """Keep a module's logged warnings out of what the command prints, which says so itself."""
    logger = logging.getLogger(module)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


class Bar:
    """A progress bar over edits, or other units."""

    def __init__(self, unit: str = "edit") -> None:
        self._unit = unit
        self._bar: Any = None

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def start(self, total: int, done: int) -> Callable[[int], None]:
        """Show the bar; return what moves it."""
        from tqdm import tqdm

        self._bar = tqdm(total=total, initial=done, unit=self._unit, leave=False)
        return self._bar.update

    @property
    def position(self) -> str:
        """Where it is, such as `at 12 of 40 edits`."""
        if self._bar is None:
            return f"before the first {self._unit}"
        return f"at {self._bar.n} of {self._bar.total} {self._unit}s"

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()
