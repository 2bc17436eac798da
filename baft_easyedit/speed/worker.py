"""The process that measures some rows on one model; started by `process`, speaks JSON lines.

It reads a list on each line of its standard input, a command and its arguments, and answers each
with one line. EasyEdit keeps state in its modules and prints a lot: what is printed goes where
errors go.
"""

import json
import logging
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import torch

from baft_easyedit.model.devices import as_device
from baft_easyedit.speed.hardware import MemoryMeter, bytes_per_step, copy_bandwidth
from baft_easyedit.speed.measure import Method, Requests, measure, profiled, run_once
from baft_easyedit.speed.options import Row
from baft_easyedit.speed.ours import OurMethod, hparams_of, load
from baft_easyedit.speed.prompts import PromptMaker

_NUM_BANDWIDTH_TRIES = 3


def main(job_file: str) -> None:
    """Do the job described by a JSON file until standard input ends.

    Args:
        job_file: Path of the JSON file that `process.Worker` wrote.
    """
    answers = _claim_stdout()
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    bench, log = None, _Log.started()
    for line in sys.stdin:
        try:
            bench = bench or Bench(job, log.messages)
            answer = bench.answer(json.loads(line))
        # Whatever a method of EasyEdit raises (its asserts, and libraries' errors), is told.
        except Exception as error:  # noqa: BLE001
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _claim_stdout() -> TextIO:
    """Keep standard output for answers; let everything that is printed go where errors go."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers


class _Log(logging.Handler):
    """Keeps what this package logs, such as that a model cannot be replayed, each message once."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.messages: list[str] = []

    @classmethod
    def started(cls) -> "_Log":
        """Listen from now on."""
        handler, logger = cls(), logging.getLogger("baft_easyedit")
        logger.setLevel(logging.INFO)
        logging.getLogger("baft_easyedit.easyedit").setLevel(logging.WARNING)
        logger.addHandler(handler)
        return handler

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a message."""
        if record.getMessage() not in self.messages:
            self.messages.append(record.getMessage())


class Bench:
    """One loaded model, and the rows that are measured on it.

    Args:
        job: `rows`, `model` (or None), `shape`, `device`, `dtype`, `threads`, `steps`,
            `early_stop`, `new_tokens`, `requests` (none for random words), and `meters`, whether
            memory is measured.
        log: What this package has logged, which may grow.
    """

    def __init__(self, job: Mapping[str, Any], log: Sequence[str] = ()) -> None:
        if job["threads"] is not None:
            torch.set_num_threads(job["threads"])
        self.job = job
        self.log = log
        self.device = as_device(job["device"])
        self.rows = {row["name"]: Row(**row) for row in job["rows"]}
        self.notes: tuple[str, ...] = ()
        self.step_bytes: dict[str, int] = {}
        self.methods = self._load()
        first = next(iter(self.methods.values()))
        self._maker = PromptMaker(first.tokenizer)
        run_once(first.model, self.device)
        self._meter = MemoryMeter(self.device) if job["meters"] else None

    def _load(self) -> dict[str, Method]:
        """Load the model and make the methods of all rows."""
        peers = [row for row in self.rows.values() if not row.is_ours]
        return {peers[0].name: self._peer(peers[0])} if peers else self._ours()

    def _ours(self) -> dict[str, Method]:
        """Make BaFT and ReFT on one model."""
        job = self.job
        dtype = getattr(torch, job["dtype"])
        model, tokenizer = load(job["model"], job["shape"], self.device, dtype)
        methods: dict[str, Method] = {}
        for name, row in self.rows.items():
            hparams = hparams_of(row, model, job["steps"], job["early_stop"])
            methods[name] = OurMethod(model, tokenizer, hparams, self.device)
            self.step_bytes[name] = bytes_per_step(model, min(hparams.layers))
        return methods

    def _peer(self, row: Row) -> Method:
        """Make a method of EasyEdit."""
        from baft_easyedit.speed.peers import PeerMethod

        job = self.job
        half = job["dtype"] != "float32"
        method = PeerMethod(row.method, job["model"], job["device"], half, Path.cwd())
        as_float16 = (f"{row.method}: in float16, as EasyEdit loads no bfloat16",)
        self.notes = method.notes + (as_float16 if job["dtype"] == "bfloat16" else ())
        return method

    def answer(self, command: list[Any]) -> dict[str, Any]:
        """Do one command: describe, bandwidth, or measure or profile with a row and a repeat."""
        if command[0] == "describe":
            return {"notes": [*self.notes, *self.log], "step_bytes": self.step_bytes}
        if command[0] == "bandwidth":
            return {"bytes_per_s": copy_bandwidth(self.device, tries=_NUM_BANDWIDTH_TRIES)}
        row = self.rows[command[1]]
        method, requests = self.methods[row.name], self._requests(row, command[2])
        if command[0] == "profile":
            return {"profile": profiled(method, requests)}
        return asdict(measure(method, requests, self.job["new_tokens"], self._meter))

    def _requests(self, row: Row, repeat: int) -> Requests:
        """Return what a row edits in one of its measurements."""
        size = row.batch_size
        if self.job["requests"]:
            return self.job["requests"][repeat * size :][:size]
        return self._maker.requests(row.prompt_length, row.answer_length, size, seed=repeat)


if __name__ == "__main__":
    main(sys.argv[1])
