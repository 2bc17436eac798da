"""What commands show beside their results: notes, progress bars."""

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from baft_easyedit.storage.reading import holds_edit

UNLEARNED = 3
"""Exit status if an edit was made, but the model does not answer with the target."""


def note(text: str) -> None:
    """Print a line to standard error, apart from the results."""
    print(f"baft-easyedit: {text}", file=sys.stderr)


def silence_loading() -> None:
    """Suppress the progress bars and messages of other libraries while a model is loaded."""
    import_module("transformers.utils.logging").disable_progress_bar()
    for library in ("huggingface_hub", "lm_eval"):
        logging.getLogger(library).setLevel(logging.ERROR)


@contextmanager
def on_interrupt(directory: Path | None) -> Iterator[None]:
    """Tell what was kept on Ctrl-C in this context; hide warnings that the command itself repeats.

    Without a directory, the edit is not kept.
    """
    learner = logging.getLogger("baft_easyedit.training.learner")
    learner.addFilter(_is_not_repeated)
    try:
        yield
    except KeyboardInterrupt:
        is_kept = directory is not None and holds_edit(directory)
        where = f"`baft-easyedit history {directory}` lists what is kept"
        raise KeyboardInterrupt(where if is_kept else "nothing is kept") from None
    finally:
        learner.removeFilter(_is_not_repeated)


def _is_not_repeated(record: logging.LogRecord) -> bool:
    """Tell whether a warning of the learner is another one than that of unlearned requests."""
    return "requests not learned" not in record.getMessage()


class Bar:
    """A progress bar over edits, or other units."""

    def __init__(self, unit: str = "edit") -> None:
        self._unit = unit
        self._bar: Any = None
        self._done = 0  # a bar that TQDM_DISABLE hides does not count

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def start(self, total: int, done: int) -> Callable[[int], None]:
        """Show the bar; return the function that advances it."""
        from tqdm import tqdm

        self._bar = tqdm(total=total, initial=done, unit=self._unit, leave=False)
        self._done = done
        return self._move

    def _move(self, count: int) -> None:
        """Advance the bar."""
        self._done += count
        self._bar.update(count)

    def tell(self, text: str) -> None:
        """Print a line to standard error, above the bar."""
        if self._bar is not None:
            self._bar.clear()
        note(text)

    @property
    def position(self) -> str:
        """The progress in words, such as `at 12 of 40 edits`."""
        if self._bar is None:
            return f"before the first {self._unit}"
        return f"at {self._done} of {self._bar.total} {self._unit}s"
