"""BaFTEditor: learn an edit from requests, go on from what is learned, and undo.

One edit call minimises the objective over the parameters of the model's `ModelEdit` with AdamW; the
model's own weights never change. Shapes: B rows of a batch, T columns.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from baft_easyedit.diagnostics import GateReport, LayerGates
from baft_easyedit.hooks import (
    ModelEdit,
    Snapshot,
    attached_edit,
    check_layers,
    decoder_layers,
    input_device,
    text_config,
)
from baft_easyedit.hparams import BaFTHyperParams
from baft_easyedit.objective import Rescaling, answer_loss, load_balance, locality_margin
from baft_easyedit.requests import EditBatch, as_requests, build_batch


@dataclass(frozen=True)
class StepLosses:
    """The terms of the objective before a step, unscaled; None for a term that is not in use."""

    answer: float
    balance: float | None = None
    locality: float | None = None


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
    gates: GateReport | None = None
    """What the gates did at the end; None for ReFT, which has none, and if no step was taken."""

    @property
    def final_loss(self) -> float:
        """The last answer loss that was computed, in nats per token."""
        return self.losses[-1].answer


class _Step(NamedTuple):
    """What one forward of a batch gives."""

    terms: dict[str, Tensor]
    """The terms of the objective that are in use: scalars, averaged over the edited layers."""
    edit_weights: dict[int, Tensor]
    """Basis weights of each layer at the N intervened positions of the edits, [N, r]."""
    irrelevant_weights: dict[int, Tensor]
    """Those at the M intervened positions of the irrelevant prompts, [M, r]."""


class _State(NamedTuple):
    """All that an edit call changes."""

    learned: Snapshot
    attached: bool


class BaFTEditor:
    """Edits a causal language model in place, by hooks that can be taken off again.

    Several edit calls learn one after another into the same parameters (continual editing). A new
    editor on a model that carries an edit goes on with that edit.

    Args:
        model: A decoder-only Hugging Face model.
        tokenizer: Its tokenizer.
        hparams: Hyper-parameters of BaFT or ReFT.
        seed: Seed of the random initial bases; that of `hparams` if None.
        undo_depth: How many edit calls `undo` can take back.

    Raises:
        ValueError: If a layer is beyond the model's depth, the rank exceeds its hidden size, it has
            no recognisable decoder stack, or it carries an edit of other shape.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        hparams: BaFTHyperParams,
        seed: int | None = None,
        undo_depth: int = 10,
    ) -> None:
        if undo_depth < 1:
            raise ValueError(f"undo_depth must be at least 1; got {undo_depth}")
        config = text_config(model)
        check_layers(hparams.layers, len(decoder_layers(model)))
        self.model: Any = model
        self.tokenizer = tokenizer
        self.hparams = hparams
        self.max_context: int | None = getattr(config, "max_position_embeddings", None)
        self._history: deque[_State] = deque(maxlen=undo_depth)
        carried = attached_edit(model)
        if carried is not None:
            _check_same_shape(carried, hparams)
        self.model_edit = carried or ModelEdit(
            config.hidden_size,
            hparams.layers,
            hparams.rank,
            hparams.gate,
            hparams.num_prompt_positions,
            hparams.seed if seed is None else seed,
        )

    @property
    def is_attached(self) -> bool:
        """Whether the model computes with this editor's edit now."""
        return attached_edit(self.model) is self.model_edit

    def edit(self, requests: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> EditReport:
        """Write one request, or a batch of them at once, into the model.

        Args:
            requests: EasyEdit's request dicts; `prompt` and `target_new` are needed, `subject` is
                checked, `loc_prompt` (a text or a list of texts) is used by R_loc.

        Returns:
            What was done and what it cost.

        Raises:
            ValueError: If a request is unusable; nothing has changed then.
            TypeError: If a request has values of the wrong type; likewise.
            FloatingPointError: If the loss is not finite; the edit has been undone then.
        """
        batch = self._batch(requests)
        before = _State(self.model_edit.snapshot(), self.is_attached)
        try:
            if not before.attached:
                self.model_edit.attach(self.model)
            report = self._learn(batch)
        except BaseException:
            self._go_back(before)
            raise
        self._history.append(before)
        return report

    def undo(self) -> None:
        """Go back to the state before the latest edit call, bit for bit.

        Raises:
            ValueError: If there is no edit call left to undo.
        """
        if not self._history:
            raise ValueError(
                "there is no edit to undo: edit() was not called, or undo_depth is used up"
            )
        self._go_back(self._history.pop())

    def _go_back(self, state: _State) -> None:
        """Restore an earlier state; the model's own outputs come back with the hooks off."""
        self.model_edit.restore(state.learned)
        if not state.attached:
            self.model_edit.detach()

    def _batch(self, requests: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> EditBatch:
        """Check and tokenise requests."""
        h = self.hparams
        return build_batch(
            as_requests(requests),
            self.tokenizer,
            max_context=self.max_context,
            use_chat_template=h.use_chat_template,
            with_irrelevant=h.locality,
            loc_positions=None if h.loc_positions == "all" else 0,
            device=input_device(self.model),
        )

    def _learn(self, batch: EditBatch) -> EditReport:
        """Minimise the objective on a batch, and count its basis weights as past."""
        from baft_easyedit import replay  # it imports transformers

        h = self.hparams
        start = time.perf_counter()
        gates = [{"params": self.model_edit.gate_parameters(), "lr": h.gate_lr or h.lr}]
        others = [{"params": self.model_edit.subspace_parameters()}]
        optimizer = torch.optim.AdamW(others + gates, lr=h.lr, weight_decay=h.weight_decay)
        rescaling = Rescaling(h.rescaling)
        losses: list[StepLosses] = []
        with _frozen(self.model), self.model_edit.prompt_lengths(batch.prompt_lengths):
            forward = replay.make_engine(self.model, self.model_edit, batch, h.engine)
            while True:
                step = self._step(batch, forward)
                losses.append(_as_floats(step.terms))
                if losses[-1].answer < h.early_stop_loss or len(losses) > h.num_steps:
                    break
                optimizer.zero_grad()
                torch.autograd.backward(self._total(step.terms, rescaling))
                optimizer.step()
        num_steps = len(losses) - 1
        report = self._gate_report(step) if num_steps else None
        for layer, weights in step.edit_weights.items():
            self.model_edit.usage(layer).add(weights.detach())
        return EditReport(
            num_requests=batch.num_edits,
            num_steps=num_steps,
            losses=tuple(losses),
            stopped_early=num_steps < h.num_steps,
            time_s=time.perf_counter() - start,
            gates=report,
        )

    def _step(self, batch: EditBatch, forward: Callable[[], Tensor]) -> _Step:
        """Run the model once and compute the objective's terms.

        Args:
            batch: What is learned.
            forward: Returns the logits of its last columns.
        """
        h = self.hparams
        with self.model_edit.recording() as record:
            logits = forward()[: batch.num_edits]  # [B, n, V]
        labels = batch.labels[: batch.num_edits, -logits.shape[1] :].to(logits.device)
        terms = {"answer": answer_loss(logits, labels)}
        edits = record.weights_of(slice(None, batch.num_edits))
        irrelevant = record.weights_of(slice(batch.num_edits, None))
        if h.balance:
            terms["balance"] = _mean(
                load_balance(self.model_edit.usage(i).mean_with(w)) for i, w in edits.items()
            )
        if h.locality and len(batch.input_ids) > batch.num_edits:
            terms["locality"] = _mean(
                locality_margin(w, irrelevant[i], h.alpha, h.beta, h.gamma)
                for i, w in edits.items()
            )
        return _Step(terms, edits, irrelevant)

    def _gate_report(self, step: _Step) -> GateReport | None:
        """Sum up what the gates did in the last forward; None for ReFT."""
        if self.hparams.gate == "one":
            return None
        return GateReport(
            {
                layer: LayerGates.of(
                    weights,
                    step.irrelevant_weights[layer],
                    self.model_edit.usage(layer).mean_with(weights),
                )
                for layer, weights in step.edit_weights.items()
            }
        )

    def _total(self, terms: Mapping[str, Tensor], rescaling: Rescaling) -> Tensor:
        """Add up the objective (Liu et al. 2025, Eq. 4)."""
        coefs = {"balance": self.hparams.balance_coef, "locality": self.hparams.locality_coef}
        total = answer = terms["answer"]
        for name, coef in coefs.items():
            if name in terms:
                term = terms[name].to(answer.device)
                total = total + coef * rescaling.factor(name, term, answer) * term
        return total


def _as_floats(terms: Mapping[str, Tensor]) -> StepLosses:
    """Read the terms of one step.

    Raises:
        FloatingPointError: If a term is not finite.
    """
    values = {name: term.item() for name, term in terms.items()}
    for name, value in values.items():
        if not math.isfinite(value):
            raise FloatingPointError(
                f"the {name} loss became {value}: the edit was undone; lower lr, or load the model "
                "in a wider dtype"
            )
    return StepLosses(**values)


def _mean(terms: Iterable[Tensor]) -> Tensor:
    """Average scalars that may live on several devices."""
    values = list(terms)
    return torch.stack([value.to(values[0].device) for value in values]).mean()


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Compute gradients, in eval mode, for no parameter of the model; put everything back after.

    Eval mode also keeps gradient checkpointing out, whose recomputation would run the hooks twice.
    """
    training = [module for module in model.modules() if module.training]
    trainable = [p for p in model.parameters() if p.requires_grad]
    model.eval()
    for p in trainable:
        p.requires_grad_(False)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for module in training:
            module.training = True
        for p in trainable:
            p.requires_grad_(True)


def _check_same_shape(carried: ModelEdit, hparams: BaFTHyperParams) -> None:
    """Raise ValueError unless a model's edit is one that these hyper-parameters would make."""
    wanted = {
        "layers": tuple(hparams.layers),
        "rank": hparams.rank,
        "gate": hparams.gate,
        "num_prompt_positions": hparams.num_prompt_positions,
    }
    for name, value in wanted.items():
        if getattr(carried, name) != value:
            raise ValueError(
                f"{name} must be {getattr(carried, name)!r}, as in the edit that the model already "
                f"carries; got {value!r}: undo that edit, or use its hyper-parameters"
            )
