"""One training step: run the model, compute the objective (Eq. 4) and its gradient.

On a CUDA device, short steps on one forward are captured as a CUDA graph, which later steps and
later edits of the same sizes replay (see `cuda_graph`).

Shapes: E edits, b bins of an edit (see `layout`), W columns, A answer tokens, L edited layers, r
rank, R rows.
"""

from collections.abc import Callable, Hashable
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from baft_easyedit.hparams import BaFTHyperParams
from baft_easyedit.method.objective import (
    answer_loss,
    load_balance,
    locality_margin,
    objective,
    token_losses,
)
from baft_easyedit.model.hooks import ModelEdit
from baft_easyedit.training.cuda_graph import (
    Capture,
    CudaGraph,
    GraphPool,
    Repeated,
    check_equal,
)
from baft_easyedit.training.known_steps import KnownStep, KnownSteps
from baft_easyedit.training.layout import Layout

if TYPE_CHECKING:  # it imports transformers
    from baft_easyedit.training.forward import Forward


class StepResult(NamedTuple):
    """The losses, basis weights and hidden states of one forward; none requires a gradient."""

    terms: dict[str, Tensor]
    """The terms of the objective that are in use, [E] each, averaged over the edited layers."""
    weights: Tensor
    """Basis weights, [L, E, b, W, r]."""
    hidden: tuple[Tensor, ...]
    """Hidden states h at each edited layer, before the edit, [E, b, W, D]."""
    edited: Tensor
    """True at the intervened positions of requests, [E, b, W]."""
    irrelevant: Tensor
    """True at the intervened positions of irrelevant prompts, [E, b, W]."""
    row_losses: Tensor
    """Mean loss of each row's answer tokens, [R]; 0 for irrelevant prompts."""
    row_misses: Tensor
    """Share of each row's answer tokens that greedy decoding gets wrong, [R]; 0 for irrelevant
    prompts."""


Gradients = list[Tensor | None]
"""The gradient of each trained parameter; None if the objective does not depend on it."""

_Computed = tuple[StepResult, Gradients]

_MOST_CAPTURED = 2048
"""Most tokens of a step that is captured: longer steps keep a GPU busy by themselves."""


def row_scores(logits: Tensor, losses: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Return `row_losses` and `row_misses` (see `StepResult`), [R] each.

    Args:
        logits: The logits of the answer tokens, [A, V].
        losses: Their losses, [A].
        layout: Says which row each answer token belongs to.
    """
    misses = (logits.argmax(-1) != layout.labels).to(losses.dtype)  # [A]
    rows, number = layout.label_rows, len(layout.rows)
    return answer_loss(losses, rows, number), answer_loss(misses, rows, number)


class Objective:
    """The objective L = L1 + R_bal + R_loc of an edit, or of E independent ones (Eq. 4)."""

    def __init__(self, edit: ModelEdit, hparams: BaFTHyperParams) -> None:
        self._edit = edit
        self._hparams = hparams

    @property
    def settings(self) -> Hashable:
        """All that the objective depends on beside the forward, the parameters and the usage."""
        h = self._hparams
        terms = (h.balance, h.balance_coef, h.locality, h.locality_coef)
        return (*terms, h.alpha, h.beta, h.gamma, h.rescaling)

    @torch.no_grad()
    def value(self, forward: "Forward") -> StepResult:
        """Compute a step without its gradient."""
        return self._terms(forward)

    def check(self, forward: "Forward", computed: _Computed) -> None:
        """Raise CannotRepeatError unless a step's values (not its gradients) are right."""
        check_equal(self.value(forward), computed[0])

    def gradients(self, forward: "Forward") -> _Computed:
        """Compute a step and the gradient of the objective for each trained parameter."""
        step, parameters = self._terms(forward), list(self._edit.learned_parameters().values())
        gradients = torch.autograd.grad(self._total(step), parameters, allow_unused=True)
        terms = {name: term.detach() for name, term in step.terms.items()}
        step = step._replace(terms=terms, weights=step.weights.detach())
        # The fused kernel of AdamW assumes that gradients have the parameters' memory layout.
        return step, [None if g is None else g.contiguous() for g in gradients]

    def _terms(self, forward: "Forward") -> StepResult:
        """Run the model once and compute the terms of Eq. 4."""
        layout, edit, h = forward.layout, self._edit, self._hparams
        with edit.recording() as record:
            logits = forward()
        losses = token_losses(logits, layout.labels)  # [A]
        device, num_edits = record.weights[edit.layers[0]].device, edit.num_edits
        weights = torch.stack(
            [_by_edit(record.weights[i].to(device), num_edits) for i in edit.layers]
        )  # [L, E, b, W, r]
        hidden = tuple(_by_edit(record.hidden[i], num_edits) for i in edit.layers)
        edited, irrelevant = (
            _by_edit(at.to(device), num_edits)  # [E, b, W]
            for at in (layout.edited, layout.irrelevant)
        )
        # L1 of Eq. 4, [E]
        terms = {"answer": answer_loss(losses, layout.label_owners, num_edits)}
        if h.balance:
            # R_bal of Eq. 4, [L, E]
            balance = load_balance(edit.joint_usage().mean_with(weights, edited))
            terms["balance"] = balance.mean(0)
        if h.locality and not all(row.is_edit for row in layout.rows):
            margins = {"alpha": h.alpha, "beta": h.beta, "gamma": h.gamma}
            # R_loc of Eq. 4, [L, E]
            locality = locality_margin(weights, edited, weights, irrelevant, **margins)
            terms["locality"] = locality.mean(0)
        scores = row_scores(logits.detach(), losses.detach(), layout)
        return StepResult(terms, weights, hidden, edited, irrelevant, *scores)

    def _total(self, step: StepResult) -> Tensor:
        """Return L of Eq. 4, summed over the edits, which share no parameter, []."""
        h = self._hparams
        coefficients = {"balance": h.balance_coef, "locality": h.locality_coef}
        terms = {n: (c, step.terms[n]) for n, c in coefficients.items() if n in step.terms}
        return objective(step.terms["answer"], terms, h.rescaling).sum()


class TrainingStep:
    """Computes training steps: the losses, and the gradients, left in `.grad` for the optimiser.

    Args:
        edit: The edit that is trained.
        hparams: Its hyper-parameters.
        forward: The forward of all steps.
        known: Captured steps of earlier calls on the same model, to which a new one is added; None
            to keep none.
    """

    def __init__(
        self,
        edit: ModelEdit,
        hparams: BaFTHyperParams,
        forward: "Forward",
        known: KnownSteps | None = None,
    ) -> None:
        self._parameters = list(edit.learned_parameters().values())
        objective = Objective(edit, hparams)
        device, state = _captured_on(forward), None
        if known is not None and device is not None:
            usage = [t for i in edit.layers for t in edit.usage(i).buffers()]
            memory = tuple(t.data_ptr() for t in (*self._parameters, *usage))
            known.make_valid_for((forward.weights_version, objective.settings, memory))
            forward, state = _on_known(forward, known)
        compute = partial(objective.gradients, forward)
        capture = None if device is None else partial(_graph, compute, device, known)
        self._compute = Repeated(compute, capture, partial(objective.check, forward), state)

    def run(self) -> StepResult:
        """Compute a step, and leave its gradients in the parameters' `grad`.

        The next step may overwrite the memory of the result.
        """
        step, gradients = self._compute()
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient
        return step


def _captured_on(forward: "Forward") -> torch.device | None:
    """Return the CUDA device on which steps are captured; None if they are not.

    A full forward is not captured, as it may wait for the device to look at its mask; nor is a step
    of many tokens, whose graph would take as much memory again as the step.
    """
    is_short = forward.layout.input_ids.numel() <= _MOST_CAPTURED
    device = forward.device if forward.is_cached and is_short else None
    return device if device is not None and device.type == "cuda" else None


def _on_known(forward: "Forward", known: KnownSteps) -> tuple["Forward", Capture]:
    """Return the forward in the memory of a known step of its sizes, and that step's capture.

    If there is such a step, the forward's contents are copied into its memory, and its graph will
    be replayed; otherwise this forward's step becomes a known one.
    """
    contents = forward.contents
    step = known.get(contents.sizes)
    if step is None:
        step = KnownStep(contents, Capture())
        known.put(contents.sizes, step)
    elif not step.state.has_failed:
        step.contents.take(contents)
        step.state.renew()
        forward = forward.on(step.contents)
    return forward, step.state


def _graph(
    compute: Callable[[], _Computed], device: torch.device, known: KnownSteps | None
) -> CudaGraph[_Computed]:
    """Capture a step as a CUDA graph."""
    return CudaGraph(compute, GraphPool(device) if known is None else known.pool_on(device))


def _by_edit(rows: Tensor, num_edits: int) -> Tensor:
    """Split the rows of the batch among the edits: [E b, ...] becomes [E, b, ...]."""
    return rows.view(num_edits, -1, *rows.shape[1:])
