"""The process in which one method runs its chunks; `process` starts it, and says what it answers.

EasyEdit keeps state in its modules and prints a lot: each method has a process of its own, whose
working directory is temporary and whose output goes to a file there.
"""

import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from baft_easyedit.bench.chunk import ChunkRunner, seed_everything
from baft_easyedit.bench.config import read_config
from baft_easyedit.bench.evaluate import PreEditScores
from baft_easyedit.bench.methods import asked_of_all, our_hparams, statistics_texts
from baft_easyedit.bench.piqa import load_piqa
from baft_easyedit.bench.protocol import Chunk, Protocol
from baft_easyedit.bench.store import RunDirectory, read_json
from baft_easyedit.easyedit.base_editor import OUR_METHODS
from baft_easyedit.easyedit.model_path import host_model_path
from baft_easyedit.easyedit.peers import (
    batchable,
    fix_peer,
    peer_hparams,
    prepare_method,
    write_statistics,
)
from baft_easyedit.easyedit.plugin import register
from baft_easyedit.easyedit.session import Session, make_editor, prepare_requests
from baft_easyedit.editor import Learned

Send = Callable[..., None]
"""Called with the parts of an event."""


def main(job_file: str) -> None:
    """Run the job described by a JSON file, and report on what was standard output.

    Args:
        job_file: Path of the JSON file that `process.Workers` wrote.
    """
    send = _claim_stdout()
    try:
        _MethodRun(json.loads(Path(job_file).read_text(encoding="utf-8")), send).run()
    # Whatever a method of EasyEdit raises (its asserts, and libraries' errors), it becomes a row.
    except Exception as error:  # noqa: BLE001
        traceback.print_exc()
        send("failed", _described(error))


def _described(error: BaseException) -> str:
    """Say what went wrong, in one line."""
    return f"{type(error).__name__}: {error}"


def _claim_stdout() -> Send:
    """Keep standard output for events; let everything that is printed go where errors go."""
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return lambda *event: print(json.dumps(event), file=events, flush=True)


class _MethodRun:
    """One method's chunks, run one after another on one model."""

    def __init__(self, job: Mapping[str, Any], send: Send) -> None:
        self.send = send
        self.directory = RunDirectory(Path(job["directory"]))
        self.config = read_config(self.directory.config)
        self.device = job["device"]
        self.depends_on = job["depends_on"]
        self.method = next(m for m in self.config.methods if m.name == job["method"])
        self.is_ours = self.method.method in OUR_METHODS
        self.texts = statistics_texts(self.config)
        self.chunks = [
            Chunk(self.method.name, Protocol(T, batch_size), number, range(start, stop))
            for T, batch_size, number, start, stop in job["chunks"]
        ]
        self._num_edited = 0

    def run(self) -> None:
        """Load the model once; edit, score and restore chunk after chunk."""
        config, directory = self.config, self.directory
        torch.set_num_threads(config.threads)
        if isinstance(self.device, int) and torch.cuda.is_available():
            torch.cuda.set_device(self.device)  # for clocks and counters
        self.host = register()
        self.path = host_model_path(config.model)
        requests = prepare_requests(read_json(directory.requests))
        editor, notes = self._editor()
        task = config.downstream
        self.runner = ChunkRunner(
            session=Session(
                editor, requests[0]["prompt"], config.verify, config.scoring_batch_size
            ),
            config=config,
            directory=directory,
            requests=requests,
            pre_edit=PreEditScores(
                directory, {**self.depends_on, "easyedit": self.host.version}, config.generation
            ),
            downstream=load_piqa(task.path, task.limit)[0] if task is not None else [],
            rehearsal=0 if self.is_ours else self.method.rehearsal,  # ours remember by themselves
            notes=notes,
            progress=self._edited,
        )
        for group in self._groups():
            for i, learned in zip(group, self._learn_apart(group), strict=True):
                self._run_chunk(i, learned)

    def _edited(self, count: int) -> None:
        """Tell of edited records."""
        self._num_edited += count
        self.send("edited", count)

    def _groups(self) -> list[list[int]]:
        """Return the chunks' numbers, those together whose edits are learned side by side."""
        size, numbers = self.config.side_by_side, range(len(self.chunks))
        apart = [i for i in numbers if self._is_learned_apart(self.chunks[i])]
        groups = [apart[i : i + size] for i in range(0, len(apart), size)]
        return groups + [[i] for i in numbers if not self._is_learned_apart(self.chunks[i])]

    def _is_learned_apart(self, chunk: Chunk) -> bool:
        """Tell whether a chunk's edit is learned beside those of others."""
        return self.is_ours and chunk.protocol.name == "single" and self.config.side_by_side > 1

    def _learn_apart(self, group: list[int]) -> list[Learned | None]:
        """Learn the edits of a group side by side; None for those to be learned on their own."""
        if len(group) == 1:
            return [None]
        chunks = [self.chunks[i] for i in group]
        try:
            self._set_protocol(chunks[0].protocol)
            requests = [self.runner.requests[chunk.indices[0]] for chunk in chunks]
            return [*self.runner.session.learn_apart(requests, len(group))]
        except Exception:  # noqa: BLE001  one of them cannot be learned: on its own it will say so
            traceback.print_exc()
            return [None] * len(group)

    def _run_chunk(self, number: int, learned: Learned | None) -> None:
        """Run one chunk; a failure is written in its place, and the model is put back."""
        chunk, session = self.chunks[number], self.runner.session
        self.send("start", number)
        self._num_edited = 0
        try:
            self._set_protocol(chunk.protocol)
            self.runner.run(chunk, learned)
        except Exception as error:
            traceback.print_exc()
            if not session.verifies:  # nothing to put back: another process goes on
                raise
            session.restore()
            self.directory.write_chunk(chunk, error=_described(error))
            self.send("edited", len(chunk.indices) - self._num_edited)
        self.send("end")

    def _editor(self) -> tuple[Any, tuple[str, ...]]:
        """Make EasyEdit's editor of the method, its statistics and its module-level caches.

        Raises:
            ValueError: If prompts are to be in a chat template, and cannot be scored in it.
        """
        hparams, notes = self._hparams()
        if self.host.generation == "pypi" and getattr(hparams, "use_chat_template", False):
            raise ValueError(
                "use_chat_template must be false under the release of EasyEdit, which scores plain "
                "texts: set EASYEDIT_HOME to a current clone"
            )
        seed_everything(self.config.seed)
        editor = make_editor(hparams)
        if not self.is_ours:
            write_statistics(editor, self.texts)
            prepare_method(self.method.method, editor, self.config.seed)
        return editor, notes

    def _hparams(self) -> tuple[Any, tuple[str, ...]]:
        """Make the method's hyper-parameters for its first protocol."""
        method, config = self.method, self.config
        if self.is_ours:
            protocol = self.chunks[0].protocol
            return our_hparams(config, method, protocol, self.path, self.device), ()
        hparams, notes = peer_hparams(
            method.method,
            self.path,
            self.device,
            Path.cwd(),
            self.host.generation,
            len(self.texts),
            {**asked_of_all(config), **method.set},
            preset=config.peer_preset,
        )
        return hparams, (*notes, *fix_peer(method.method, hparams))

    def _set_protocol(self, protocol: Protocol) -> None:
        """Give the editor the hyper-parameters of a protocol; the model stays.

        Raises:
            ValueError: If the method cannot edit several requests in one call.
        """
        method, editor = self.method, self.runner.session.editor
        size = protocol.batch_size + method.rehearsal
        if self.is_ours:
            editor.hparams = our_hparams(self.config, method, protocol, self.path, self.device)
        elif size > 1:
            if not batchable(method.method, self.host.generation):
                raise ValueError(f"{method.method} edits one request at a time in EasyEdit")
            editor.hparams.batch_size = size


if __name__ == "__main__":
    main(sys.argv[1])
