"""Run a generator in a process of its own, as EasyEdit's methods print, keep state and may crash.

`bench` and `speed` run each method in such a `Worker`. It has a temporary working directory, with a
file for what it prints. A byte on its standard input asks for a step; it answers on its standard
output with a pickle of the value yielded, or of the error's text. `multiprocessing` would import
the caller's main script again, and cannot set the environment.
"""

import os
import pickle
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

_TAIL = 300
"""Number of last characters of a dead process's output that its error quotes."""
_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class WorkerError(ChildProcessError):
    """Why a generator in another process yields no more."""


class Worker(Iterator[Any], AbstractContextManager["Worker"]):
    """Iterates over a generator in a process of its own; as a context manager, ends the process.

    `function`, at the top level of a module, makes it of picklable `arguments`; `environment` is
    added to the variables of this process.
    """

    def __init__(
        self, function: Callable[..., Iterator[Any]], *arguments: Any, **environment: str
    ) -> None:
        self._directory = TemporaryDirectory(prefix="easyedit-")
        self._log = Path(self._directory.name, "log.txt")
        self._error: str | None = None
        inherited = {k: v for k, v in os.environ.items() if k not in _LAUNCHER}
        inherited["PYTHONPATH"] = os.pathsep.join(os.path.abspath(path) for path in sys.path)
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", __name__],
                cwd=self._directory.name,  # EasyEdit writes ./logs
                env={**inherited, "TOKENIZERS_PARALLELISM": "false", **environment},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,  # an interrupt from the keyboard is for this process
            )
        with suppress(BrokenPipeError):  # then the first step says why
            pickle.dump((function, arguments), cast(Any, self.process.stdin))

    def __next__(self) -> Any:
        """Return the next value that the generator yields.

        Raises:
            WorkerError: If the generator raises, or the process dies; and on every later call.
        """
        if self._error is None:
            pipes: Any = self.process
            try:
                pipes.stdin.write(b"\n")
                pipes.stdin.flush()
                kind, value = pickle.load(pipes.stdout)
            except (OSError, EOFError, pickle.UnpicklingError):
                code = self.process.wait()
                tail = self._log.read_text(encoding="utf-8", errors="replace")[-_TAIL:].strip()
                kind, value = "error", f"its process ended with exit code {code}: {tail}"
            if kind == "item":
                return value
            self.close()
            if kind == "end":
                raise StopIteration
            self._error = value
        raise WorkerError(self._error)

    def close(self) -> None:
        """Kill the process, and delete its working directory."""
        self.process.kill()
        with suppress(BrokenPipeError), self.process:
            pass
        self._directory.cleanup()

    def __exit__(self, *_error: object) -> None:
        self.close()


def _end_with(parent: int) -> None:
    """End this process once its parent is gone: killed, it could not, and a step may take hours."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def main() -> None:
    """Run the generator that is pickled on standard input, one step for each byte that follows."""
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    asked = os.fdopen(os.dup(0), "rb")
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # prints go to standard error, the log

    def answer(kind: str, value: Any) -> None:
        pickle.dump((kind, value), answers)
        answers.flush()

    try:
        function, arguments = pickle.load(asked)
        steps = function(*arguments)
        while asked.read(1):
            try:
                answer("item", next(steps))
            except StopIteration:
                answer("end", None)
    # A method of EasyEdit may raise anything: its asserts, and libraries' errors.
    except Exception as error:  # noqa: BLE001
        traceback.print_exc()
        answer("error", f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
