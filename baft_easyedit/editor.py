"""BaFTEditor: learn an edit from requests, go on from what is learned, and undo.

One edit call minimises the objective over the parameters of the model's `ModelEdit`; the model's
own weights never change.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from baft_easyedit.hooks import (
    ModelEdit,
    Snapshot,
    attached_edit,
    check_layers,
    decoder_layers,
    text_config,
)
from baft_easyedit.hparams import BaFTHyperParams
from baft_easyedit.independent import IndependentEdits
from baft_easyedit.learning import EditReport, Learned, StepLosses, learn
from baft_easyedit.requests import EditRequest, TextRow, as_requests, text_rows

__all__ = ["BaFTEditor", "EditReport", "Learned", "StepLosses"]


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

    @torch.inference_mode(False)  # whose tensors cannot take part in learning
    def edit(self, requests: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> EditReport:
        """Write one request, or a batch of them at once, into the model.

        Args:
            requests: EasyEdit's request dicts; `prompt` and `target_new` are needed, `subject` is
                checked, `loc_prompt` (a text or a list of texts) is used by R_loc.

        Returns:
            What was done and what it cost.

        Raises:
            ValueError: If a request is unusable, or gradients cannot pass through the model;
                nothing has changed then.
            TypeError: If a request has values of the wrong type; likewise.
            FloatingPointError: If the loss is not finite; the edit has been undone then.
        """
        rows = self._rows(as_requests(requests))
        before = self._state()
        try:
            if not before.attached:
                self.model_edit.attach(self.model)
            (learned,) = learn(self.model, self.model_edit, [rows], self.hparams)
            self.model_edit.restore(learned.state)
        except BaseException:
            self._go_back(before)
            raise
        self._history.append(before)
        return learned.report

    @torch.inference_mode(False)
    def learn_apart(
        self, requests: Sequence[Mapping[str, Any]], batch_size: int = 8
    ) -> list[Learned]:
        """Learn each request on its own from the present state, many side by side.

        The results are those of `edit` and `undo` for one request after another, up to rounding;
        the model is left as it is. `install` puts one of them in.

        Args:
            requests: EasyEdit's request dicts.
            batch_size: Requests learned at once, at least 1; halved while a GPU's memory is short.
                Larger ones pay on a GPU, which a single edit leaves idle; a CPU is soon full.

        Returns:
            What was learned of each request, in their order.

        Raises:
            ValueError: If a request is unusable, gradients cannot pass through the model, or
                `batch_size` is below 1.
            TypeError: If a request has values of the wrong type.
            FloatingPointError: If a loss is not finite.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1; got {batch_size}")
        edits = [self._rows([request]) for request in as_requests(requests)]
        learned: dict[int, Learned] = {}
        for indices in _of_equal_rows(edits):
            rest = indices
            while rest:
                part, rest = rest[:batch_size], rest[batch_size:]
                try:
                    results = self._learn_side_by_side([edits[i] for i in part])
                except torch.cuda.OutOfMemoryError:
                    if batch_size == 1:
                        raise
                    batch_size, rest = max(1, len(part) // 2), part + rest
                    continue
                learned |= dict(zip(part, results, strict=True))
        return [learned[i] for i in range(len(edits))]

    def _learn_side_by_side(self, edits: Sequence[Sequence[TextRow]]) -> list[Learned]:
        """Learn independent edits of as many rows each."""
        attached = self.is_attached
        copies = IndependentEdits(self.model_edit, len(edits))
        try:
            if attached:
                self.model_edit.detach()
            copies.attach(self.model)
            return learn(self.model, copies, edits, self.hparams)
        finally:
            copies.detach()
            if attached:
                self.model_edit.attach(self.model)

    def install(self, learned: Learned) -> None:
        """Make the model use what `learn_apart` learned; `undo` takes it back.

        Raises:
            ValueError: If it was learned with other layers, rank or gate; nothing has changed then.
        """
        before = self._state()
        self.model_edit.restore(learned.state)
        if not before.attached:
            self.model_edit.attach(self.model)
        self._history.append(before)

    def _state(self) -> _State:
        """Return all that an edit call changes, as it is now."""
        return _State(self.model_edit.snapshot(), self.is_attached)

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

    def _rows(self, requests: Sequence[EditRequest]) -> list[TextRow]:
        """Tokenise requests that are learned together."""
        h = self.hparams
        _check_differentiable(self.model)
        return text_rows(
            requests,
            self.tokenizer,
            max_context=self.max_context,
            use_chat_template=h.use_chat_template,
            with_irrelevant=h.locality,
            loc_positions=None if h.loc_positions == "all" else 0,
        )


def _check_differentiable(model: nn.Module) -> None:
    """Raise ValueError if the model has layers through which no gradient passes."""
    for name, module in model.named_modules():
        if type(module).__module__.startswith("torch.ao.nn.quantized"):
            raise ValueError(
                f"model must let gradients pass to be edited, but {name} is quantised by torch.ao, "
                "which has none: edit the model before, or quantise it by bitsandbytes"
            )


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


def _of_equal_rows(edits: Sequence[Sequence[TextRow]]) -> list[list[int]]:
    """Group edits, by index, that have as many rows; only those are learned side by side.

    Those of a group are in the order of their sizes, so that little is padded.
    """
    sizes = [sum(len(row.ids) for row in rows) for rows in edits]
    groups: dict[int, list[int]] = {}
    for i in sorted(range(len(edits)), key=sizes.__getitem__):
        groups.setdefault(len(edits[i]), []).append(i)
    return list(groups.values())
