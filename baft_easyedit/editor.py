"""BaFTEditor, the interface for users: edit a model, undo, and keep the edit on disk.

It checks arguments; `Learner` trains, and `History` makes, keeps and undoes the changes. To use a
kept edit without editing, see `storage.loading.attach`.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from baft_easyedit.files.paths import expanded
from baft_easyedit.hparams import BaFTHyperParams, check_hparams
from baft_easyedit.model.hooks import ModelEdit, attached_edit
from baft_easyedit.model.inspect import check_layers, decoder_layers, text_config
from baft_easyedit.storage.config import new_edit
from baft_easyedit.storage.directory import KeptDirectory
from baft_easyedit.storage.history import History
from baft_easyedit.storage.journal import edit_content
from baft_easyedit.storage.loading import check_carried, check_same_shape, edit_of, latest_for
from baft_easyedit.storage.reading import holds_edit
from baft_easyedit.storage.state import StateFile
from baft_easyedit.training.learner import Learner
from baft_easyedit.training.loop import EditReport, Learned
from baft_easyedit.training.requests import as_requests

Requests = Mapping[str, Any] | Sequence[Mapping[str, Any]]

_LEARNING = torch.inference_mode(False)  # its tensors could not be trained


class BaFTEditor(AbstractContextManager["BaFTEditor"]):
    """Edits a causal language model by hooks; the weights stay as they are.

    Several edit calls train the same parameters one after another (continual editing), or with
    `min_similarity` some of their own. A new editor on a model that carries an edit continues that
    edit. `save` and `load` keep an edit on disk; an editor from `open` keeps every change there,
    with its history.

    Args:
        model: A decoder-only Hugging Face model.
        tokenizer: The model's tokenizer.
        hparams: Hyper-parameters of BaFT or ReFT.
        seed: Seed of the random initial bases; that of `hparams` if None.
        undo_depth: How many edit calls `undo` can take back.
        edit: The edit to train if the model carries none; a new one if None.

    Raises:
        ValueError: If a layer is beyond the model's depth, the rank exceeds its hidden size, no
            decoder stack is recognised, the edit has another shape than `hparams` say, or the
            model carries named edits.
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
        check_hparams(hparams)
        if undo_depth < 1:
            raise ValueError(f"undo_depth must be at least 1; got {undo_depth}")
        depth = len(decoder_layers(model))
        hparams = hparams.at_depth(depth)
        carried, where = attached_edit(model), "the given edit"
        if carried is not None:
            if carried.is_named:
                raise ValueError("the model carries named edits, only to be used: detach() them")
            edit, where = carried, "the edit that the model already carries"
        if edit is None:
            hparams.warn_of_open_gates()
        else:
            check_same_shape(edit, hparams, where)
        self.model: Any = model
        self.tokenizer = tokenizer
        seeded = hparams if seed is None else replace(hparams, seed=seed)
        self.model_edit = edit or new_edit(seeded, text_config(model).hidden_size)
        """The edit that is trained."""
        check_layers(self.model_edit.layers, depth)
        self._learner = Learner(model, tokenizer, self.model_edit)
        self._history = History(self._learner, hparams, undo_depth)

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def hparams(self) -> BaFTHyperParams:
        """Hyper-parameters of the next edits; may be replaced by others of the same shape."""
        return self._history.hparams

    @hparams.setter
    def hparams(self, hparams: BaFTHyperParams) -> None:
        check_hparams(hparams)
        hparams = hparams.at_depth(len(decoder_layers(self.model)))
        check_same_shape(self.model_edit, hparams, "this edit")
        self._history.hparams = hparams

    @property
    def is_attached(self) -> bool:
        """Whether the model computes with this editor's edit now."""
        return self._learner.is_attached

    @_LEARNING
    def edit(self, requests: Requests) -> EditReport:
        """Learn one request, or several together; on an error, nothing changes.

        Args:
            requests: EasyEdit's request dicts; `prompt` and `target_new` are needed, `subject` is
                used by `min_similarity` and `loc_stand_ins`, `loc_prompt` (or several) by R_loc.

        Returns:
            The report: steps, losses, time, and whether each request was learned.

        Raises:
            ValueError: If a request is unusable, or gradients cannot pass through the model.
            TypeError: If a request has values of the wrong type.
            FloatingPointError: If the loss is not finite.
            OSError: If the edit could not be written to the open directory.
        """
        checked = as_requests(requests)
        with self._history.change("edit", checked):
            report = self._learner.learn(checked, self.hparams)
            self._history.commit("edit", edit_content(checked, report))
            return report

    def check(self, requests: Sequence[Mapping[str, Any]]) -> None:
        """Raise what `edit` would raise for a request that it cannot take; nothing is learned."""
        self._learner.check(as_requests(requests), self.hparams)

    def holds(self, requests: Sequence[Mapping[str, Any]]) -> list[bool]:
        """Tell of each request whether the model gives its target now, by greedy decoding."""
        return self._learner.holds(as_requests(requests), self.hparams)

    @_LEARNING
    def learn_apart(
        self, requests: Sequence[Mapping[str, Any]], batch_size: int | None = None
    ) -> list[Learned]:
        """Learn each request on its own from the present state, many at once in a batch.

        The results are those of `edit` and `undo` for one after another, up to rounding, but come
        much faster. The model stays as it is; `install` makes it use one of the results.

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

    def install(self, learned: Learned, requests: Requests | None = None) -> None:
        """Make the model use a result of `learn_apart`; `undo` takes it back.

        The `requests` that it was learned from are for the journal.

        Raises:
            ValueError: If the result was learned from another state, or with other layers, rank or
                gate.
            OSError: If the change could not be written to the open directory.
        """
        checked = [] if requests is None else as_requests(requests)
        with self._history.change("install", checked):
            self._learner.install(learned)
            self._history.commit("install", edit_content(checked, learned.report))

    @_LEARNING
    def undo(self) -> None:
        """Go back to the state before the latest edit call, bit for bit.

        With an open directory, all edits in it can be undone, those of earlier processes too.

        Raises:
            ValueError: If no edit call is left to undo, or another change came after it; the
                message names that change.
            OSError: If the undo could not be written to the open directory.
        """
        self._history.undo()

    @_LEARNING
    def rollback(self, to: int) -> None:
        """Go to exactly the state after an earlier entry of the journal, forwards or backwards.

        The nearest earlier state in memory or in a checkpoint is restored. The edits after it are
        learned again, and must give the journal's hashes. Changes by others since then are lost.
        Entry 0 is the state before the first edit.

        Raises:
            ValueError: If no directory is open, there is no such entry, its state cannot be
                reproduced bit for bit, or the model carries another edit.
            OSError: If the rollback could not be written.
        """
        if type(to) is not int:
            raise TypeError(f"to must be the id of an entry, a whole number; got {to!r}")
        self._history.rollback(to)

    @_LEARNING
    def forget(
        self, prompt: str, tell: Callable[[EditReport], object] | None = None
    ) -> list[EditReport]:
        """Take the edits of one prompt back, and keep the edits that were made after them.

        The later edits are learned again from the state before the first edit of the prompt, each
        with its own hyper-parameters; with `min_similarity` only those of one call with it, and
        those that another edit took states from, as the others come out as they are. All of that is
        one commit, a rollback and new edits in the journal; on an error, nothing changes. A
        `rollback` to the entry before undoes it. `tell` is given each report once it is there.

        Returns:
            The reports of the edits that were learned again.

        Raises:
            ValueError: If no directory is open, the present state holds no edit of the prompt, or
                that or a later change is an `install`; others as `edit` does.
        """
        if not isinstance(prompt, str):
            raise TypeError(f"prompt must be a string; got {prompt!r}")
        return self._history.forget(prompt, tell or (lambda _: None))

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
        """Make an editor that keeps its edit in a directory: a new edit, or the one kept there.

        Every change is on the disk before its call returns. The directory is locked until `close`,
        or until the end of a `with` statement; the model keeps the edit.

        Args:
            model: The model; for a kept edit, the model that it was learned on.
            tokenizer: The model's tokenizer.
            directory: The directory; made if there is none.
            hparams: Hyper-parameters; None for those in the directory.
            checkpoint_every: Changes between two checkpoints. A smaller number takes more space,
                and `rollback`, which learns the edits after a checkpoint again, is faster.
            undo_depth: How many earlier states are kept in memory, too.
            repair: If files are damaged, lost, or disagree, go on from the newest intact state;
                the other files are kept in a folder `before-repair-N`.

        Raises:
            BlockingIOError: If another editor has the directory open.
            OSError: If the directory cannot be written.
            ValueError: If the model or the hyper-parameters do not fit the kept edit, files are
                damaged, or a new edit has no `hparams`; the message says what to do.
        """
        where = str(expanded(directory))
        rule = f"hparams must be given to begin an edit in {where}, for nothing was begun there"
        missing = ValueError(f"{rule}; got None")
        if hparams is not None:
            check_hparams(hparams)
        elif not holds_edit(where):
            raise missing
        kept = KeptDirectory(where, checkpoint_every, repair)
        try:
            if kept.latest is not None:
                kept.latest.config.check_model(model, where)
                editor = cls._holding(kept.latest, where, model, tokenizer, hparams, undo_depth)
            elif hparams is None:  # another process has just emptied the directory
                raise missing
            else:
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
        """Continue a kept edit in memory, attached if it was kept so; the directory is only read.

        Args:
            model: The model that the edit was learned on.
            tokenizer: The model's tokenizer.
            directory: Where `save` or `open` kept the edit.
            allow_other_model: Use the edit on another model of the same shape.

        Raises:
            FileNotFoundError: If no edit is kept there.
            ValueError: If the model is another or carries another edit, or the state is damaged.
        """
        path = expanded(directory)
        latest = latest_for(model, str(path), allow_other_model)
        editor = cls._holding(latest, str(path), model, tokenizer)
        editor._history.go_on(latest, path)
        return editor

    def save(self, directory: str | os.PathLike[str], overwrite: bool = False) -> None:
        """Write the edit, and the journal that led to it, into a directory in one commit.

        An edit has a journal if its directory is open, or if it was loaded with one; changes since
        then are included. An edit without one, or one that was changed by other means than its
        editor, is saved as a snapshot: a journal of one entry, which says where it came from.

        Args:
            directory: A new directory, or an earlier save of this edit, which is updated.
            overwrite: Replace a snapshot of another edit. A longer history is never replaced.

        Raises:
            BlockingIOError: If another editor has the directory open.
            OSError: If the directory cannot be written.
            ValueError: If it holds the history of another edit, or, without `overwrite`, a
                snapshot of another edit.
        """
        with self._learner.lock.changing():
            self._history.save(expanded(directory), overwrite)

    def close(self) -> None:
        """Unlock the directory, if one is open; the model keeps its edit."""
        self._history.close()

    def save_pretrained(self, directory: str | os.PathLike[str], overwrite: bool = False) -> None:
        """Write the edit as `save` does, with a model card for the Hub."""
        from baft_easyedit.storage.hub import HubEdit

        edit = HubEdit(self._history.config(), partial(self.save, overwrite=overwrite))
        edit.save_pretrained(str(expanded(directory)))

    def push_to_hub(
        self, repo_id: str, commit_message: str = "Push an edit", **options: Any
    ) -> str:
        """Upload the edit to the Hub, with its journal, which holds the requests.

        The repository is made if there is none. The options are those of
        `huggingface_hub.ModelHubMixin.push_to_hub`: `private`, `token`, `branch`, `create_pr`.

        Returns:
            The address of the commit.
        """
        from baft_easyedit.storage.hub import HubEdit

        edit = HubEdit(self._history.config(), self.save)
        return edit.push_to_hub(repo_id, commit_message=commit_message, **options)

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
        """Make an editor of an edit from the Hub, or from a directory, as `load` does.

        The options are those of `huggingface_hub.snapshot_download`: `revision`, `token`,
        `cache_dir`, `local_files_only`.
        """
        from baft_easyedit.storage.hub import local_directory

        found = local_directory(repo_or_directory, **options)
        return cls.load(model, tokenizer, found, allow_other_model)

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
        """Make an editor for a kept edit, and attach the edit if it was attached when kept."""
        edit, own = edit_of(kept, model, where)
        hparams = (hparams or own).at_depth(len(decoder_layers(model)))
        check_same_shape(edit, hparams, f"the edit in {where}")
        check_carried(model, kept, where)
        editor = cls(model, tokenizer, hparams, undo_depth=undo_depth, edit=edit)
        editor._history.origin = kept.config
        editor._learner.restore(kept.state)
        return editor
