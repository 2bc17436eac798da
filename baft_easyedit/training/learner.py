"""Train the edit of a model on requests. In memory only.

The editor calls `Learner`, and adds undo and storage. Each call trains the parameters of the
model's `ModelEdit`; the model's weights never change. All that a call changes is an `EditState`,
which `Learner.state` copies and `Learner.restore` brings back.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn

from baft_easyedit.files.messages import short
from baft_easyedit.hparams import BaFTHyperParams
from baft_easyedit.model.batching import BatchSize, alike
from baft_easyedit.model.edit import Snapshot
from baft_easyedit.model.hooks import ModelEdit, attached_edit
from baft_easyedit.model.independent import IndependentEdits
from baft_easyedit.model.inspect import input_device, max_context
from baft_easyedit.model.locks import lock_of
from baft_easyedit.model.positions import first_edited
from baft_easyedit.model.prompt_format import Frame, PromptFormat
from baft_easyedit.model.surroundings import Surroundings
from baft_easyedit.training.loop import EditReport, Learned, answered_now, evaluating, train
from baft_easyedit.training.own_texts import own_length, own_whitenings
from baft_easyedit.training.requests import EditRequest, TextRow, text_rows
from baft_easyedit.training.stand_ins import siblings, stand_ins

logger = logging.getLogger(__name__)

_MOST_NAMED = 3
"""Most requests that a warning names."""


class EditState(NamedTuple):
    """All that an edit call changes."""

    learned: Snapshot
    """The result of `ModelEdit.snapshot`."""
    attached: bool
    """Whether the edit is attached to the model."""
    memory: Mapping[str, Any] = {}
    """JSON that earlier versions kept with an edit, and that its hash covers; nothing reads it."""


class Learner:
    """Trains one edit of one decoder-only Hugging Face model, and attaches it."""

    def __init__(self, model: nn.Module, tokenizer: Any, edit: ModelEdit) -> None:
        self.model: Any = model
        self.tokenizer = tokenizer
        self.edit = edit
        self.lock = lock_of(model)
        """Keeps other threads out of the model while the edit changes."""

    @property
    def is_attached(self) -> bool:
        """Whether the edit is attached to the model now."""
        return attached_edit(self.model) is self.edit

    def state(self) -> EditState:
        """Return the present state."""
        return EditState(self.edit.snapshot(), self.is_attached, self.edit.memory)

    def restore(self, state: EditState) -> None:
        """Go back to a `state`, bit for bit."""
        self.edit.restore(state.learned)
        self.edit.memory = state.memory
        if state.attached:
            self._attach()
        else:
            self.edit.unhook()

    @contextmanager
    def alone(self, is_complete: Callable[[], bool] = lambda: False) -> Iterator[EditState]:
        """Keep other threads out of the model in this context; restore the state if it raises.

        Args:
            is_complete: Tells, after an error, whether the change was complete; it then stays.

        Yields:
            The state before.
        """
        before = None
        try:
            with self.lock.changing():
                before, surroundings = self.state(), Surroundings(self.model, self.edit)
                try:
                    yield before
                except BaseException:
                    self._put_back(before, surroundings, is_complete)
                    before = None
                    raise
        except BaseException:
            if before is not None:  # an interrupt on the way out
                with self.lock.changing():
                    self._put_back(before, surroundings, is_complete)
            raise

    def _put_back(
        self, before: EditState, surroundings: Surroundings, is_complete: Callable[[], bool]
    ) -> None:
        """Restore the state and the model's surroundings, unless the change is complete."""
        if not is_complete():
            try:
                surroundings.restore()
            finally:
                self.restore(before)
                self.edit.forget()

    def learn(self, requests: Sequence[EditRequest], hparams: BaFTHyperParams) -> EditReport:
        """Learn requests together; with `min_similarity` each on its own."""
        rows, is_apart = self._rows(requests, hparams), self.edit.min_similarity is not None
        self._attach()
        self._condition(hparams)
        if is_apart and len(requests) > 1:
            report = self._learn_joined(requests, hparams)
        else:
            (learned,) = train(self.model, self.edit, [rows], hparams)
            self.edit.restore(learned.state)
            report = learned.report
        if is_apart:  # what is answered where past edits act
            told = [self._answered(request, hparams) for request in requests]
            losses, is_learned = zip(*told, strict=True)
            report = replace(report, request_losses=losses, learned=is_learned)
        _warn_of_unlearned(requests, [report])
        return report

    def _learn_joined(
        self, requests: Sequence[EditRequest], hparams: BaFTHyperParams
    ) -> EditReport:
        """Learn several requests, each with bases of its own."""
        edits = [self._rows([request], hparams) for request in requests]
        before = self.edit.snapshot()
        self.edit.restore(self.edit.begun(before))  # each result holds all past edits
        found = self._learn_in_parts(edits, None, hparams)
        self.edit.restore(before)
        self.edit.join([one.state for one in found])
        return EditReport.of_all([one.report for one in found])

    def check(self, requests: Sequence[EditRequest], hparams: BaFTHyperParams) -> None:
        """Raise ValueError, and name the request, if one of several could not be learned alone."""
        for request in requests:
            try:
                self._rows([request], hparams)
            except ValueError as error:
                raise ValueError(f"request {short(request.prompt)}: {error}") from None

    def holds(self, requests: Sequence[EditRequest], hparams: BaFTHyperParams) -> list[bool]:
        """Tell of each request whether the model, edited or not, answers it now."""
        return [self._answered(request, hparams)[1] for request in requests]

    def _answered(self, request: EditRequest, hparams: BaFTHyperParams) -> tuple[float, bool]:
        """Return the answer loss of a request, and whether the model answers it now."""
        return answered_now(self.model, self.edit, self._rows([request], hparams)[0])

    def take_over(self, known: Snapshot, index: int) -> None:
        """Add a past edit of a snapshot, as if its request were learned again."""
        if not self.edit.past(self.edit.layers[0]).edits:  # perhaps without statistics, too
            self.edit.restore(self.edit.begun(known))
        self._attach()
        self.edit.add(known, index)

    def place_of(
        self, request: EditRequest, hparams: BaFTHyperParams
    ) -> tuple[tuple[int, ...], int]:
        """Return the tokens of a request's prompt, and at how many states it is learned."""
        row = self._rows([request], hparams)[0]
        first = first_edited(row.prompt_length, hparams.num_prompt_positions)
        return row.ids[: row.prompt_length], len(row.ids) - first

    def learn_apart(
        self, requests: Sequence[EditRequest], batch_size: int | None, hparams: BaFTHyperParams
    ) -> list[Learned]:
        """Learn each request on its own from the present state, which does not change.

        `batch_size` requests are learned at once (see `BatchSize`), fewer where memory is short.
        """
        edits = [self._rows([request], hparams) for request in requests]
        before = self.state()
        self._condition(hparams)
        try:
            in_order = self._learn_in_parts(edits, batch_size, hparams)
        finally:
            self.restore(before)
        _warn_of_unlearned(requests, [one.report for one in in_order])
        return [one._replace(start=self.edit.latest_change) for one in in_order]

    def _learn_in_parts(
        self,
        edits: Sequence[Sequence[TextRow]],
        batch_size: int | None,
        hparams: BaFTHyperParams,
    ) -> list[Learned]:
        """Learn requests apart in batches of similar size; see `learn_apart`."""
        size = BatchSize(batch_size, input_device(self.model))
        learned: dict[int, Learned] = {}
        sizes = [sum(len(row.ids) for row in rows) for rows in edits]
        for indices in alike(sizes, [len(rows) for rows in edits]):
            rest = indices
            while rest:
                part, rest = rest[: size.value], rest[size.value :]
                size.start()
                try:
                    results = self._learn_side_by_side([edits[i] for i in part], hparams)
                except torch.cuda.OutOfMemoryError:
                    if len(part) == 1:
                        raise
                    size.fail(len(part))
                    rest = part + rest
                    continue
                size.finish(len(part))
                learned |= dict(zip(part, results, strict=True))
        return [learned[i] for i in range(len(edits))]

    def install(self, learned: Learned) -> None:
        """Make an edit of `learn_apart` the present one.

        Raises:
            ValueError: If the edit was changed since then, or has another shape.
        """
        if learned.start is not self.edit.latest_change:
            raise ValueError(
                "learned must start from the present state, or what was edited since is lost: it "
                f"starts after {learned.start or 'no edit'}, and the latest change is "
                f"{self.edit.latest_change or 'none'}: undo() that, or call learn_apart() again"
            )
        self.edit.restore(learned.state)
        self._attach()

    def _attach(self) -> None:
        """Attach the edit to the model, unless it is attached."""
        if not self.is_attached:
            self.edit.attach(self.model)

    def frames(self, hparams: BaFTHyperParams) -> tuple[Frame, ...]:
        """Return the chat template's frames in which the model has room to write, if any."""
        frames, most = PromptFormat.of(hparams).frames(self.tokenizer), max_context(self.model)
        return tuple(one for one in frames if most is None or own_length(one) <= most)

    def _condition(self, hparams: BaFTHyperParams) -> None:
        """Measure the whitening statistics, if the edit needs them and has none yet."""
        edit = self.edit
        if edit.min_similarity is not None and not edit.whitening(edit.layers[0]).is_known:
            edit.follow(self.model)
            with edit.disabled(), evaluating(self.model):
                known = own_whitenings(self.model, edit.layers, self.frames(hparams))
            for layer, whitening in known.items():
                edit.whitening(layer).load_state_dict(whitening.state_dict())

    def _learn_side_by_side(
        self, edits: Sequence[Sequence[TextRow]], hparams: BaFTHyperParams
    ) -> list[Learned]:
        """Learn independent edits with equally many rows."""
        copies = IndependentEdits(self.edit, len(edits))
        with self.edit.disabled():
            try:
                copies.attach(self.model)
                return train(self.model, copies, edits, hparams)
            finally:
                copies.unhook()

    def _rows(self, requests: Sequence[EditRequest], hparams: BaFTHyperParams) -> list[TextRow]:
        """Tokenise requests that are learned together."""
        h = hparams
        uses_subject = h.min_similarity is not None and h.use_subject
        _check_differentiable(self.model)
        return text_rows(
            requests,
            self.tokenizer,
            max_context=max_context(self.model),
            prompt_format=PromptFormat.of(h),
            with_irrelevant=h.locality,
            last_only=h.loc_positions == "last",
            with_end=h.learn_end,
            stand_ins=[
                prompt
                for request in requests
                if not request.loc_prompts
                for prompt in stand_ins(request, h.loc_stand_ins)
            ],
            siblings=[siblings(request) for request in requests] if uses_subject else (),
        )


def _warn_of_unlearned(requests: Sequence[EditRequest], reports: Sequence[EditReport]) -> None:
    """Log a warning that names the first requests that were not learned, if any."""
    losses = [loss for report in reports for loss in report.request_losses]
    learned = [is_learned for report in reports for is_learned in report.learned]
    unlearned = [
        f"{request.prompt!r} -> {request.target_new!r} (loss {loss:.2g})"
        for request, loss, is_learned in zip(requests, losses, learned, strict=True)
        if not is_learned
    ]
    if unlearned:
        more = f" and {len(unlearned) - _MOST_NAMED} more" if len(unlearned) > _MOST_NAMED else ""
        logger.warning(
            "%d of %d requests not learned in %d steps: %s%s; raise num_steps or lr, or learn "
            "fewer at once",
            len(unlearned),
            len(requests),
            max(report.num_steps for report in reports),
            ", ".join(unlearned[:_MOST_NAMED]),
            more,
        )


def _check_differentiable(model: nn.Module) -> None:
    """Raise ValueError if the model has layers or weights that pass no gradient."""
    for name, parameter in model.named_parameters():
        if parameter.is_inference():
            raise ValueError(
                f"model must let gradients pass to be edited, but {name} was made in "
                "torch.inference_mode(): load the model outside of it"
            )
    for name, module in model.named_modules():
        if type(module).__module__.startswith("torch.ao.nn.quantized"):
            raise ValueError(
                f"model must let gradients pass to be edited, but {name} is quantised by torch.ao, "
                "which has none: edit the model before, or quantise it by bitsandbytes"
            )
