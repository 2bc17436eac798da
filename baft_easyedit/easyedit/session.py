"""Edit, score, generate, restore and verify, as separate steps around EasyEdit's `BaseEditor`.

`BaseEditor.edit` does all in one call: it scores each case right after its own edit, and only then.
`bench` and `speed` need the steps apart, for BaFT and ReFT and for EasyEdit's other methods, and
take them through a `Session`. It scores in eval mode; EasyEdit itself leaves LoRA's dropout on.
"""

import importlib
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from baft_easyedit.easyedit.compat import honoured_device
from baft_easyedit.easyedit.learned_tokens import LearnedTokens
from baft_easyedit.easyedit.likelihoods import Likelihood, likelihoods
from baft_easyedit.easyedit.peers.presets import peer_hparams
from baft_easyedit.easyedit.peers.prompts import edited_request, scored_request
from baft_easyedit.easyedit.peers.repairs import (
    fix_peer,
    prepare_method,
    reset_method_state,
    whole_answers,
)
from baft_easyedit.easyedit.plugin import Undo, register
from baft_easyedit.generation import generate_answers
from baft_easyedit.model.hooks import attached_edit
from baft_easyedit.model.prompt_format import PromptFormat

Request = Mapping[str, Any]

logger = logging.getLogger(__name__)

_ROUTE_BATCHES = ("WISE", "GRACE", "MELO")
"""Methods that route a whole batch by one of its prompts, or count its padding: batch size 1."""


def make_editor(hparams: Any) -> Any:
    """Make EasyEdit's `BaseEditor`, which loads the model of a method's hyper-parameters."""
    register()
    return importlib.import_module("easyeditor.editors.editor").BaseEditor.from_hparams(hparams)


def make_peer(
    name: str,
    model_path: str,
    device: Any,
    texts: Sequence[str],
    overrides: Mapping[str, Any] | None = None,
    preset: str | None = None,
    seed: int = 0,
) -> tuple[Any, tuple[str, ...]]:
    """Make the editor of one of EasyEdit's other methods, with all that it needs to run fairly.

    Returns:
        EasyEdit's `BaseEditor`, and notes to be reported beside the scores.

    Raises:
        ValueError: If the method cannot be run under this EasyEdit, or needs texts.
    """
    hparams, notes = peer_hparams(
        name, model_path, device, register().generation, overrides, preset=preset
    )
    if getattr(hparams, "mom2_adjustment", False) and not texts:
        raise ValueError(f"{name} needs statistics of the model on ordinary text: give texts")
    notes += fix_peer(name, hparams)
    editor = make_editor(hparams)
    prepare_method(name, editor, texts, seed)
    return editor, notes


class Session:
    """One model under one method of EasyEdit, edited and restored any number of times.

    Args:
        editor: An EasyEdit `BaseEditor` with an unedited model.
        probe: A text on which a restored model's logits are compared with the unedited one's.
        verify: Compare weights and logits after each restore, and keep a copy of the model to put
            back if they differ. Takes the memory of a second model.
        batch_size: Most prompts in a batch of generation.
    """

    def __init__(self, editor: Any, probe: str, verify: bool = True, batch_size: int = 32) -> None:
        self.editor = editor
        self.generation = register().generation
        self._host = importlib.import_module("easyeditor.editors.editor")
        self._probe = probe
        self.batch_size = batch_size
        self._edits: list[tuple[Any, Any]] = []  # (edited model, weights_copy) since the restore
        self._unedited = deepcopy(editor.model) if verify else None
        self._reference = self._probe_logits() if verify else None

    @property
    def model(self) -> Any:
        """The model as it is now: what the latest edit returned, or the unedited one."""
        return self._edits[-1][0] if self._edits else self.editor.model

    @property
    def _called(self) -> Any:
        """What computes logits: MELO's wrapper cannot be called, as EasyEdit's evaluators know."""
        is_wrapped = self.editor.alg_name == "MELO" and self._edits
        return self.model.model if is_wrapped else self.model

    @property
    def _devices(self) -> set[torch.device]:
        """The devices on which the model lies."""
        return {parameter.device for parameter in self._called.parameters()}

    @property
    def num_parameters(self) -> int | None:
        """Number of parameters that the edits learned or changed; None if it is not known."""
        model, weights_copy = self.model, self._edits[0][1] if self._edits else None
        edit = attached_edit(model)
        if edit is not None:
            return edit.num_parameters
        if hasattr(model, "peft_config"):
            return sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
        if isinstance(weights_copy, Mapping) and weights_copy:
            return sum(weight.numel() for weight in weights_copy.values())
        return None

    @contextmanager
    def _scoring(self) -> Iterator[None]:
        """Run EasyEdit's code on its device, with the model in eval mode."""
        modules = self.model.modules() if isinstance(self.model, nn.Module) else ()
        training = [module for module in modules if module.training]
        for module in training:
            module.training = False
        try:
            with honoured_device(self.generation, self.editor.hparams.device):
                yield
        finally:
            for module in training:
                module.training = True

    def edit(self, requests: Sequence[Request]) -> float:
        """Edit requests together in one call of the method; return the seconds it took."""
        editor = self.editor
        requests = [edited_request(request, editor) for request in requests]
        with honoured_device(self.generation, editor.hparams.device):
            synchronize(*self._devices)
            start = time.perf_counter()
            edited, weights_copy = editor.apply_algo(
                editor.model,
                editor.tok,
                requests,
                editor.hparams,
                copy=False,
                return_orig_weights=True,
                keep_original_weight=self.generation == "pypi",
                train_ds=None,
            )
            synchronize(*self._devices)
            seconds = time.perf_counter() - start
        self._edits.append((edited, weights_copy))
        if editor.alg_name == "MELO":  # wraps a model that is not yet its wrapper, so would forget
            editor.model = edited
        return seconds

    def score(self, requests: Sequence[Request]) -> list[dict[str, Any]]:
        """Score requests on the model as it is now with EasyEdit's `compute_edit_quality`."""
        editor, h, tok = self.editor, self.editor.hparams, self._scoring_tokenizer()
        with self._scoring(), whole_answers(self.model, editor.alg_name):
            return [
                self._host.compute_edit_quality(
                    self.model, editor.model_name, h, tok, scored_request(request, editor), h.device
                )
                for request in requests
            ]

    def _scoring_tokenizer(self) -> LearnedTokens:
        """Return the tokenizer that all methods, EasyEdit's too, are scored with."""
        return LearnedTokens(self.editor.tok, PromptFormat.of(self.editor.hparams))

    def score_against(
        self, pre: Sequence[Mapping[str, Any]], requests: Sequence[Request]
    ) -> list[dict[str, Any]]:
        """Score requests; locality is agreement with `pre`, the unedited model's scores.

        Returns:
            EasyEdit's metrics of each request, under `pre` and `post`.
        """
        editor, scored = self.editor, []
        for request, before, after in zip(requests, pre, self.score(requests), strict=True):
            metrics = {"pre": deepcopy(dict(before)), "post": after}
            if self.generation == "current":
                self._host.finalize_locality_metrics(
                    metrics, request, editor.hparams, editor.model_name
                )
            else:
                _compare_locality(metrics, request)
            scored.append(metrics)
        return scored

    def token_accuracies(self, prompts: Sequence[str], targets: Sequence[str]) -> list[float]:
        """Return EasyEdit's teacher-forced token accuracy of each target after its prompt."""
        module = importlib.import_module("easyeditor.evaluate.evaluate_utils")
        h, tok = self.editor.hparams, self._scoring_tokenizer()
        with self._scoring():
            scores = module.test_prediction_acc(
                self._called, tok, h, list(prompts), list(targets), h.device
            )
        return [float(score) for score in np.ravel(scores)]

    def likelihoods(self, asked: Sequence[tuple[str, str, bool]]) -> list[Likelihood]:
        """Return how likely the model finds answers, each a prompt, the answer, and if it is local.

        Local prompts never get the chat template, as EasyEdit has it.
        """
        tok, prompt_format = self.editor.tok, PromptFormat.of(self.editor.hparams)
        texts = []
        for prompt, answer, is_local in asked:
            shown = prompt_format.without_template() if is_local else prompt_format
            whole = shown.whole_ids(prompt, answer, tok)
            # Where both meet in one token, that is the answer's.
            texts.append((whole, min(len(shown.prompt_ids(prompt, tok)), len(whole) - 1)))
        with self._scoring():
            return likelihoods(self._called, tok, texts, self._batch_size(), self._input_device())

    def answers(
        self,
        prompts: Sequence[str | Sequence[int]],
        max_new_tokens: Sequence[int],
        top_k: int | None = None,
    ) -> list[str]:
        """Answer texts or token ids as `generate_answers` does; each has a limit of its own."""
        size, device = self._batch_size(), self._input_device()
        with self._scoring():
            return generate_answers(
                self.model, self.editor.tok, prompts, max_new_tokens, device, size, top_k=top_k
            )

    def _batch_size(self) -> int:
        """Return how many texts may be in one batch."""
        return 1 if self.editor.alg_name in _ROUTE_BATCHES else self.batch_size

    def task_scores(self, tasks: Any) -> Any:
        """Return the scores of the model as it is now in `harness.Tasks`, without chat template."""
        from baft_easyedit.harness import EditedLM

        with self._scoring():
            lm = EditedLM(self.editor.model, self.editor.tok, self._batch_size(), self._called)
            return tasks.scores(lm)

    def restore(self) -> bool | None:
        """Undo all edits with EasyEdit's own means; put a copy back if they were not exact.

        Returns:
            Whether EasyEdit's restore was bit-exact; None if that is not verified.

        Raises:
            Exception: Whatever EasyEdit raises, if there is no copy to put back.
        """
        # For EasyEdit's methods, what the first edit returned undoes them all: it holds the
        # unedited weights, or, of LoRA, the only PEFT model that can unload. Each edit of BaFT or
        # ReFT is undone by itself, the latest first.
        edits, self._edits = self._edits, []
        is_each_its_own = any(isinstance(weights_copy, Undo) for _, weights_copy in edits)
        try:
            for edited, weights_copy in reversed(edits if is_each_its_own else edits[:1]):
                with honoured_device(self.generation, self.editor.hparams.device):
                    if self.generation == "current":
                        self._host.restore_after_edit(self.editor, edited, weights_copy)
                    else:
                        _restore_as_the_release_does(self.editor, edited, weights_copy)
        # A restore that fails counts as one that is not exact: the scores stand, with a note.
        except Exception:
            if self._unedited is None:
                raise
            logger.warning("EasyEdit could not restore %s", self.editor.alg_name, exc_info=True)
        reset_method_state(self.editor)
        if self._unedited is None:
            return None
        if self._is_unedited(self._unedited):
            return True
        self.editor.model = deepcopy(self._unedited)
        return False

    def _input_device(self) -> torch.device:
        """Return the device that the model's tokens must be on."""
        return next(self.editor.model.parameters()).device

    def _probe_logits(self) -> Tensor:
        """Return the unedited model's logits on the probe."""
        batch = self.editor.tok(self._probe, return_tensors="pt").to(self._input_device())
        with torch.no_grad(), self._scoring():
            return self.editor.model(input_ids=batch["input_ids"]).logits

    def _is_unedited(self, unedited: nn.Module) -> bool:
        """Compare weights, names and probe logits with the unedited model's, bit for bit."""
        now, before = self.editor.model.state_dict(), unedited.state_dict()
        return (
            now.keys() == before.keys()
            and all(torch.equal(now[name], before[name]) for name in before)
            and torch.equal(self._probe_logits(), self._reference)  # type: ignore[arg-type]
        )


def synchronize(*devices: torch.device) -> None:
    """Wait until devices have done all their work, so that a clock read afterwards has seen it."""
    for device in devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)


def _compare_locality(metrics: Mapping[str, Any], request: Request) -> None:
    """Write locality accuracies as `BaseEditor.edit` of the release does, inside that method."""
    pre, post = metrics["pre"]["locality"], metrics["post"]["locality"]
    for key in request.get("locality") or {}:
        outputs = zip(post[f"{key}_output"], pre[f"{key}_output"], strict=True)
        post[f"{key}_acc"] = [float(np.mean(np.equal(after, before))) for after, before in outputs]


def _restore_as_the_release_does(editor: Any, edited: Any, weights_copy: Any) -> None:
    """Restore a model as `BaseEditor.edit` of the release does, inside that method."""
    nethook = importlib.import_module("easyeditor.util.nethook")
    with torch.no_grad():
        if callable(weights_copy):  # ours
            weights_copy()
        elif editor.alg_name == "LoRA":
            edited.unload()
            del editor.model.peft_config
        else:
            for name, weight in weights_copy.items():
                nethook.get_parameter(editor.model, name)[...] = weight
