"""Edit, score and restore one chunk: the only place where a benchmark touches a model.

Everything random is seeded at the start of a chunk, so that its numbers depend neither on the
chunks before it nor on the process that runs it.
"""

import random
import resource
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from baft_easyedit.bench.basis import basis_record, basis_usage
from baft_easyedit.bench.config import BenchConfig
from baft_easyedit.bench.datasets import PiqaItem
from baft_easyedit.bench.downstream import piqa_accuracy
from baft_easyedit.bench.plan import Unit
from baft_easyedit.bench.scores import plain
from baft_easyedit.bench.scoring import PreEditScores, immediate_scores, score_cases
from baft_easyedit.bench.store import SCHEMA, RunDirectory, write_json
from baft_easyedit.easyedit.session import Session
from baft_easyedit.editor import Learned
from baft_easyedit.model.prompt_format import PromptFormat

Progress = Callable[[], None]
"""Called after each edit of a request."""


class ChunkRunner:
    """Runs the chunks of one method, and writes their records.

    Args:
        session: EasyEdit's editor of the method.
        config: What is scored.
        directory: Where the records go.
        requests: All records of the run, completed by `prepare_requests`.
        pre_edit: Scores of the unedited model.
        downstream: Questions asked after each chunk; none if empty.
        rehearsal: Earlier requests of a chunk that each edit call is given again.
    """

    def __init__(
        self,
        session: Session,
        config: BenchConfig,
        directory: RunDirectory,
        requests: Sequence[Mapping[str, Any]],
        pre_edit: PreEditScores,
        downstream: Sequence[PiqaItem] = (),
        rehearsal: int = 0,
    ) -> None:
        self.session = session
        self.config = config
        self.directory = directory
        self.requests = requests
        self.pre_edit = pre_edit
        self.downstream = downstream
        self.rehearsal = rehearsal
        self._downstream_pre: float | None = None

    def run(
        self,
        unit: Unit,
        notes: Sequence[str] = (),
        progress: Progress | None = None,
        learned: Learned | None = None,
    ) -> None:
        """Edit a chunk's records in order, score them all, restore the model.

        Args:
            unit: The chunk.
            notes: What is to be told beside its scores.
            progress: Called after each edited request.
            learned: What was learned of a single edit before.
        """
        session = self.session
        requests = [self.requests[i] for i in unit.indices]
        seed_everything(self.config.seed)
        pre = self.pre_edit.get(session, requests)
        before = self._ask_downstream() if self.downstream else None
        _reset_peak_memory()
        times, immediate = self._edit(unit, progress, learned)
        chunk: dict[str, Any] = {
            "schema": SCHEMA,
            "chunk": unit.chunk,
            "indices": list(unit.indices),
            "edit_times_s": times,
            "trainable_parameters": session.num_parameters,
            "peak_memory_bytes": _peak_memory(),
            "basis_usage": basis_usage(session.model) if self.config.basis else None,
            "downstream": None,
            "notes": [*notes, *(["learned side by side"] if learned is not None else [])],
            "error": None,
        }
        scored = score_cases(session, requests, pre, self.config.generation)
        for position, (i, case) in enumerate(zip(unit.indices, scored, strict=True)):
            time_s = times[position // unit.protocol.batch_size]
            record = self._record(unit, position, case, immediate.get(i, {}))
            write_json(self.directory.case(unit, i), {**record, "edit_time_s": time_s})
        if before is not None:
            chunk["downstream"] = {
                "pre_acc": before,
                "post_acc": self._accuracy(),
                "n": len(self.downstream),
            }
        chunk["restored"] = session.restore()
        write_json(self.directory.chunk(unit), chunk)

    def _edit(
        self, unit: Unit, progress: Progress | None, learned: Learned | None
    ) -> tuple[list[float], dict[int, dict[str, Any]]]:
        """Edit a chunk; return each call's seconds per request, and immediate scores by record."""
        times: list[float] = []
        immediate: dict[int, dict[str, Any]] = {}
        size = unit.protocol.batch_size
        for start in range(0, len(unit.indices), size):
            indices = unit.indices[start : start + size]
            batch = [self.requests[i] for i in indices]
            if learned is not None:
                times.append(self.session.install(learned))
            else:
                again = self._earlier(unit.indices[:start])
                times.append(self.session.edit([*batch, *again]) / len(batch))
            if self.config.immediate and unit.protocol.name == "continual":
                immediate |= {i: immediate_scores(self.session, self.requests[i]) for i in indices}
            for _ in indices:
                if progress is not None:
                    progress()
        return times, immediate

    def _earlier(self, indices: Sequence[int]) -> list[Mapping[str, Any]]:
        """Draw some earlier requests; the draw depends on the seed and on how many there are."""
        generator = random.Random(f"{self.config.seed} {len(indices)}")
        drawn = generator.sample(indices, min(self.rehearsal, len(indices)))
        return [self.requests[i] for i in drawn]

    def _record(
        self, unit: Unit, position: int, scored: Mapping[str, Any], immediate: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return the record of a chunk's case after all edits, as `score_cases` scored it."""
        index = unit.indices[position]
        session, request = self.session, self.requests[index]
        basis = None
        if self.config.basis:
            editor = session.editor
            form = PromptFormat.of(editor.hparams)
            basis = basis_record(session.model, editor.tok, request, form)
        return {
            "schema": SCHEMA,
            "index": index,
            "case_id": request["case_id"],
            "method": unit.method,
            "protocol": unit.protocol.name,
            "T": unit.protocol.T,
            "batch_size": unit.protocol.batch_size,
            "chunk": unit.chunk,
            "position": position,
            "chunk_length": len(unit.indices),
            "teacher_forced": scored["teacher_forced"],
            "answers": scored["answers"],
            "scores": plain({**scored["scores"], **immediate}),
            "basis": basis and basis["weights"],
            "update": basis and basis["update"],
        }

    def _ask_downstream(self) -> float:
        """Return the unedited model's accuracy on the downstream task, asked once."""
        if self._downstream_pre is None:
            self._downstream_pre = self._accuracy()
        return self._downstream_pre

    def _accuracy(self) -> float:
        """Return the model's accuracy on the downstream task now."""
        session = self.session
        return piqa_accuracy(session.model, session.editor.tok, self.downstream)


def seed_everything(seed: int) -> None:
    """Seed what EasyEdit's methods draw from."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def _reset_peak_memory() -> None:
    """Start measuring CUDA memory anew."""
    for device in range(torch.cuda.device_count()):
        torch.cuda.reset_peak_memory_stats(device)


def _peak_memory() -> int:
    """Return the most bytes that were in use: on CUDA since the reset, else of the process.

    The spare copy of the model that `verify` keeps is among them.
    """
    if torch.cuda.is_available():
        devices = range(torch.cuda.device_count())
        return sum(torch.cuda.max_memory_allocated(device) for device in devices)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
