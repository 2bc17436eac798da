"""Edit, score and restore one chunk: the only place where a benchmark touches a model.

Everything random is seeded at the start of a chunk: its numbers depend neither on the chunks before
it nor on the process that runs it.
"""

import random
import resource
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from baft_easyedit.bench.basis import basis_record, basis_usage
from baft_easyedit.bench.config import BenchConfig
from baft_easyedit.bench.evaluate import PreEditScores, immediate_scores, score_cases
from baft_easyedit.bench.piqa import PiqaItem, piqa_accuracy
from baft_easyedit.bench.protocol import Chunk
from baft_easyedit.bench.scores import plain
from baft_easyedit.bench.store import SCHEMA, RunDirectory, write_json
from baft_easyedit.easyedit.session import Session
from baft_easyedit.editor import Learned
from baft_easyedit.model.prompt_format import PromptFormat


@dataclass
class ChunkRunner:
    """Runs the chunks of one method, and writes their cases."""

    session: Session
    """EasyEdit's editor of the method."""
    config: BenchConfig
    directory: RunDirectory
    requests: Sequence[Mapping[str, Any]]
    """All records of the run, completed by `prepare_requests`."""
    pre_edit: PreEditScores
    downstream: Sequence[PiqaItem]
    """Questions asked after each chunk; none if empty."""
    rehearsal: int
    """Earlier requests of a chunk that each edit call is given again."""
    notes: Sequence[str]
    """What is to be told beside the method's scores."""
    progress: Callable[[int], None]
    """Called with the number of records after each edit call."""

    def run(self, chunk: Chunk, learned: Learned | None = None) -> None:
        """Edit a chunk's records in order, score them all, restore the model.

        Args:
            chunk: What to run.
            learned: What was learned of a single edit before.
        """
        session, config = self.session, self.config
        requests = [self.requests[i] for i in chunk.indices]
        seed_everything(config.seed)
        pre = self.pre_edit.get(session, requests)
        before = self._downstream_before if self.downstream else None
        for device in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(device)
        times, immediate = self._edit(chunk, learned)
        measured: dict[str, Any] = {
            "edit_times_s": times,
            "trainable_parameters": session.num_parameters,
            "peak_memory_bytes": _peak_memory(),
            "basis_usage": basis_usage(session.model) if config.basis else None,
            "notes": [*self.notes, *(["learned side by side"] if learned is not None else [])],
        }
        cases = score_cases(session, requests, pre, config.generation)
        for position, (i, case) in enumerate(zip(chunk.indices, cases, strict=True)):
            content = {
                **self._described(chunk, position),
                "teacher_forced": case["teacher_forced"],
                "answers": case["answers"],
                "scores": plain({**case["scores"], **immediate.get(i, {})}),
                **self._basis(i),
                "edit_time_s": times[position // chunk.protocol.batch_size],
            }
            write_json(self.directory.case(chunk, i), content)
        if before is not None:
            accuracies = {"pre_acc": before, "post_acc": self._downstream_accuracy()}
            measured["downstream"] = {**accuracies, "n": len(self.downstream)}
        self.directory.write_chunk(chunk, **measured, restored=session.restore())

    def _edit(
        self, chunk: Chunk, learned: Learned | None
    ) -> tuple[list[float], dict[int, dict[str, Any]]]:
        """Edit a chunk; return each call's seconds per request, and immediate scores by record."""
        times: list[float] = []
        immediate: dict[int, dict[str, Any]] = {}
        size = chunk.protocol.batch_size
        for start in range(0, len(chunk.indices), size):
            indices = chunk.indices[start : start + size]
            batch = [self.requests[i] for i in indices]
            if learned is not None:
                times.append(self.session.install(learned))
            else:
                again = self._earlier(chunk.indices[:start])
                times.append(self.session.edit([*batch, *again]) / len(batch))
            if self.config.immediate and chunk.protocol.name == "continual":
                immediate |= {i: immediate_scores(self.session, self.requests[i]) for i in indices}
            self.progress(len(indices))
        return times, immediate

    def _earlier(self, indices: Sequence[int]) -> list[Mapping[str, Any]]:
        """Draw some earlier requests; the draw depends on the seed and on how many there are."""
        generator = random.Random(f"{self.config.seed} {len(indices)}")
        drawn = generator.sample(indices, min(self.rehearsal, len(indices)))
        return [self.requests[i] for i in drawn]

    def _described(self, chunk: Chunk, position: int) -> dict[str, Any]:
        """Say which case of a run one is."""
        index = chunk.indices[position]
        return {
            "schema": SCHEMA,
            "index": index,
            "case_id": self.requests[index]["case_id"],
            "method": chunk.method,
            "protocol": chunk.protocol.name,
            "T": chunk.protocol.T,
            "batch_size": chunk.protocol.batch_size,
            "chunk": chunk.number,
            "position": position,
            "chunk_length": len(chunk.indices),
        }

    def _basis(self, index: int) -> dict[str, Any]:
        """Return the basis weights of a record's prompts, and the sizes of their updates."""
        found = None
        if self.config.basis:
            editor = self.session.editor
            form = PromptFormat.of(editor.hparams)
            found = basis_record(self.session.model, editor.tok, self.requests[index], form)
        return {"basis": found and found["weights"], "update": found and found["update"]}

    @cached_property
    def _downstream_before(self) -> float:
        """The unedited model's accuracy on the downstream task."""
        return self._downstream_accuracy()

    def _downstream_accuracy(self) -> float:
        """Return the model's accuracy on the downstream task now."""
        return piqa_accuracy(self.session.model, self.session.editor.tok, self.downstream)


def seed_everything(seed: int) -> None:
    """Seed what EasyEdit's methods draw from."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def _peak_memory() -> int:
    """Return the most bytes that were in use: on CUDA since the reset, else of the process.

    The spare copy of the model that `verify` keeps is among them.
    """
    if torch.cuda.is_available():
        devices = range(torch.cuda.device_count())
        return sum(torch.cuda.max_memory_allocated(device) for device in devices)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
