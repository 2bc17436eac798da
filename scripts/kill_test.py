"""Kill a process that keeps edits, again and again, and prove that nothing is lost.

    python scripts/kill_test.py --kills 200 --edits 300

A child process edits a tiny random model into a kept directory and says so after each call; the
parent kills it with SIGKILL at random moments and starts another. After every kill, all that the
child had said must be in the directory, which must open and go on. A start that is killed before
its first entry leaves a directory where nothing was begun, and says so. In the end the journal's
hashes and the state must be those of a run that nobody disturbed. POSIX only.
"""

import argparse
import os
import random
import select
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from baft_easyedit import BaFTEditor, BaFTHyperParams
from baft_easyedit.storage.reading import STATE, holds_edit, read_history
from baft_easyedit.storage.state import read_state


class ByteTokenizer:
    """A token for each byte."""

    pad_token_id = 0

    def __call__(self, text: str) -> dict[str, list[int]]:
        """Return the ids of a text."""
        return {"input_ids": [1, *text.encode()]}


def make_model() -> Any:
    """Return a tiny random model."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval()


def open_editor(directory: Path) -> BaFTEditor:
    """Begin or continue."""
    hparams = BaFTHyperParams("tiny", [1, 2], device="cpu", rank=2, num_steps=2, lr=1.0e-2)
    return BaFTEditor.open(make_model(), ByteTokenizer(), directory, hparams, checkpoint_every=20)


def change(editor: BaFTEditor, step: int) -> None:
    """Make one change; every tenth is an undo, every 45th a rollback."""
    if step % 45 == 44:
        editor.rollback(to=step - 12)
    elif step % 10 == 9:
        editor.undo()
    else:
        editor.edit(
            {
                "prompt": f"Fact {step} is",
                "target_new": f"no {step * 7919 % 1000}",
                "loc_prompt": "Water is wet",
            }
        )


def work(directory: Path, steps: int, say: Callable[[int], object]) -> None:
    """Do all that is left to do; say after each change how many are done."""
    with open_editor(directory) as editor:
        done = len(read_history(directory)) - 1
        say(done)
        for step in range(done, steps):
            change(editor, step)
            say(step + 1)


class Child:
    """A process that works."""

    def __init__(self, directory: Path, steps: int) -> None:
        self._pipe, write = os.pipe()
        self.pid = os.fork()
        if self.pid:
            os.close(write)
            return
        status = 1
        try:
            os.close(self._pipe)
            work(directory, steps, lambda done: os.write(write, f"{done}\n".encode()))
            status = 0
        except BaseException as error:
            print(f"the child failed: {type(error).__name__}: {error}", file=sys.stderr)
            raise
        finally:
            os._exit(status)

    def kill(self, seconds: float, is_open: bool) -> bool:
        """Kill it unless it has ended by itself.

        Args:
            seconds: How long to wait before.
            is_open: Count from when it has opened the directory, not from its start.

        Returns:
            Whether it had to be killed.
        """
        if is_open:
            select.select([self._pipe], [], [])  # it says something, or ends
        time.sleep(seconds)
        os.kill(self.pid, signal.SIGKILL)
        return self.wait()

    def wait(self) -> bool:
        """Wait until it has ended; return whether it was killed.

        Raises:
            RuntimeError: If it failed.
        """
        _, status = os.waitpid(self.pid, 0)
        if os.WIFEXITED(status) and os.WEXITSTATUS(status):
            raise RuntimeError("the child failed")
        return os.WIFSIGNALED(status)

    def said(self) -> list[int]:
        """Return what it said."""
        with os.fdopen(self._pipe, "rb") as stream:
            lines = stream.read().split(b"\n")
        return [int(line) for line in lines[:-1]]


def run(kills: int, edits: int, seed: int, root: Path) -> dict[str, Any]:
    """Run both runs and compare them.

    Args:
        kills: How many times to kill.
        edits: Changes in each run.
        seed: Of the moments.
        root: Where the two directories are made.

    Returns:
        What happened, in numbers.

    Raises:
        RuntimeError: If something was lost or is different.
    """
    start = time.perf_counter()
    undisturbed = Child(root / "undisturbed", edits)
    undisturbed.wait()
    step_s = (time.perf_counter() - start) / (edits + 1)
    undisturbed.said()
    moments = random.Random(seed)
    done = ahead = killed = unopened = 0
    span = 2 * step_s
    while killed < kills and done < edits:
        span *= 0.7 if done * kills > killed * edits else 1.2  # keeps both in step
        child = Child(root / "killed", edits)
        is_open = moments.random() < 0.8
        killed += child.kill(moments.uniform(0, span if is_open else 0.05), is_open)
        said = child.said()
        unopened += not said
        if said and said[0] not in (done, done + 1):
            raise RuntimeError(f"{done} changes were completed, and {said[0]} are there")
        ahead += bool(said) and said[0] == done + 1
        done = said[-1] if said else done
    starts = sum(
        _killed_start(root / f"start {i}", moments.uniform(0, 3 * step_s))
        for i in range(kills // 10)
    )
    last = Child(root / "killed", edits)
    last.wait()
    _check_same(root / "killed", root / "undisturbed")
    return {
        "changes": edits,
        "kills": killed,
        "kills while opening": unopened,
        "starts killed before their first entry": f"{starts} of {kills // 10}",
        "recovered beyond what the child had said": ahead,
        "last start found": last.said()[0],
        "milliseconds per change": round(1000 * step_s, 1),
        "seconds": round(time.perf_counter() - start, 1),
    }


def _killed_start(directory: Path, seconds: float) -> bool:
    """Kill a child that begins an edit after so long; return whether nothing was begun.

    Raises:
        RuntimeError: If the directory cannot be begun or gone on with.
    """
    child = Child(directory, 1)
    child.kill(seconds, is_open=False)
    child.said()
    is_begun = holds_edit(directory)
    try:
        BaFTEditor.open(make_model(), ByteTokenizer(), directory).close()
    except ValueError as error:
        if is_begun or "nothing was begun there" not in str(error):
            raise RuntimeError(f"a killed start left what cannot be opened: {error}") from error
    open_editor(directory).close()
    return not is_begun


def _check_same(first: Path, second: Path) -> None:
    """Raise RuntimeError unless two directories keep the same states, bit for bit."""
    hashes = [[(e.kind, e.state_hash) for e in read_history(path)] for path in (first, second)]
    if hashes[0] != hashes[1]:
        raise RuntimeError("the two runs have different journals")
    states = [read_state(path / STATE).state.learned for path in (first, second)]
    if not all(torch.equal(states[0][name], states[1][name]) for name in states[1]):
        raise RuntimeError("the two runs end in different states")


def main() -> int:
    """Read the options, run, and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200, help="(%(default)s)")
    parser.add_argument("--edits", type=int, default=300, help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    make_model()  # what is imported late is imported before the forks
    with tempfile.TemporaryDirectory() as root:
        found = run(arguments.kills, arguments.edits, arguments.seed, Path(root))
    for name, value in found.items():
        print(f"{name}: {value}")
    print("nothing was lost, and the final states are bit-equal")
    return 0


if __name__ == "__main__":
    sys.exit(main())
