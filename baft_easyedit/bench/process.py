"""A generator in a process of its own, which may print, crash or hang as EasyEdit's methods do.

The process has a temporary working directory, and what it prints goes to a file there. It computes
a step when it is asked for one, and answers with a pickle of what was yielded or raised, through a
pipe. `multiprocessing` would import the caller's main script again, and sets no environment.
"""

import os
import pickle
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

_TAIL = 300
"""Characters of a dead process's output that its error tells."""
_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class WorkerError(ChildProcessError):
    """Why a generator in another process yields no more."""


class Worker(Iterator[Any]):
    """Iterates over a generator in a process of its own; ends the process as a context.

    Args:
        function: A generator function of a module.
        *arguments: What it is called with; each can be pickled.
        **environment: Variables that it has beside those of this process.
    """

    def __init__(
        self,
        function: Callable[..., Iterator[Any]],
        *arguments: Any,
        **environment: str,
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
        """Return what the generator yields next.

        Raises:
            WorkerError: If it raises anything, or the process ends; and again if asked again.
        """
        if self._error is None:
            kind, value = self._step()
            if kind == "item":
                return value
            self.close()
            if kind == "end":
                raise StopIteration
            self._error = value
        raise WorkerError(self._error)

    def _step(self) -> tuple[str, Any]:
        """Ask for a step; return what kind of answer it got, and the answer."""
        pipes: Any = self.process
        try:
            pipes.stdin.write(b"\n")
            pipes.stdin.flush()
            return cast(tuple[str, Any], pickle.load(pipes.stdout))
        except (OSError, EOFError, pickle.UnpicklingError):
            code = self.process.wait()
            tail = self._log.read_text(encoding="utf-8", errors="replace")[-_TAIL:].strip()
            return "error", f"its process ended with exit code {code}: {tail}"

    def close(self) -> None:
        """End the process, and what it wrote to its working directory."""
        self.process.kill()
        with suppress(BrokenPipeError), self.process:
            pass
        self._directory.cleanup()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def main() -> None:
    """Run the generator that standard input names, a step for each byte that follows there."""
    asked = os.fdopen(os.dup(0), "rb")
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what is printed goes where errors go

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
