"""BaFTEditor: learn an edit from requests, go on from what is learned, undo, and keep it on disk.

One edit call minimises the objective over the parameters of the model's `ModelEdit`; the model's
own weights never change.
"""

import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from baft_easyedit.hooks import (
    ModelEdit,
    attached_edit,
    check_layers,
    decoder_layers,
    rank_of,
    text_config,
)
from baft_easyedit.hparams import BaFTHyperParams
from baft_easyedit.independent import IndependentEdits
from baft_easyedit.keeping.config import (
    KeptConfig,
    environment,
    hparams_of,
    method_of,
)
from baft_easyedit.keeping.directory import KeptDirectory, holds_edit
from baft_easyedit.keeping.journal import Entry, Journal, report_dict
from baft_easyedit.keeping.loading import checked_latest, edit_of
from baft_easyedit.keeping.state import EditState, StateFile, state_hash
from baft_easyedit.learning import EditReport, Learned, StepLosses, learn
from baft_easyedit.recordings import Recordings
from baft_easyedit.rehearsal import Rehearsal, RehearsalMemory, Review
from baft_easyedit.requests import EditRequest, TextRow, as_requests, text_rows

__all__ = ["BaFTEditor", "EditReport", "Learned", "StepLosses"]


class BaFTEditor:
    """Edits a causal language model in place, by hooks that can be taken off again.

    Several edit calls learn one after another into the same parameters (continual editing). A new
    editor on a model that carries an edit goes on with that edit. `save` and `load` keep an edit
    on disk; an editor from `open` keeps every change there, with its history.

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
        self._history: deque[tuple[int, EditState]] = deque(maxlen=undo_depth)
        self._directory: KeptDirectory | None = None
        self._config: KeptConfig | None = None
        carried = attached_edit(model)
        if carried is not None:
            _check_same_shape(carried, hparams, "the edit that the model already carries")
        self.model_edit = carried or ModelEdit(
            config.hidden_size,
            hparams.layers,
            hparams.rank,
            hparams.gate,
            hparams.num_prompt_positions,
            hparams.seed if seed is None else seed,
        )

    def __enter__(self) -> "BaFTEditor":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

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
            OSError: If the edit could not be written to the open directory; likewise.
        """
        checked = as_requests(requests)
        with self._all_or_nothing(is_return=False):
            report = self._learn(checked, self.hparams)
            self._keep("edit", checked, report)
        return report

    def consolidate(self, steps: int | None = None) -> EditReport:
        """Go over all remembered edits once more, those of a step drawn in turn.

        Args:
            steps: Optimiser steps, at least 1; `consolidate_steps` of the hyper-parameters if None.

        Raises:
            ValueError: If nothing is remembered, or `steps` is below 1; nothing has changed then.
            FloatingPointError: If the loss is not finite; what it did has been undone then.
            OSError: If it could not be written to the open directory; likewise.
        """
        steps = self.hparams.consolidate_steps if steps is None else steps
        if steps < 1:
            raise ValueError(f"steps must be at least 1; got {steps}")
        if not len(self.model_edit.memory):
            raise ValueError(
                "there is no edit to consolidate: set rehearsal in the hyper-parameters, and edit"
            )
        with self._all_or_nothing(is_return=False):
            report = self._consolidate(steps, self.hparams)
            self._keep("consolidate", report=report)
        return report

    def _learn(self, requests: Sequence[EditRequest], hparams: BaFTHyperParams) -> EditReport:
        """Learn requests; all that this changes is in `_state`."""
        rows, memory = self._rows(requests, hparams), self.model_edit.memory
        if not self.is_attached:
            self.model_edit.attach(self.model)
        self._grow(hparams)
        rehearsal = self._rehearsal(hparams, memory, requests)
        (learned,) = self._learned([rows], hparams, rehearsal)
        self.model_edit.restore(learned.state)
        num_seen = memory.num_seen
        memory.remember(requests, learned.report.request_losses, hparams)
        every = hparams.consolidate_every
        if not every or memory.num_seen // every == num_seen // every:
            return learned.report
        again = self._consolidate(hparams.consolidate_steps, hparams)
        return replace(learned.report, consolidation=again)

    def _consolidate(self, steps: int, hparams: BaFTHyperParams) -> EditReport:
        """Learn what is remembered; all that this changes is in `_state`."""
        if not self.is_attached:
            self.model_edit.attach(self.model)
        fixed = replace(hparams, num_steps=steps, early_stop_loss=0.0)
        review = Review(self.model_edit.memory, fixed, partial(self._known_rows, hparams=fixed))
        (learned,) = self._learned([[]], fixed, review)
        self.model_edit.restore(learned.state)
        return learned.report

    def _grow(self, hparams: BaFTHyperParams) -> None:
        """Add bases if it is time."""
        num_seen = self.model_edit.memory.num_seen
        rank = min(hparams.grown_rank(num_seen), text_config(self.model).hidden_size)
        if rank > self.model_edit.rank:
            self.model_edit.grow(rank, hparams.seed + num_seen)

    def _rehearsal(
        self, hparams: BaFTHyperParams, memory: RehearsalMemory, new: Sequence[EditRequest]
    ) -> Rehearsal | None:
        """Return what the steps of an edit call learn again; None if there is nothing."""
        rehearsal = Rehearsal(memory, hparams, partial(self._known_rows, hparams=hparams), new)
        return rehearsal if len(rehearsal) else None

    def _learned(
        self,
        edits: Sequence[Sequence[TextRow]],
        hparams: BaFTHyperParams,
        rehearsal: Rehearsal | None,
        edit: ModelEdit | None = None,
    ) -> list[Learned]:
        """Learn rows into an edit, this editor's if None."""
        recordings = self._recordings(hparams) if hparams.rehearsal else None
        return learn(self.model, edit or self.model_edit, edits, hparams, rehearsal, recordings)

    def _recordings(self, hparams: BaFTHyperParams) -> Recordings:
        """Return the recordings that outlive an edit call, within the bounds of now."""
        limits = hparams.rehearsal_cache_mib * 2**20, hparams.rehearsal_spill_mib * 2**20
        known = self.model_edit.recordings
        if known is None or known.limits != limits:
            known = self.model_edit.recordings = Recordings(*limits)
        return known

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
        checked = as_requests(requests)
        edits = [self._rows([request], self.hparams) for request in checked]
        learned: dict[int, Learned] = {}
        for indices in _of_equal_rows(edits):
            rest = indices
            while rest:
                part, rest = rest[:batch_size], rest[batch_size:]
                try:
                    results = self._learn_side_by_side(
                        [edits[i] for i in part], [checked[i] for i in part]
                    )
                except torch.cuda.OutOfMemoryError:
                    if batch_size == 1:
                        raise
                    batch_size, rest = max(1, len(part) // 2), part + rest
                    continue
                learned |= dict(zip(part, results, strict=True))
        return [learned[i] for i in range(len(edits))]

    def _learn_side_by_side(
        self, edits: Sequence[Sequence[TextRow]], requests: Sequence[EditRequest]
    ) -> list[Learned]:
        """Learn independent edits of as many rows each, beside the same past ones."""
        attached = self.is_attached
        memory = self.model_edit.memory.copy()  # what is not installed leaves no trace
        rehearsal = self._rehearsal(self.hparams, memory, requests)
        copies = IndependentEdits(self.model_edit, len(edits))
        try:
            if attached:
                self.model_edit.detach()
            copies.attach(self.model)
            return self._learned(edits, self.hparams, rehearsal, copies)
        finally:
            copies.detach()
            if attached:
                self.model_edit.attach(self.model)

    def install(
        self,
        learned: Learned,
        requests: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        """Make the model use what `learn_apart` learned; `undo` takes it back.

        Args:
            learned: One of its results.
            requests: What it was learned from, for the journal of an open directory.

        Raises:
            ValueError: If it was learned with other layers, rank or gate; nothing has changed then.
            OSError: If it could not be written to the open directory; likewise.
        """
        checked = [] if requests is None else as_requests(requests)
        with self._all_or_nothing(is_return=False):
            self.model_edit.restore(learned.state)
            if not self.is_attached:
                self.model_edit.attach(self.model)
            losses = learned.report.request_losses
            self.model_edit.memory.remember(checked, losses[: len(checked)], self.hparams)
            self._keep("install", checked, learned.report)

    def undo(self) -> None:
        """Go back to the state before the latest edit call, bit for bit.

        With an open directory, all edits in it can be undone, one after another, also those of
        earlier processes.

        Raises:
            ValueError: If there is no edit call left to undo.
            OSError: If the undo could not be written to the open directory; nothing has changed.
        """
        journal = self._journal()
        if journal is not None and journal.position > 0:
            position = journal.entries[journal.position]
            self._return("undo", position.content["parent"])
        elif journal is None and self._history:
            self._restore(self._history.pop()[1])
        else:
            raise ValueError(
                "there is no edit to undo: edit() was not called, or undo_depth is used up"
            )

    def rollback(self, to: int) -> None:
        """Go to exactly the state after an earlier entry of the journal, forwards or backwards.

        It comes from memory or from a checkpoint; edits after that are learned again, and compared
        with the hashes in the journal.

        Args:
            to: Id of the entry; 0 for before the first edit.

        Raises:
            ValueError: If no directory is open, there is no such entry, or it cannot be had bit for
                bit; nothing has changed then.
            OSError: If the rollback could not be written; likewise.
        """
        journal = self._journal()
        if journal is None:
            raise ValueError(
                "rollback needs the journal of a directory, and none is open: use "
                "BaFTEditor.open(), or undo()"
            )
        if not 0 <= to < len(journal):
            raise ValueError(f"to must be in [0, {len(journal) - 1}], the journal's ids; got {to}")
        self._return("rollback", to)

    def _return(self, kind: str, to: int) -> None:
        """Go to the state after an entry, and keep that."""
        with self._all_or_nothing(is_return=True):
            self._restore_entry(to)
            self._keep(kind, to=to)

    def _restore_entry(self, to: int) -> None:
        """Restore the state after a journal entry, or learn it again from the nearest one."""
        directory = self._directory
        assert directory is not None
        journal = directory.journal
        known = {**dict(self._history), journal.position: self._state()}
        found = directory.nearest(to, known)
        if found is None:
            raise ValueError(
                f"{directory.path} has no intact checkpoint of entry {to} or before it; the states "
                f"after entries {directory.exact_ids()} are kept"
            )
        self._restore(found[1])
        path = [i for i in journal.ancestors(to) if i > found[0]]
        for i in reversed(path):
            self._repeat(journal.entries[i], journal.settings_of(i))

    def _repeat(self, entry: Entry, settings: Entry) -> None:
        """Learn an entry of the journal again, and compare."""
        directory = self._directory
        assert directory is not None
        where = str(directory.path)
        if entry.kind in ("edit", "consolidate"):
            hparams = hparams_of(settings.content["hparams"], self.model, where)
            if entry.kind == "edit":
                self._learn(as_requests(entry.requests), hparams)
            else:
                self._consolidate(entry.report["num_steps"], hparams)
            if state_hash(self._state()) == entry.state_hash:
                return
        then, now = settings.content["environment"], environment(self.model)
        different = [f"{k} {then.get(k)} then, {now[k]} now" for k in now if then.get(k) != now[k]]
        raise ValueError(
            f"entry {entry.id} of {where} ({entry.kind}) could not be learned again bit for bit "
            f"({'; '.join(different) or 'the environment looks the same'}); the states after "
            f"entries {directory.exact_ids()} are kept as checkpoints: roll back to one of them"
        )

    @contextmanager
    def _all_or_nothing(self, is_return: bool) -> Iterator[None]:
        """Go back if anything goes wrong before the change is kept.

        Args:
            is_return: Whether the change goes to an earlier state, whatever the present one is.
        """
        if self._directory is not None:
            self._directory.check_usable()
            if not is_return:
                self._check_untouched(self._directory)
                self._keep_settings()
        before, journal = self._state(), self._journal()
        position, size = (0, 0) if journal is None else (journal.position, len(journal))
        try:
            yield
            self._history.append((position, before))
        except BaseException:
            if journal is None or len(journal) == size:  # else it is complete already
                self._restore(before)
            raise

    def _check_untouched(self, directory: KeptDirectory) -> None:
        """Raise ValueError if the edit is not as the directory keeps it."""
        if directory.present(self._state()) is None:
            raise ValueError(
                f"the edit must be as {directory.path} keeps it, and was changed by other means "
                f"than this editor: call rollback(to={directory.journal.position}) first, or "
                "save() it elsewhere"
            )

    def _state(self) -> EditState:
        """Return all that an edit call changes, as it is now."""
        edit = self.model_edit
        return EditState(edit.snapshot(), self.is_attached, edit.memory.state())

    def _restore(self, state: EditState) -> None:
        """Restore a `_state`; the model's own outputs come back with the hooks off."""
        rank = rank_of(state.learned)
        if rank != self.model_edit.rank:
            self.model_edit.start_afresh(rank)
        self.model_edit.restore(state.learned)
        self.model_edit.memory.restore(state.extra)
        if state.attached and not self.is_attached:
            self.model_edit.attach(self.model)
        elif not state.attached:
            self.model_edit.detach()

    @classmethod
    def open(
        cls,
        model: nn.Module,
        tokenizer: Any,
        directory: str | os.PathLike[str],
        hparams: BaFTHyperParams | None = None,
        checkpoint_every: int = 100,
        undo_depth: int = 10,
        repair: bool = False,
    ) -> "BaFTEditor":
        """Keep an edit in a directory: begin one, or go on with the one that is there.

        Every edit, install, undo and rollback is on the disk before its call returns. Use it in a
        `with` statement, or call `close`; the directory is locked until then. The model keeps the
        edit.

        Args:
            model: The model; for an edit that is there, the one that it was learned on.
            tokenizer: Its tokenizer.
            directory: The directory; made if there is none.
            hparams: Hyper-parameters; None for those in the directory.
            checkpoint_every: Changes between two checkpoints. Fewer: more room on the disk, and a
                shorter `rollback`, which learns again what is between.
            undo_depth: How many states are kept in memory, too.
            repair: If the state file is damaged, lost, or older than the journal, go on from the
                newest intact state.

        Raises:
            BlockingIOError: If another editor has the directory open.
            OSError: If it cannot be written.
            ValueError: If the model or the hyper-parameters are not those of the edit, the files
                are damaged, or a new directory gets no hyper-parameters; the message says what to
                do.
        """
        if hparams is None and not holds_edit(directory):
            raise ValueError(f"hparams must be given to begin an edit in {directory}; got None")
        kept = KeptDirectory(directory, checkpoint_every, repair)
        try:
            if kept.latest is None:
                editor = cls._beginning(model, tokenizer, hparams, undo_depth)
            else:
                kept.latest.config.check_model(model, str(kept.path))
                editor = cls._holding(
                    kept.latest, str(kept.path), model, tokenizer, hparams, undo_depth
                )
            editor._directory = kept
            editor._keep_settings()
            kept.ensure_checkpoint()
        except BaseException:
            kept.close()
            raise
        return editor

    @classmethod
    def load(
        cls,
        model: nn.Module,
        tokenizer: Any,
        directory: str | os.PathLike[str],
        allow_other_model: bool = False,
    ) -> "BaFTEditor":
        """Attach a kept edit to a model; the directory is only read, now, and not locked.

        The editor begins without a history: what it does is not written to the directory.

        Args:
            model: The model that the edit was learned on.
            tokenizer: Its tokenizer.
            directory: Where `save` or `open` kept the edit.
            allow_other_model: Use the edit on another model of the same shape.

        Raises:
            FileNotFoundError: If no edit is kept there.
            ValueError: If the model is another one or carries another edit, or the file is damaged.
        """
        latest = checked_latest(model, directory, allow_other_model)
        editor = cls._holding(latest, str(directory), model, tokenizer)
        if allow_other_model:
            editor._config = None  # from now on it is an edit of this model
        return editor

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write the edit, and the journal if there is one, into a directory.

        Until all is there, the directory holds what it held before. A saved directory can be
        loaded, or opened to go on. An edit that was changed by other means than its editor is
        saved without the journal.

        Args:
            directory: A new one; or one that `save` wrote before, which is brought up to date.

        Raises:
            BlockingIOError: If another editor has the directory open.
            OSError: If it cannot be written.
            ValueError: If it holds the history of another edit.
        """
        own = self._directory
        if own is not None and os.path.isdir(directory) and os.path.samefile(own.path, directory):
            own.check_usable()
            self._check_untouched(own)  # all else is there already
            return
        state = self._state()
        present = None if own is None else own.present(state)
        if own is None or present is None:
            entries = [self._start_entry(state)]
        else:
            entries, state = own.journal.entries, present
        target = KeptDirectory(directory)
        try:
            target.take_over(entries, state, self.kept_config())
        finally:
            target.close()

    def close(self) -> None:
        """Let others open the directory, if one is open; the model keeps its edit."""
        if self._directory is not None:
            self._directory.close()

    def kept_config(self) -> KeptConfig:
        """Describe the edit for a kept directory: its method, model, and versions."""
        config = self._config or KeptConfig.of(self.model, self.hparams)
        return config.with_settings(self.hparams)

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write the edit as it would be pushed to the Hub: as `save` does, and a model card.

        Args:
            directory: A new one, or one from before.

        Raises:
            BlockingIOError: If another editor has the directory open.
            OSError: If it cannot be written.
            ValueError: If it holds the history of another edit.
        """
        from baft_easyedit.hub import HubEdit

        HubEdit(self).save_pretrained(os.fspath(directory))

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str = "Push an edit",
        private: bool | None = None,
        token: str | None = None,
        branch: str | None = None,
        create_pr: bool | None = None,
    ) -> str:
        """Upload the edit to the Hub, with its journal, which holds the requests.

        Args:
            repo_id: The repository; made if there is none.
            commit_message: Of the upload.
            private: Whether a new repository is private; the Hub's choice if None.
            token: The Hub's; that of the login if None.
            branch: Where to push; `main` if None.
            create_pr: Make a pull request instead.

        Returns:
            The commit's address.
        """
        from baft_easyedit.hub import HubEdit

        return HubEdit(self).push_to_hub(
            repo_id,
            commit_message=commit_message,
            private=private,
            token=token,
            branch=branch,
            create_pr=create_pr,
        )

    @classmethod
    def from_pretrained(
        cls,
        repo_or_directory: str | os.PathLike[str],
        *,
        model: nn.Module,
        tokenizer: Any,
        allow_other_model: bool = False,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
    ) -> "BaFTEditor":
        """Attach an edit from the Hub, or from a directory as `load` does.

        Args:
            repo_or_directory: A repository, or where `save` or `save_pretrained` wrote.
            model: The model that the edit was learned on.
            tokenizer: Its tokenizer.
            allow_other_model: Use the edit on another model of the same shape.
            revision: Branch, tag or commit of the repository.
            token: The Hub's; that of the login if None.
            cache_dir: Where downloads go.
            local_files_only: Download nothing.

        Raises:
            FileNotFoundError: If no edit is kept there.
            ValueError: If the model is another one or carries another edit, or a file is damaged.
        """
        from baft_easyedit.hub import HubEdit

        return HubEdit.from_pretrained(
            os.fspath(repo_or_directory),
            revision=revision,
            token=token,
            cache_dir=None if cache_dir is None else os.fspath(cache_dir),
            local_files_only=local_files_only,
            model=model,
            tokenizer=tokenizer,
            allow_other_model=allow_other_model,
        ).editor

    @classmethod
    def _beginning(
        cls, model: nn.Module, tokenizer: Any, hparams: BaFTHyperParams | None, undo_depth: int
    ) -> "BaFTEditor":
        """Make the editor of a new directory."""
        if hparams is None:
            raise ValueError("hparams must be given: the journal of the directory is empty")
        return cls(model, tokenizer, hparams, undo_depth=undo_depth)

    @classmethod
    def _holding(
        cls,
        kept: StateFile,
        where: str,
        model: nn.Module,
        tokenizer: Any,
        hparams: BaFTHyperParams | None = None,
        undo_depth: int = 10,
    ) -> "BaFTEditor":
        """Make an editor whose edit is a kept one."""
        own = hparams_of(kept.config.hparams, model, where)
        edit = edit_of(kept.state, own, model, where)
        if hparams is not None:
            _check_same_shape(edit, hparams, f"the edit in {where}")
        carried = attached_edit(model)
        editor = cls(model, tokenizer, hparams or own, undo_depth=undo_depth)
        if carried is not None:
            now = EditState(carried.snapshot(), kept.state.attached, kept.state.extra)
            if state_hash(now) != kept.entries[-1].state_hash:
                raise ValueError(
                    f"the model must carry no edit, or that in {where}; it carries another: call "
                    "attached_edit(model).detach() first"
                )
        editor._config = kept.config
        editor._restore(kept.state)
        return editor

    def _journal(self) -> Journal | None:
        """Return the journal of the directory that this editor has open, or had."""
        return None if self._directory is None else self._directory.journal

    def _settings(self) -> dict[str, Any]:
        """Return what `learn` depends on beside the state and the requests."""
        return {"hparams": method_of(self.hparams), "environment": environment(self.model)}

    def _start_entry(self, state: EditState) -> Entry:
        """Return the first entry of a new journal."""
        return Journal().next("start", state_hash(state), self._settings())

    def _keep_settings(self) -> None:
        """Note in the journal how edits are learned from now on, unless it says so already."""
        if self._directory is None:
            return
        journal, settings = self._directory.journal, self._settings()
        if len(journal) and journal.settings_of(len(journal) - 1).content == settings:
            return
        self._config = self.kept_config()
        kind = "settings" if len(journal) else "start"
        self._directory.commit(kind, self._state(), self._config, settings)

    def _keep(
        self,
        kind: str,
        requests: Sequence[EditRequest] = (),
        report: EditReport | None = None,
        to: int | None = None,
    ) -> None:
        """Commit a change to the open directory, if there is one."""
        if self._directory is None:
            return
        content: dict[str, Any] = {"to": to}
        if report is not None:
            content = {
                "requests": [request.to_dict() for request in requests],
                "report": report_dict(report),
            }
        self._directory.commit(kind, self._state(), self.kept_config(), content)

    def _known_rows(self, request: EditRequest, hparams: BaFTHyperParams) -> Sequence[TextRow]:
        """Tokenise a remembered request, once."""
        h = hparams
        key = (request, h.use_chat_template, h.locality, h.loc_positions, h.learn_end)
        tokenised = self.model_edit.memory.tokenised
        if key not in tokenised:
            tokenised[key] = self._rows([request], hparams)
        return tokenised[key]

    def _rows(self, requests: Sequence[EditRequest], hparams: BaFTHyperParams) -> list[TextRow]:
        """Tokenise requests that are learned together."""
        h = hparams
        _check_differentiable(self.model)
        return text_rows(
            requests,
            self.tokenizer,
            max_context=self.max_context,
            use_chat_template=h.use_chat_template,
            with_irrelevant=h.locality,
            loc_positions=None if h.loc_positions == "all" else 0,
            with_end=h.learn_end,
        )


def _check_differentiable(model: nn.Module) -> None:
    """Raise ValueError if the model has layers through which no gradient passes."""
    for name, module in model.named_modules():
        if type(module).__module__.startswith("torch.ao.nn.quantized"):
            raise ValueError(
                f"model must let gradients pass to be edited, but {name} is quantised by torch.ao, "
                "which has none: edit the model before, or quantise it by bitsandbytes"
            )


def _check_same_shape(carried: ModelEdit, hparams: BaFTHyperParams, where: str) -> None:
    """Raise ValueError unless an edit is one that these hyper-parameters would make."""
    wanted = {
        "layers": tuple(hparams.layers),
        "rank": carried.rank if hparams.can_have_rank(carried.rank) else hparams.rank,
        "gate": hparams.gate,
        "num_prompt_positions": hparams.num_prompt_positions,
    }
    for name, value in wanted.items():
        if getattr(carried, name) != value:
            raise ValueError(
                f"{name} must be {getattr(carried, name)!r}, as in {where}; got {value!r}: undo "
                "that edit, or use its hyper-parameters"
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
