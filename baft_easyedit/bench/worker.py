"""Edit, score and restore the chunks of one method: the only place where a benchmark has a model.

EasyEdit keeps state in its modules, so each method has a process of its own (see `process`), whose
generator is `run_chunks`. All random generators are seeded at the start of a chunk, so that its
scores depend neither on the chunks before it nor on the process that runs it. Shapes: r rank, N
intervened positions of one text.
"""

import resource
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from transformers import set_seed

from baft_easyedit.bench.config import BenchConfig, read_config
from baft_easyedit.bench.evaluate import immediate_scores, pre_edit_scores, score_cases
from baft_easyedit.bench.methods import asked_of_all, our_hparams, statistics_texts
from baft_easyedit.bench.protocol import Chunk, Protocol
from baft_easyedit.bench.questions import questions_of, with_probes
from baft_easyedit.bench.store import SCHEMA, RunDirectory, read_json, write_json
from baft_easyedit.easyedit.arguments import prepare_requests
from baft_easyedit.easyedit.model_path import host_model_path
from baft_easyedit.easyedit.peers import batchable
from baft_easyedit.easyedit.plugin import register
from baft_easyedit.easyedit.session import Session, make_editor, make_peer
from baft_easyedit.files.messages import short
from baft_easyedit.hparams import OUR_METHODS
from baft_easyedit.model.hooks import ModelEdit, attached_edit
from baft_easyedit.model.prompt_format import PromptFormat
from baft_easyedit.training.prefix_cache import full_forward
from baft_easyedit.training.requests import TextRow

LayerValues = dict[str, list[float]]
"""One number for each basis, by layer; the layers are texts, as JSON needs for keys."""
NO_RECORD = {"basis": None, "update": None}


def run_chunks(
    directory: RunDirectory, chunks: Sequence[Chunk], device: int | str
) -> Iterator[tuple[int, int]]:
    """Run chunks of one method in order, on a model that is loaded once, and write their cases.

    A chunk that fails gets a file that says why, and the model is put back.

    Yields:
        The position of the present chunk, and how many of its records have been edited since the
        last time, or never will be; 0 when the chunk begins.
    """
    run = _MethodRun(directory, chunks[0], device)
    for position, chunk in enumerate(chunks):
        for count in run.run_or_tell(chunk):
            yield position, count


class _MethodRun:
    """One method's model and editor, and what its chunks have in common."""

    def __init__(self, directory: RunDirectory, first: Chunk, device: int | str) -> None:
        self.directory, self.device = directory, device
        self.config = config = read_config(directory.config)
        self.method = next(m for m in config.methods if m.name == first.method)
        self.is_ours = self.method.method in OUR_METHODS
        torch.set_num_threads(config.threads)
        if isinstance(device, int) and torch.cuda.is_available():
            torch.cuda.set_device(device)  # which clocks and counters read
        self.host = register()
        self.path = host_model_path(config.model)
        self.requests = prepare_requests(read_json(directory.requests))
        editor = self._editor(first.protocol)
        probe = self.requests[0]["prompt"]
        self.session = Session(editor, probe, config.verify, config.scoring_batch_size)
        model = directory.record()["model"]
        self.depends_on = {
            **{name: model[name] for name in ("model", "tokenizer")},
            "device": "cpu" if device == "cpu" else "cuda",
            "easyedit": self.host.version,
        }

    def _kept(
        self, depends_on: Mapping[str, Any], make: Callable[[], Any], form: type[BaseModel]
    ) -> dict[str, Any]:
        """Read what the unedited model said, which the run keeps for all methods; ask it once."""
        return self.directory.kept("pre_edit", {**self.depends_on, **depends_on}, make, form)

    def _editor(self, protocol: Protocol) -> Any:
        """Make EasyEdit's editor of the method, its statistics and its module-level caches."""
        method, config = self.method, self.config
        self.notes: tuple[str, ...] = ()
        asked: Mapping[str, Any] = {**asked_of_all(config), **method.set}
        if self.is_ours:
            hparams = our_hparams(config, method, protocol, self.path, self.device)
            asked = vars(hparams)
        if self.host.generation == "pypi" and asked.get("use_chat_template"):
            raise ValueError(
                "use_chat_template must be false under the release of EasyEdit, which scores plain "
                "texts: set EASYEDIT_HOME to a current clone"
            )
        set_seed(config.seed)
        if self.is_ours:
            return make_editor(hparams)
        texts, preset = statistics_texts(config), config.peer_preset
        editor, self.notes = make_peer(
            method.method, self.path, self.device, texts, asked, preset, config.seed
        )
        return editor

    def _set_protocol(self, protocol: Protocol) -> None:
        """Give the editor the hyper-parameters of a protocol; the model stays."""
        method, editor = self.method, self.session.editor
        size = protocol.batch_size
        if self.is_ours:
            editor.hparams = our_hparams(self.config, method, protocol, self.path, self.device)
        elif size > 1:
            if not batchable(method.method, self.host.generation):
                raise ValueError(f"{method.method} edits one request at a time in EasyEdit")
            editor.hparams.batch_size = size

    def run_or_tell(self, chunk: Chunk) -> Iterator[int]:
        """Run a chunk; if it fails, write the reason to its file, and restore the model."""
        yield 0
        num_edited = 0
        try:
            self._set_protocol(chunk.protocol)
            for count in self._run(chunk):
                num_edited += count
                yield count
        except Exception as error:
            traceback.print_exc()
            if not self.config.verify:  # no copy to put back: a new process goes on
                raise
            self.session.restore()
            self.directory.write_chunk(chunk, error=f"{type(error).__name__}: {error}")
            yield len(chunk.indices) - num_edited

    def _run(self, chunk: Chunk) -> Iterator[int]:
        """Edit a chunk's records in order, score them all, restore the model.

        It yields the number of records edited, after each edit call.
        """
        session, config, size = self.session, self.config, chunk.protocol.batch_size
        requests = [self.requests[i] for i in chunk.indices]
        before = self._downstream_before if config.downstream else None
        set_seed(config.seed)
        if config.probes:
            requests = with_probes(self._kept, session, requests, self.requests)
        wanted = {"answers": config.generation, "wild": config.wild}
        exams = [name for name, is_wanted in wanted.items() if is_wanted]
        pre = pre_edit_scores(self._kept, session, requests, exams)
        for device in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(device)
        times: list[float] = []
        immediate: dict[int, dict[str, Any]] = {}
        for start in range(0, len(chunk.indices), size):
            indices = chunk.indices[start : start + size]
            edited = [self.requests[i] for i in indices]
            times.append(session.edit(edited) / len(indices))
            if config.immediate and chunk.protocol.name == "continual":
                immediate |= {i: immediate_scores(session, self.requests[i]) for i in indices}
            yield len(indices)
        measured: dict[str, Any] = {
            "edit_times_s": times,
            "trainable_parameters": session.num_parameters,
            "peak_memory_bytes": _peak_memory(),
            "basis_usage": basis_usage(session.model) if config.basis else None,
            "notes": self.notes,
        }
        cases = score_cases(session, requests, pre, exams)
        for position, (i, case) in enumerate(zip(chunk.indices, cases, strict=True)):
            request = requests[position]
            gates = basis_record(session, self.requests[i]) if config.basis else NO_RECORD
            content = {
                "schema": SCHEMA,
                "index": i,
                "case_id": request["case_id"],
                "method": chunk.method,
                "protocol": chunk.protocol.name,
                **asdict(chunk.protocol),
                "chunk": chunk.number,
                "position": position,
                "chunk_length": len(chunk.indices),
                **case,
                "scores": case["scores"] | immediate.get(i, {}),
                **({"probes": request["probes"]} if config.probes else {}),
                **gates,
                "edit_time_s": times[position // size],
            }
            write_json(self.directory.case(chunk.method, chunk.protocol, i), content)
        if before is not None:
            after = self._downstream_accuracy()
            measured["downstream"] = {"pre_acc": before, "post_acc": after}
        self.directory.write_chunk(chunk, **measured, restored=session.restore())

    @cached_property
    def _downstream_before(self) -> float:
        return self._downstream_accuracy()

    def _downstream_accuracy(self) -> float:
        assert self.config.downstream is not None
        wanted = f"{self.config.downstream.task} acc"
        scores = self.session.task_scores(downstream_tasks(self.config))
        if wanted not in scores:
            raise ValueError(
                f"downstream.task must have the metric acc; got one with {short(list(scores))}"
            )
        return scores[wanted].value


def downstream_tasks(config: BenchConfig) -> Any:
    """Find the downstream task of a configuration that has one; errors are those of `Tasks`."""
    from baft_easyedit.harness import Tasks

    task = config.downstream
    assert task is not None
    where = None if task.include_path is None else Path(task.include_path)
    return Tasks([task.task], where, task.limit)


def _peak_memory() -> int:
    """Return the peak of memory in bytes: on CUDA since the reset, else of the process so far.

    It includes the spare copy of the model that `verify` keeps.
    """
    if torch.cuda.is_available():
        devices = range(torch.cuda.device_count())
        return sum(torch.cuda.max_memory_allocated(device) for device in devices)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def basis_record(session: Session, request: Mapping[str, Any]) -> Mapping[str, Any]:
    """Record the gate on a case's prompt, rephrasing and locality probes, each with its answer.

    Returns:
        `basis` and `update`, each with `rewrite`, `rephrase` and `locality`: by layer, w_k and
        |w_k (v_k - (R h)_k)|, averaged over intervened positions and probes; None for a kind of
        prompt that the case lacks, and for `update` where each edit has bases of its own. None for
        both if the model carries no edit.
    """
    edit = attached_edit(session.model)
    if edit is None:
        return NO_RECORD
    record: dict[str, dict[str, LayerValues | None]] = {"basis": {}, "update": {}}
    for kind in ("rewrite", "rephrase", "locality"):
        asked = [q for q in questions_of(request) if q.section == kind]
        pairs = [(q.prompt, q.answer) for q in asked if q.answer]
        seen = _observe(session, edit, pairs) if pairs else (None, None)
        record["basis"][kind], record["update"][kind] = seen
    return record


@torch.no_grad()
def _observe(
    session: Session, edit: ModelEdit, pairs: list[tuple[str, str]]
) -> tuple[LayerValues, LayerValues | None]:
    """Run texts of one kind; return mean weight and mean size of the update of each basis."""
    tok, form = session.editor.tok, PromptFormat.of(session.editor.hparams)
    rows = [
        TextRow(form.whole_ids(*pair, tok), len(form.prompt_ids(pair[0], tok)), is_edit=True)
        for pair in pairs
    ]
    forward = full_forward(session.model, edit, [rows])
    with edit.recording() as record:
        forward()
    assert record.positions is not None  # a forward of tokens has set them
    weights, update, is_shared = {}, {}, edit.min_similarity is None
    for layer, hidden in record.hidden.items():
        here = record.positions.to(hidden.device)
        edited, values = hidden[here].float(), record.weights[layer][here]  # [N, D], [N, r]
        sizes = (values * edit.intervention(layer).step(edited)).abs()  # [N, r]
        weights[str(layer)] = values.mean(0).tolist()
        update[str(layer)] = sizes.mean(0).tolist()
    return weights, update if is_shared else None


def basis_usage(model: Any) -> LayerValues | None:
    """Return the mean weight of each basis over all edits so far, by layer; None without edit."""
    edit = attached_edit(model)
    if edit is None or edit.min_similarity is not None:  # each edit has bases of its own
        return None
    return {
        str(i): (edit.usage(i).total / edit.usage(i).count.clamp_min(1)).tolist()
        for i in edit.layers
    }
