"""The process in which one method runs its chunks; started by `process`, speaks JSON lines.

EasyEdit keeps state in its modules and prints a lot: each method has a process of its own, whose
working directory is temporary and whose output goes to a file there.
"""

import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import torch

from baft_easyedit.bench.chunk import ChunkRunner, seed_everything
from baft_easyedit.bench.config import BenchConfig, MethodConfig, read_config
from baft_easyedit.bench.datasets import load_piqa
from baft_easyedit.bench.plan import Protocol, Unit
from baft_easyedit.bench.scoring import PreEditScores
from baft_easyedit.bench.settings import asked_of_all, our_hparams, statistics_texts
from baft_easyedit.bench.store import RunDirectory, read_json
from baft_easyedit.easyedit.base_editor import OUR_METHODS
from baft_easyedit.easyedit.host import Host
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


def main(job_file: str) -> None:
    """Run the job described by a JSON file, and report on what was standard output.

    Args:
        job_file: Path of the JSON file that `process.run_units` wrote.
    """
    events = _claim_stdout()
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    try:
        _Job(job, events).run()
    # Whatever a method of EasyEdit raises (its asserts, and libraries' errors), it becomes a row.
    except Exception as error:  # noqa: BLE001
        traceback.print_exc()
        _send(events, {"failed": describe(error)})


def describe(error: BaseException) -> str:
    """Say what went wrong, in one line."""
    return f"{type(error).__name__}: {error}"


def _claim_stdout() -> TextIO:
    """Keep standard output for events; let everything that is printed go where errors go."""
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return events


def _send(events: TextIO, event: Mapping[str, Any]) -> None:
    """Write one event as a line."""
    events.write(json.dumps(event) + "\n")
    events.flush()


class _Job:
    """One method's chunks, run one after another on one model."""

    def __init__(self, job: Mapping[str, Any], events: TextIO) -> None:
        self.events = events
        self.directory = RunDirectory(Path(job["directory"]))
        self.config: BenchConfig = read_config(self.directory.config)
        self.device = job["device"]
        self.depends_on = job["depends_on"]
        self.method = next(m for m in self.config.methods if m.name == job["method"])
        self.texts = statistics_texts(self.config)
        self.units = [
            Unit(
                self.method.name, Protocol(u["T"], u["batch_size"]), u["chunk"], range(*u["range"])
            )
            for u in job["units"]
        ]

    def run(self) -> None:
        """Load the model once; edit, score and restore chunk after chunk."""
        config = self.config
        torch.set_num_threads(config.threads)
        if isinstance(self.device, int) and torch.cuda.is_available():
            torch.cuda.set_device(self.device)  # for clocks and counters
        host = register()
        requests = prepare_requests(read_json(self.directory.requests))
        path = host_model_path(config.model)
        editor, notes = self._editor(host, path)
        size = config.scoring_batch_size
        session = Session(editor, requests[0]["prompt"], config.verify, size)
        depends_on = {**self.depends_on, "easyedit": host.version}
        pre_edit = PreEditScores(self.directory.pre_edit, depends_on, config.generation)
        task = config.downstream
        questions = load_piqa(task.path, task.limit).items if task is not None else []
        ours = self.method.method in OUR_METHODS  # which remember by themselves
        again = 0 if ours else self.method.rehearsal
        runner = ChunkRunner(session, config, self.directory, requests, pre_edit, questions, again)
        for group in self._groups():
            protocol = group[0].protocol
            set_up = partial(self._set_protocol, editor, protocol, path, host)
            learned = self._learn_apart(runner, group, set_up)
            for unit, own in zip(group, learned, strict=True):
                self._run_unit(runner, unit, notes, set_up, own)

    def _groups(self) -> list[list[Unit]]:
        """Return the chunks, those together whose edits are learned side by side."""
        apart = [unit for unit in self.units if self._is_learned_apart(unit)]
        size = self.config.side_by_side
        groups = [apart[i : i + size] for i in range(0, len(apart), size)]
        return groups + [[unit] for unit in self.units if not self._is_learned_apart(unit)]

    def _is_learned_apart(self, unit: Unit) -> bool:
        """Tell whether a chunk's edit is learned beside those of others."""
        is_ours = self.method.method in OUR_METHODS
        return is_ours and unit.protocol.name == "single" and self.config.side_by_side > 1

    def _learn_apart(
        self, runner: ChunkRunner, group: list[Unit], set_up: Callable[[], None]
    ) -> list[Learned | None]:
        """Learn the edits of a group side by side; None for those to be learned on their own."""
        if len(group) == 1:
            return [None]
        try:
            set_up()
            requests = [runner.requests[unit.indices[0]] for unit in group]
            return [*runner.session.learn_apart(requests, len(group))]
        except Exception:  # noqa: BLE001  one of them cannot be learned: on its own it will say so
            traceback.print_exc()
            return [None] * len(group)

    def _run_unit(
        self,
        runner: ChunkRunner,
        unit: Unit,
        notes: tuple[str, ...],
        set_up: Callable[[], None],
        learned: Learned | None,
    ) -> None:
        """Run one chunk; a failure is its record, and the model is put back."""
        session = runner.session
        _send(self.events, {"started": list(unit.key)})
        try:
            set_up()
            runner.run(unit, notes, lambda: _send(self.events, {"edited": 1}), learned)
        except Exception as error:
            traceback.print_exc()
            if not session.verifies:  # nothing to put back: another process goes on
                raise
            session.restore()
            _send(self.events, {"chunk": list(unit.key), "error": describe(error)})
        else:
            _send(self.events, {"chunk": list(unit.key)})

    def _editor(self, host: Host, path: str) -> tuple[Any, tuple[str, ...]]:
        """Make EasyEdit's editor of the method, its statistics and its module-level caches."""
        hparams, notes = self._hparams(host, path)
        _check_templates(hparams, host)
        seed_everything(self.config.seed)
        editor = make_editor(hparams)
        if self.method.method not in OUR_METHODS:
            write_statistics(editor, self.texts)
            prepare_method(self.method.method, editor, self.config.seed)
        return editor, notes

    def _hparams(self, host: Host, path: str) -> tuple[Any, tuple[str, ...]]:
        """Make the method's hyper-parameters for its first protocol."""
        method, config = self.method, self.config
        if method.method in OUR_METHODS:
            return our_hparams(config, method, self.units[0].protocol, path, self.device), ()
        hparams, notes = peer_hparams(
            method.method,
            path,
            self.device,
            Path.cwd(),
            host.generation,
            len(self.texts),
            {**asked_of_all(config), **method.set},
            preset=config.peer_preset,
        )
        return hparams, (*notes, *fix_peer(method.method, hparams))

    def _set_protocol(self, editor: Any, protocol: Protocol, path: str, host: Host) -> None:
        """Give the editor the hyper-parameters of a protocol; the model stays.

        Raises:
            ValueError: If the method cannot edit several requests in one call.
        """
        method: MethodConfig = self.method
        if method.method in OUR_METHODS:
            editor.hparams = our_hparams(self.config, method, protocol, path, self.device)
        elif protocol.batch_size + method.rehearsal > 1:
            if not batchable(method.method, host.generation):
                raise ValueError(f"{method.method} edits one request at a time in EasyEdit")
            editor.hparams.batch_size = protocol.batch_size + method.rehearsal


def _check_templates(hparams: Any, host: Host) -> None:
    """Check that prompts can be scored as they are learned.

    Raises:
        ValueError: If they are to be in a chat template, and EasyEdit's evaluators have none.
    """
    if host.generation == "pypi" and getattr(hparams, "use_chat_template", False):
        raise ValueError(
            "use_chat_template must be false under the release of EasyEdit, which scores plain "
            "texts: set EASYEDIT_HOME to a current clone"
        )


if __name__ == "__main__":
    main(sys.argv[1])
