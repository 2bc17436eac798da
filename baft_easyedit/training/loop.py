"""The optimisation loop: minimise the objective over an edit's parameters with AdamW.

One edit, or E independent ones side by side.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from baft_easyedit.hparams import BaFTHyperParams
from baft_easyedit.method.gate_report import GateReport, LayerGates
from baft_easyedit.model.edit import Snapshot
from baft_easyedit.model.hooks import ModelEdit
from baft_easyedit.model.inspect import input_device
from baft_easyedit.training.coordinates import Coordinates
from baft_easyedit.training.cuda_graph import KnownSteps
from baft_easyedit.training.recordings import Recordings
from baft_easyedit.training.rehearsal import Rehearsal
from baft_easyedit.training.requests import TextRow
from baft_easyedit.training.step import Descent, Objective, Step

_CHECK_EVERY = 4
"""Steps between two looks at the losses on a GPU, where each look waits for it."""


@dataclass(frozen=True)
class StepLosses:
    """The terms of the objective before a step, unscaled; None for a term that is not in use."""

    answer: float
    balance: float | None = None
    locality: float | None = None
    rehearsal: float | None = None
    """The answer loss of the rehearsed edits."""


@dataclass(frozen=True)
class EditReport:
    """What one edit call did."""

    num_requests: int
    num_steps: int
    """Optimiser steps taken."""
    losses: tuple[StepLosses, ...]
    """The terms before each step, and after the last one: one entry more than the steps."""
    stopped_early: bool
    time_s: float
    """Seconds; of edits learned side by side, each one's share."""
    gates: GateReport | None = None
    """What the gates did at the end; None for ReFT, which has none, and if no step was taken."""
    request_losses: tuple[float, ...] = ()
    """The last answer loss of each request, in nats per token."""
    learned: tuple[bool, ...] = ()
    """Whether each request was learned: its target is what greedy decoding gives at the end."""
    consolidation: "EditReport | None" = None
    """What going over all remembered edits did, if it was time for that after this edit."""
    engine: str = "full"
    """How the model was run in the last step: `cached` or `full`."""
    engine_note: str | None = None
    """Why it used none; None if it was, or if the hyper-parameters did not ask for that."""

    def __repr__(self) -> str:
        stop = "stopped early" if self.stopped_early else "all steps"
        missed = f", {self.learned.count(False)} not learned" if False in self.learned else ""
        return (
            f"EditReport({self.num_requests} requests{missed}, {self.num_steps} steps ({stop}), "
            f"{self.time_s:.2f} s, "
            f"answer loss {self.losses[0].answer:.3f} -> {self.final_loss:.3f})"
        )

    @property
    def final_loss(self) -> float:
        """The last answer loss that was computed, in nats per token."""
        return self.losses[-1].answer


class Learned(NamedTuple):
    """What learning an edit gave."""

    state: Snapshot
    """For `ModelEdit.restore`."""
    report: EditReport


def learn(
    model: nn.Module,
    edit: ModelEdit,
    edits: Sequence[Sequence[TextRow]],
    hparams: BaFTHyperParams,
    rehearsal: Rehearsal | None = None,
    recordings: Recordings | None = None,
    own: Mapping[int, Tensor] | None = None,
) -> list[Learned]:
    """Learn rows into an attached edit, or into E independent ones.

    Args:
        model: The model that `edit` is attached to; its weights do not change.
        edit: Where to start; its parameters are changed.
        edits: The rows of each of the E edits, as many for each, the requests first; a single edit
            without rows learns what is rehearsed only.
        hparams: How to learn.
        rehearsal: Past edits, to learn again in each step.
        recordings: What the prefix cache knows of texts from earlier calls; it is added to.
        own: States of the model's own texts, for R_loc; see `descent.Objective`.

    Returns:
        For each of the E edits, its state when it was done, and its report.

    Raises:
        FloatingPointError: If a loss is not finite.
        ValueError: If the engine is `cached`, and the model cannot use a cached prefix.
    """
    from baft_easyedit.training.engine import Engine  # it imports transformers

    start = time.perf_counter()
    edit.follow(model)
    coordinates = Coordinates(edit)
    optimizer = make_optimizer(coordinates, hparams)
    run = _Run(edit, edits, hparams)
    known = None
    if rehearsal is None and _repeats_steps(model, edit):
        known = edit.caches.setdefault(KnownSteps, KnownSteps())
    with _frozen(model):
        engine = Engine(model, edit, hparams.engine, recordings, known is not None)
        descent = Descent(edit, hparams, known, own)
        forward = None
        while True:
            if rehearsal is not None:
                step = descent.step(engine.prepare(edits, rehearsal.draw()))
            elif forward is None:
                forward, step = engine.start(edits, descent.step)
            else:
                step = descent.step(forward)
            if run.is_over_after(step):
                break
            coordinates.pull_back()
            optimizer.step()
            coordinates.follow()
        edit.zero_grad()  # gradients lie in memory that is used again
    results = run.results((time.perf_counter() - start) / edit.num_edits)
    return [
        Learned(state, replace(report, engine=engine.name, engine_note=engine.note))
        for state, report in results
    ]


def answered_now(
    model: nn.Module, edit: ModelEdit, rows: Sequence[TextRow], hparams: BaFTHyperParams
) -> tuple[tuple[float, ...], tuple[bool, ...]]:
    """Return the answer losses of requests, in nats per token, and which are answered rightly.

    Args:
        model: The model that `edit` is attached to.
        edit: A single edit.
        rows: What it was learned from, irrelevant prompts or not.
        hparams: How.
    """
    from baft_easyedit.training.prefix_cache import FullForward  # it imports transformers

    requests = [row for row in rows if row.is_edit]
    with evaluating(model):
        step = Objective(edit, hparams).value(FullForward(model, edit).prepare([requests]))
    misses = step.row_misses.tolist()
    return tuple(step.row_losses.tolist()), tuple(missed == 0 for missed in misses)


def _repeats_steps(model: nn.Module, edit: ModelEdit) -> bool:
    """Tell whether it gains anything to keep captured steps for later edit calls.

    Not beside other edits, where a step is long and its padding costs more.
    """
    return edit.num_edits == 1 and input_device(model).type == "cuda"


def make_optimizer(coordinates: Coordinates, hparams: BaFTHyperParams) -> torch.optim.Optimizer:
    """Make AdamW, in one kernel for each learning rate; gates and bases may have their own."""
    moved = coordinates.moved
    alike: dict[float, list[Tensor]] = {}
    for name, value in moved.items():
        own = hparams.gate_lr if ".gate." in name else None
        own = hparams.basis_lr if name.endswith(".basis") else own
        alike.setdefault(hparams.lr if own is None else own, []).append(value)
    groups = [{"params": group, "lr": lr} for lr, group in alike.items()]
    # Not every device has the kernel.
    can_fuse = all(value.device.type in ("cpu", "cuda") for value in moved.values())
    return torch.optim.AdamW(groups, weight_decay=hparams.weight_decay, fused=can_fuse)


class _Answered(NamedTuple):
    """How a request's answer is known after a step."""

    loss: float
    """In nats per token."""
    is_learned: bool


class _Done(NamedTuple):
    """What an edit was when it stopped."""

    num_steps: int
    requests: list["_Answered"]
    state: Snapshot
    gates: GateReport | None


class _Run:
    """Follows the losses of E edits: which are done, and what they had learned by then."""

    def __init__(
        self,
        edit: ModelEdit,
        edits: Sequence[Sequence[TextRow]],
        hparams: BaFTHyperParams,
    ) -> None:
        self._edit = edit
        self._num_requests = sum(row.is_edit for row in edits[0])
        self._hparams = hparams
        self._unread: list[dict[str, Tensor]] = []  # terms of the latest steps, [E]
        self._terms: list[dict[str, list[float]]] = []  # of those before
        self._done: dict[int, _Done] = {}

    def is_over_after(self, step: Step) -> bool:
        """Take note of a step; return whether all edits are done.

        Raises:
            FloatingPointError: If a loss is not finite.
        """
        self._unread.append({name: term.clone() for name, term in step.terms.items()})
        num_steps = len(self._terms) + len(self._unread) - 1
        is_last = num_steps == self._hparams.num_steps
        every = 1 if step.loss.device.type == "cpu" else _CHECK_EVERY
        if num_steps % every and not is_last:
            return False
        row_losses, row_misses = self._read(step)
        answered = [
            [_Answered(loss, missed == 0) for loss, missed in zip(losses, misses, strict=True)]
            for losses, misses in zip(row_losses, row_misses, strict=True)
        ]
        done = {
            i: requests
            for i, requests in enumerate(row[: self._num_requests] for row in answered)
            if i not in self._done and (is_last or self._may_stop(i, requests))
        }
        if done:
            self._done |= self._finished(num_steps, done, step)
        return len(self._done) == self._edit.num_edits

    def _read(self, step: Step) -> tuple[list[list[float]], list[list[float]]]:
        """Take note of the latest terms; return the losses and misses of each edit's rows.

        It waits for the device once.
        """
        device = step.row_losses.device
        terms = [term.to(device) for terms in self._unread for term in terms.values()]
        numbers = torch.cat([*terms, step.row_losses, step.row_misses]).tolist()
        edits = self._edit.num_edits
        by_edit = iter([numbers[i : i + edits] for i in range(0, len(terms) * edits, edits)])
        latest = [{name: next(by_edit) for name in terms} for terms in self._unread]
        self._unread.clear()
        self._terms += latest
        _check_finite(latest, set(self._done))
        rest = numbers[len(terms) * edits :]
        each = len(rest) // (2 * edits)
        by_rows = [rest[i : i + each] for i in range(0, len(rest), each)]
        return by_rows[:edits], by_rows[edits:]

    def _may_stop(self, i: int, requests: Sequence[_Answered]) -> bool:
        """Tell whether edit i may stop early: not for a low mean that one request is far from."""
        h, terms = self._hparams, self._terms[-1]
        is_rehearsed = "rehearsal" not in terms or terms["rehearsal"][i] <= h.rehearsal_stop_loss
        is_low = terms["answer"][i] < h.early_stop_loss
        return (
            is_low
            and is_rehearsed
            and all(request.is_learned or request.loss < h.early_stop_loss for request in requests)
        )

    def _finished(
        self, num_steps: int, answered: Mapping[int, list[_Answered]], step: Step
    ) -> dict[int, _Done]:
        """Return what edits have learned, their own usage counted as past, by their indices.

        Args:
            num_steps: Steps that they took.
            answered: The requests of each.
            step: The last step.
        """
        total, count = self._edit.joint_usage().with_current(step.weights, step.new)
        usage = {layer: (total[k], count[k]) for k, layer in enumerate(self._edit.layers)}
        has_gates = self._hparams.gate != "one" and num_steps > 0 and self._num_requests > 0
        reports = _gate_reports(list(answered), step, usage) if has_gates else {}
        return {
            i: _Done(num_steps, requests, self._state(i, step, usage), reports.get(i))
            for i, requests in answered.items()
        }

    def _state(self, i: int, step: Step, usage: Mapping[int, tuple[Tensor, Tensor]]) -> Snapshot:
        """Return what an edit has learned, its usage and the states that it uses as past ones."""
        used, irrelevant = (
            {
                layer: hidden[i][at[i].to(hidden.device)]
                for layer, hidden in zip(self._edit.layers, step.hidden, strict=True)
            }
            for at in (step.new, step.irrelevant)
        )
        return self._edit.state_of(i, usage, used, irrelevant)

    def results(self, time_s: float) -> list[Learned]:
        """Return the states and reports of all edits.

        Args:
            time_s: Seconds of each edit.
        """
        return [self._result(i, time_s) for i in range(self._edit.num_edits)]

    def _result(self, i: int, time_s: float) -> Learned:
        """Return the state and report of one edit."""
        done = self._done[i]
        terms = self._terms[: done.num_steps + 1]
        report = EditReport(
            num_requests=self._num_requests,
            num_steps=done.num_steps,
            losses=tuple(
                StepLosses(**{name: values[i] for name, values in t.items()}) for t in terms
            ),
            stopped_early=done.num_steps < self._hparams.num_steps,
            time_s=time_s,
            gates=done.gates,
            request_losses=tuple(request.loss for request in done.requests),
            learned=tuple(request.is_learned for request in done.requests),
        )
        return Learned(done.state, report)


def _gate_reports(
    edits: Sequence[int], step: Step, usage: Mapping[int, tuple[Tensor, Tensor]]
) -> dict[int, GateReport]:
    """Sum up what the gates of some edits did in a forward, on the CPU."""
    weights, new, irrelevant = (t.cpu() for t in (step.weights, step.new, step.irrelevant))
    means = {layer: (total / count[:, None]).cpu() for layer, (total, count) in usage.items()}
    return {
        i: GateReport(
            {
                layer: LayerGates.of(here[i][new[i]], here[i][irrelevant[i]], mean[i])
                for here, (layer, mean) in zip(weights, means.items(), strict=True)
            }
        )
        for i in edits
    }


def _check_finite(steps: Sequence[Mapping[str, Sequence[float]]], done: set[int]) -> None:
    """Raise FloatingPointError if a term of an edit that is not done is not finite."""
    for terms in steps:
        for name, values in terms.items():
            for i, value in enumerate(values):
                if i not in done and not math.isfinite(value):
                    raise FloatingPointError(
                        f"the {name} loss became {value}: the edit was undone; lower lr, or load "
                        "the model in a wider dtype"
                    )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode, and everything back after.

    It also keeps gradient checkpointing out, whose recomputation would run the hooks twice.
    """
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Compute gradients, in eval mode, for no parameter of the model; put everything back after."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    try:
        for p in trainable:
            p.requires_grad_(False)
        with evaluating(model), torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for p in trainable:
            p.requires_grad_(True)
