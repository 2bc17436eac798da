"""BaFTEditor: edit a model, undo, and keep the edit on disk. What users call; see also `attach`.

`Learner` learns and `History` keeps; this is where their arguments are checked.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from baft_easyedit.files.paths import expanded
from baft_easyedit.hparams import BaFTHyperParams
from baft_easyedit.model.hooks import ModelEdit, attached_edit
from baft_easyedit.model.inspect import check_layers, decoder_layers
from baft_easyedit.storage.config import new_edit
from baft_easyedit.storage.directory import KeptDirectory
from baft_easyedit.storage.history import History
from baft_easyedit.storage.loading import (
    check_carries_no_other,
    check_same_shape,
    edit_of,
    latest_for,
)
from baft_easyedit.storage.reading import holds_edit
from baft_easyedit.storage.state import StateFile
from baft_easyedit.training.learner import Learner
from baft_easyedit.training.loop import EditReport, Learned, StepLosses
from baft_easyedit.training.requests import as_requests

_LEARNING = torch.inference_mode(False)
"""Tensors of inference mode cannot take part in learning."""

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
        edit: What to learn into if the model carries no edit; a new one if None.

    Raises:
        ValueError: If a layer is beyond the model's depth, the rank exceeds its hidden size, it has
            no recognisable decoder stack, or it carries, or is given, an edit of other shape.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        hparams: BaFTHyperParams,
        seed: int | None = None,
        undo_depth: int = 10,
        edit: ModelEdit | None = None,
    ) -> None:
        if undo_depth < 1:
            raise ValueError(f"undo_depth must be at least 1; got {undo_depth}")
        check_layers(hparams.layers, len(decoder_layers(model)))
        carried = attached_edit(model)
        if carried is not None and carried.is_named:
            raise ValueError("the model carries named edits, which are only used: detach() them")
        if carried is not None:
            check_same_shape(carried, hparams, "the edit that the model already carries")
        elif edit is not None:
            check_same_shape(edit, hparams, "the given edit")
        seeded = hparams if seed is None else replace(hparams, seed=seed)
        edit = carried or edit or new_edit(seeded, model)
        self._learner = Learner(model, tokenizer, edit)
        self._history = History(self._learner, hparams, undo_depth)

    def __enter__(self) -> "BaFTEditor":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def model(self) -> Any:
        """The model."""
        return self._learner.model

    @property
    def tokenizer(self) -> Any:
        """Its tokenizer."""
        return self._learner.tokenizer

    @property
    def model_edit(self) -> ModelEdit:
        """What is learned."""
        return self._learner.edit

    @property
    def hparams(self) -> BaFTHyperParams:
        """How edits are learned from now on; may be replaced by others of the same shape."""
        return self._history.hparams

    @hparams.setter
    def hparams(self, hparams: BaFTHyperParams) -> None:
        self._history.hparams = hparams

    @property
    def is_attached(self) -> bool:
        """Whether the model computes with this editor's edit now."""
        return self._learner.is_attached

    @_LEARNING
    def edit(self, requests: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> EditReport:
        """Write one request, or a batch of them at once, into the model; or change nothing.

        Args:
            requests: EasyEdit's request dicts; `prompt` and `target_new` are needed, `subject` is
                checked, `loc_prompt` (a text or a list of texts) is used by R_loc.

        Returns:
            What was done and what it cost.

        Raises:
            ValueError: If a request is unusable, or gradients cannot pass through the model.
            TypeError: If a request has values of the wrong type.
            FloatingPointError: If the loss is not finite.
            OSError: If the edit could not be written to the open directory.
        """
        checked = as_requests(requests)
        with self._history.change("edit", checked):
            report = self._learner.learn(checked, self.hparams)
            self._history.keep("edit", checked, report)
            return report

    @_LEARNING
    def learn_apart(
        self, requests: Sequence[Mapping[str, Any]], batch_size: int | None = None
    ) -> list[Learned]:
        """Learn each request on its own from the present state, many side by side.

        The results are those of `edit` and `undo` for one request after another, up to rounding;
        the model is left as it is. `install` puts one of them in.

        Args:
            requests: EasyEdit's request dicts.
            batch_size: Requests learned at once, at least 1; halved while a GPU's memory is short.
                None: as many as the free memory of a CUDA device holds, or 8 on a CPU.

        Raises:
            ValueError: If `batch_size` is below 1; others as `edit` does.
        """
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size must be at least 1; got {batch_size}")
        checked = as_requests(requests)
        with self._learner.alone():
            return self._learner.learn_apart(checked, batch_size, self.hparams)

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
            ValueError: If it was learned with other layers, rank or gate.
            OSError: If it could not be written to the open directory.
        """
        checked = [] if requests is None else as_requests(requests)
        with self._history.change("install", checked):
            self._learner.install(learned, checked, self.hparams)
            self._history.keep("install", checked, learned.report)

    @_LEARNING
    def undo(self) -> None:
        """Go back to the state before the latest edit call, bit for bit.

        With an open directory, all edits in it can be undone, one after another, also those of
        earlier processes.

        Raises:
            ValueError: If there is no edit call left to undo, or another change came after it,
                which the message names.
            OSError: If the undo could not be written to the open directory.
        """
        self._history.undo()

    @_LEARNING
    def rollback(self, to: int) -> None:
        """Go to exactly the state after an earlier entry of the journal, forwards or backwards.

        The state comes from memory or from a checkpoint; edits after that are learned again, and
        compared with the hashes in the journal. What other editors changed since is gone.

        Args:
            to: Id of the entry; 0 for before the first edit.

        Raises:
            ValueError: If no directory is open, there is no such entry, its state cannot be had bit
                for bit, or the model carries another edit.
            OSError: If the rollback could not be written.
        """
        self._history.rollback(to)

    @_LEARNING
    def forget(self, prompt: str) -> list[EditReport]:
        """Take the edits of one prompt back, and keep those that were made after them.

        The later edits are learned again from the state before the first edit of that prompt, each
        with its settings; the journal notes a rollback and these edits, all at once. If one fails,
        all is as it was. `rollback` to the entry before brings what was forgotten back.

        Args:
            prompt: The prompt of an edit that led to the present state.

        Returns:
            The reports of the edits that were learned again.

        Raises:
            ValueError: If no directory is open, it holds no edit of that prompt, or an entry after
                it is not an edit call; others as `edit` does.
        """
        return self._history.forget(prompt)

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

        Every change is on the disk before its call returns. The directory is locked until `close`,
        or until the end of a `with` statement; the model keeps the edit.

        Args:
            model: The model; for an edit that is there, the one that it was learned on.
            tokenizer: Its tokenizer.
            directory: The directory; made if there is none.
            hparams: Hyper-parameters; None for those in the directory.
            checkpoint_every: Changes between two checkpoints. Fewer: more room on the disk, and a
                shorter `rollback`, which learns again what is between.
            undo_depth: How many states are kept in memory, too.
            repair: If files are damaged, lost, or disagree, go on from the newest state that is
                whole; the rest is kept in a folder `before-repair-N`.

        Raises:
            BlockingIOError: If another editor has the directory open.
            OSError: If it cannot be written.
            ValueError: If the model or the hyper-parameters are not those of the edit, the files
                are damaged, or none of either is there; the message says what to do.
        """
        directory = expanded(directory)
        missing = (
            f"hparams must be given to begin an edit in {directory}, for nothing was begun there; "
            "got None"
        )
        if hparams is None and not holds_edit(directory):
            raise ValueError(missing)
        kept = KeptDirectory(directory, checkpoint_every, repair)
        try:
            if kept.latest is not None:
                kept.latest.config.check_model(model, str(kept.path))
                editor = cls._holding(
                    kept.latest, str(kept.path), model, tokenizer, hparams, undo_depth
                )
            else:
                if hparams is None:  # another process has just emptied the directory
                    raise ValueError(missing)
                editor = cls(model, tokenizer, hparams, undo_depth=undo_depth)
            editor._history.open(kept)
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
        """Attach a kept edit to a model; the directory is read now, never written or locked.

        Args:
            model: The model that the edit was learned on.
            tokenizer: Its tokenizer.
            directory: Where `save` or `open` kept the edit.
            allow_other_model: Use the edit on another model of the same shape.

        Raises:
            FileNotFoundError: If no edit is kept there.
            ValueError: If the model is another one or carries another edit, or the file is damaged.
        """
        directory = expanded(directory)
        latest = latest_for(model, str(directory), allow_other_model)
        editor = cls._holding(latest, str(directory), model, tokenizer)
        editor._history.go_on(latest, directory)
        return editor

    def save(self, directory: str | os.PathLike[str], overwrite: bool = False) -> None:
        """Write the edit, and the journal that led to it, into a directory.

        Until all is there, the directory holds what it held before. The journal is that of the
        directory that the edit was loaded from, or is open, and what came after. An edit without
        one, or that was changed by other means than its editor, is saved as a snapshot, whose only
        entry says of what.

        Args:
            directory: A new one; or one that `save` wrote before, which is brought up to date.
            overwrite: Replace a snapshot of another edit. A longer history is never replaced.

        Raises:
            BlockingIOError: If another editor has the directory open.
            OSError: If it cannot be written.
            ValueError: If it holds the history of another edit, or a snapshot of one without
                `overwrite`.
        """
        with self._learner.lock.changing():
            self._history.save(directory, overwrite)

    def close(self) -> None:
        """Let others open the directory, if one is open; the model keeps its edit."""
        self._history.close()

    def save_pretrained(self, directory: str | os.PathLike[str], overwrite: bool = False) -> None:
        """Write the edit as it would be pushed to the Hub: as `save` does, and a model card."""
        from baft_easyedit.storage.hub import HubEdit

        save = partial(self.save, overwrite=overwrite)
        HubEdit(self._history.config(), save).save_pretrained(str(expanded(directory)))

    def push_to_hub(
        self, repo_id: str, commit_message: str = "Push an edit", **options: Any
    ) -> str:
        """Upload the edit to the Hub, with its journal, which holds the requests.

        Args:
            repo_id: The repository; made if there is none.
            commit_message: Of the upload.
            **options: Those of `huggingface_hub.ModelHubMixin.push_to_hub`: `private`, `token`,
                `branch`, `create_pr`.

        Returns:
            The commit's address.
        """
        from baft_easyedit.storage.hub import HubEdit

        hub = HubEdit(self._history.config(), self.save)
        return hub.push_to_hub(repo_id, commit_message=commit_message, **options)

    @classmethod
    def from_pretrained(
        cls,
        repo_or_directory: str | os.PathLike[str],
        *,
        model: nn.Module,
        tokenizer: Any,
        allow_other_model: bool = False,
        **options: Any,
    ) -> "BaFTEditor":
        """Attach an edit from the Hub, or from a directory, as `load` does.

        Args:
            repo_or_directory: A repository, or where `save` or `save_pretrained` wrote.
            model: The model that the edit was learned on.
            tokenizer: Its tokenizer.
            allow_other_model: Use the edit on another model of the same shape.
            **options: Those of `huggingface_hub.snapshot_download`: `revision`, `token`,
                `cache_dir`, `local_files_only`.
        """
        from baft_easyedit.storage.hub import local_directory

        directory = local_directory(repo_or_directory, **options)
        return cls.load(model, tokenizer, directory, allow_other_model)

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
        edit, own = edit_of(kept, model, where)
        if hparams is not None:
            check_same_shape(edit, hparams, f"the edit in {where}")
        check_carries_no_other(model, kept, where)
        editor = cls(model, tokenizer, hparams or own, undo_depth=undo_depth, edit=edit)
        editor._history.origin = kept.config
        editor._learner.restore(kept.state)
        return editor
