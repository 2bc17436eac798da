"""The training loop: AdamW minimises the objective (Eq. 4) over the parameters of an edit.

The edit is a single one, or E independent ones that are trained side by side.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from baft_easyedit.hparams import BaFTHyperParams
from baft_easyedit.method.gate_report import GateReport, LayerGates
from baft_easyedit.method.objective import token_losses
from baft_easyedit.model.edit import Change, Snapshot
from baft_easyedit.model.hooks import ModelEdit
from baft_easyedit.model.independent import IndependentEdits
from baft_easyedit.model.inspect import input_device
from baft_easyedit.training.coordinates import Coordinates
from baft_easyedit.training.known_steps import KnownSteps
from baft_easyedit.training.requests import TextRow
from baft_easyedit.training.stand_ins import centres
from baft_easyedit.training.step import StepResult, TrainingStep, row_scores

_CHECK_EVERY = 4
"""Steps between two looks at the losses on a GPU, where each look waits for the device."""


@dataclass(frozen=True)
class StepLosses:
    """The terms of the objective before a step, unscaled; None for a term that is not in use."""

    answer: float
    balance: float | None = None
    locality: float | None = None


@dataclass(frozen=True)
class EditReport:
    """A report of one edit call."""

    num_requests: int
    num_steps: int
    """Optimiser steps taken."""
    losses: tuple[StepLosses, ...]
    """The terms before each step and after the last one: steps + 1 entries."""
    stopped_early: bool
    time_s: float
    """Seconds; for edits learned side by side, the time of all divided by their number."""
    gates: GateReport | None = None
    """The gates' weights after the last step; None for ReFT (no gates), without a step, and for
    several requests with bases of their own."""
    request_losses: tuple[float, ...] = ()
    """The last answer loss of each request, in nats per token."""
    learned: tuple[bool, ...] = ()
    """Whether each request was learned: greedy decoding gives its target at the end."""
    engine: str = "full"
    """The forward of the last step: on a `cached` prefix, or in `full`."""
    engine_note: str | None = None
    """Why the model cannot use a cached prefix; None if it can, or was not asked to."""

    def __repr__(self) -> str:
        stop = "stopped early" if self.stopped_early else "all steps"
        missed = f", {self.learned.count(False)} not learned" if False in self.learned else ""
        return (
            f"EditReport({self.num_requests} requests{missed}, {self.num_steps} steps ({stop}), "
            f"{self.time_s:.2f} s, "
            f"answer loss {self.losses[0].answer:.3f} -> {self.final_loss:.3f})"
        )

    @classmethod
    def of_all(cls, reports: Sequence["EditReport"]) -> "EditReport":
        """Return one report of requests that were learned apart in one call.

        The terms are the means over the requests; one that stopped keeps those of its last step.
        """
        num_steps = max(report.num_steps for report in reports)
        losses = []
        for step in range(num_steps + 1):
            terms = [vars(report.losses[: step + 1][-1]) for report in reports]
            means: dict[str, Any] = {
                name: None if None in (own := [each[name] for each in terms]) else fmean(own)
                for name in terms[0]
            }
            losses.append(StepLosses(**means))
        return cls(
            num_requests=sum(report.num_requests for report in reports),
            num_steps=num_steps,
            losses=tuple(losses),
            stopped_early=all(report.stopped_early for report in reports),
            time_s=sum(report.time_s for report in reports),
            engine=reports[0].engine,
            engine_note=reports[0].engine_note,
        )

    @property
    def final_loss(self) -> float:
        """The answer loss after the last step, in nats per token."""
        return self.losses[-1].answer


class Learned(NamedTuple):
    """The result of learning one edit."""

    state: Snapshot
    """The edit's state, for `ModelEdit.restore`."""
    report: EditReport
    start: Change | None = None
    """The change of the edit after which it was learned; None for a new edit."""


def train(
    model: nn.Module,
    edit: ModelEdit,
    edits: Sequence[Sequence[TextRow]],
    hparams: BaFTHyperParams,
) -> list[Learned]:
    """Train an attached edit, or E independent ones, on tokenised texts.

    Args:
        model: The model that `edit` is attached to; its weights do not change.
        edit: The edit to train, from its present parameters, which are changed.
        edits: The rows of each of the E edits, equally many for each, the requests first.
        hparams: Hyper-parameters of the edit call.

    Returns:
        For each of the E edits, its state at the step where it stopped, and its report.

    Raises:
        FloatingPointError: If a loss is not finite.
        ValueError: If the engine is `cached`, and the model cannot use a cached prefix.
    """
    from baft_easyedit.training.prefix_cache import prepared  # it imports transformers

    start = time.perf_counter()
    edit.follow(model)
    coordinates = Coordinates(edit)
    optimizer = make_optimizer(coordinates, hparams)
    with evaluating(model):
        around = centres(model, edit, [rows[0] for rows in edits])
    progress = _Progress(edit, edits, hparams, around)
    known = _known_steps(model, edit)
    with _frozen(model), edit.learning():
        forward, note = prepared(model, edit, edits, hparams.engine, known is not None)
        training_step = TrainingStep(edit, hparams, forward, known)
        while True:
            step = training_step.run()
            if progress.is_over_after(step):
                break
            coordinates.pull_back()
            optimizer.step()
            coordinates.follow()
        edit.zero_grad()  # a later step may overwrite the memory of the gradients
    time_s = (time.perf_counter() - start) / edit.num_edits
    engine = "cached" if forward.is_cached else "full"
    told: dict[str, Any] = dict(time_s=time_s, engine=engine, engine_note=note)
    results = [progress.results[i] for i in range(edit.num_edits)]
    return [one._replace(report=replace(one.report, **told)) for one in results]


@torch.no_grad()
def answered_now(model: nn.Module, edit: ModelEdit, row: TextRow) -> tuple[float, bool]:
    """Return the answer loss of a request, in nats per token, and whether the model answers it.

    Args:
        model: The model, edited or not.
        edit: The edit that it carries, if any.
        row: The request's text.
    """
    from baft_easyedit.training.prefix_cache import full_forward  # it imports transformers

    forward = full_forward(model, edit, [[row]])
    with evaluating(model):
        logits = forward()
    losses, misses = row_scores(logits, token_losses(logits, forward.layout.labels), forward.layout)
    return losses.item(), misses.item() == 0


def _known_steps(model: nn.Module, edit: ModelEdit) -> KnownSteps | None:
    """Return the captured steps that edit calls on a GPU use again.

    Those of independent edits are not kept: they are long, so padding them to few sizes costs more.
    """
    if isinstance(edit, IndependentEdits) or not _is_on_gpu(model):
        return None
    return edit.caches.setdefault(KnownSteps, KnownSteps())


def _is_on_gpu(model: nn.Module) -> bool:
    """Tell whether a model computes on a CUDA device."""
    return input_device(model).type == "cuda"


def make_optimizer(coordinates: Coordinates, hparams: BaFTHyperParams) -> torch.optim.Optimizer:
    """Make AdamW with one parameter group for each learning rate, lr and gate_lr."""
    moved = coordinates.moved
    alike: dict[float, list[Tensor]] = {}
    for name, value in moved.items():
        own = hparams.gate_lr if ".gate." in name else None
        alike.setdefault(hparams.lr if own is None else own, []).append(value)
    groups = [{"params": group, "lr": lr} for lr, group in alike.items()]
    # Not every device has the fused kernel.
    can_fuse = all(value.device.type in ("cpu", "cuda") for value in moved.values())
    return torch.optim.AdamW(groups, weight_decay=hparams.weight_decay, fused=can_fuse)


class _Progress:
    """Follows the losses of E edits, and takes each edit's state and report when it stops."""

    def __init__(
        self,
        edit: ModelEdit,
        edits: Sequence[Sequence[TextRow]],
        hparams: BaFTHyperParams,
        centres: Sequence[Mapping[int, Tensor]],
    ) -> None:
        self.results: dict[int, Learned] = {}
        """The result of each edit that stopped; its report lacks the time and the engine."""
        self._edit = edit
        self._start = edit.snapshot()
        self._centres = centres
        self._num_prompt = [min(edit.num_prompt_positions, rows[0].prompt_length) for rows in edits]
        self._texts = [
            torch.tensor(rows[0].hashes()[rows[0].prompt_length - num :])
            for rows, num in zip(edits, self._num_prompt, strict=True)
        ]
        self._num_requests = sum(row.is_edit for row in edits[0])
        self._hparams = hparams
        self._unread: list[dict[str, Tensor]] = []  # terms of the latest steps, [E], on the device
        self._terms: list[dict[str, list[float]]] = []  # terms of the steps before, on the host

    def is_over_after(self, step: StepResult) -> bool:
        """Record the losses of a step; return whether all edits have stopped.

        Raises:
            FloatingPointError: If a loss is not finite.
        """
        self._unread.append({name: term.clone() for name, term in step.terms.items()})
        num_steps = len(self._terms) + len(self._unread) - 1
        is_last = num_steps == self._hparams.num_steps
        every = 1 if step.row_losses.device.type == "cpu" else _CHECK_EVERY
        if num_steps % every and not is_last:
            return False
        losses, misses = self._read(step)
        running = [i for i in range(self._edit.num_edits) if i not in self.results]
        stopped = [i for i in running if is_last or self._may_stop(i, losses[i], misses[i])]
        if stopped:
            self._take_results(stopped, losses, misses, step)
        return len(self.results) == self._edit.num_edits

    def _read(self, step: StepResult) -> tuple[list[list[float]], list[list[float]]]:
        """Read the unread terms; return each edit's losses and misses of its requests.

        All numbers come in one transfer, as each transfer waits for the device.
        """
        device, edits = step.row_losses.device, self._edit.num_edits
        terms = [term.to(device) for terms in self._unread for term in terms.values()]
        numbers = torch.cat([*terms, step.row_losses, step.row_misses]).tolist()
        by_edit = iter([numbers[i : i + edits] for i in range(0, len(terms) * edits, edits)])
        latest = [{name: next(by_edit) for name in terms} for terms in self._unread]
        self._unread.clear()
        self._terms += latest
        _check_finite(latest, set(self.results))
        rest = numbers[len(terms) * edits :]
        each = len(rest) // (2 * edits)
        by_rows = [rest[i : i + each][: self._num_requests] for i in range(0, len(rest), each)]
        return by_rows[:edits], by_rows[edits:]

    def _may_stop(self, i: int, losses: Sequence[float], misses: Sequence[float]) -> bool:
        """Tell whether edit i may stop early.

        A low mean loss is not enough: each request must be answered, or have a low loss itself.
        """
        h, terms = self._hparams, self._terms[-1]
        is_low = terms["answer"][i] < h.early_stop_loss
        each_is_low = (
            missed == 0 or loss < h.early_stop_loss
            for loss, missed in zip(losses, misses, strict=True)
        )
        return is_low and all(each_is_low)

    def _take_results(
        self,
        stopped: Sequence[int],
        losses: Sequence[Sequence[float]],
        misses: Sequence[Sequence[float]],
        step: StepResult,
    ) -> None:
        """Take the states and reports of the edits that stop now, after a step."""
        num_steps = len(self._terms) - 1
        total, count = self._edit.joint_usage().with_current(step.weights, step.edited)
        usage = {layer: (total[k], count[k]) for k, layer in enumerate(self._edit.layers)}
        has_gates = self._hparams.gate != "one" and num_steps > 0
        gates = _gate_reports(stopped, step, usage) if has_gates else {}
        for i in stopped:
            terms = [{name: values[i] for name, values in t.items()} for t in self._terms]
            report = EditReport(
                num_requests=self._num_requests,
                num_steps=num_steps,
                losses=tuple(StepLosses(**values) for values in terms),
                stopped_early=num_steps < self._hparams.num_steps,
                time_s=0.0,
                gates=gates.get(i),
                request_losses=tuple(losses[i]),
                learned=tuple(missed == 0 for missed in misses[i]),
            )
            used = {
                layer: hidden[i][step.edited[i].to(hidden.device)]
                for layer, hidden in zip(self._edit.layers, step.hidden, strict=True)
            }
            own = self._texts[i], self._centres[i], self._num_prompt[i]
            state = self._edit.state_of(i, self._start, usage, used, *own)
            self.results[i] = Learned(state, report)


def _gate_reports(
    edits: Sequence[int], step: StepResult, usage: Mapping[int, tuple[Tensor, Tensor]]
) -> dict[int, GateReport]:
    """Report the basis weights of some edits in a forward; the statistics run on the CPU."""
    weights, edited, irrelevant = (t.cpu() for t in (step.weights, step.edited, step.irrelevant))
    means = {layer: (total / count[:, None]).cpu() for layer, (total, count) in usage.items()}
    return {
        i: GateReport(
            {
                layer: LayerGates.of(here[i][edited[i]], here[i][irrelevant[i]], mean[i])
                for here, (layer, mean) in zip(weights, means.items(), strict=True)
            }
        )
        for i in edits
    }


def _check_finite(steps: Sequence[Mapping[str, Sequence[float]]], done: set[int]) -> None:
    """Raise FloatingPointError if a term of an edit that has not stopped is not finite."""
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
    """Put a model into eval mode in this context.

    Eval mode also switches off gradient checkpointing, which would run the hooks twice.
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
    """Enable gradients in this context, but not for the model's parameters, and set eval mode."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    try:
        for p in trainable:
            p.requires_grad_(False)
        with evaluating(model), torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for p in trainable:
            p.requires_grad_(True)
