"""Run any of EasyEdit's methods under EasyEdit's own evaluators, by the paper's protocols.

Single: each case is edited on the unedited model, scored, restored. Continual: T cases are edited
in order and those T scored AFTER the T-th edit, then restored (EasyEdit's `sequential_edit=True`
scores each case right after its own edit). Every number comes from EasyEdit's
`compute_edit_quality`; models are scored in eval mode, which EasyEdit forgets for LoRA's dropout.
"""

import importlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from baft_easyedit.easyedit.devices import honoured_device
from baft_easyedit.easyedit.peer_fixes import edited_request, reset_method_state, scored_request
from baft_easyedit.easyedit.plugin import register
from baft_easyedit.easyedit.records import RunResult, plain, summarise
from baft_easyedit.hooks import attached_edit

Progress = Callable[[int, int, Mapping[str, Any]], None]
"""Called after each case with the number done, the number in all, and the case's record."""
Request = Mapping[str, Any]

logger = logging.getLogger(__name__)

_NOTE_NOT_RESTORED = "EasyEdit's restore did not bring the model back: replaced by a copy"


class Session:
    """EasyEdit's own pieces around one `BaseEditor`: apply, score, restore, verify.

    Args:
        editor: An EasyEdit `BaseEditor` with an unedited model.
        probe: A text on which restored models are compared.
        verify: Compare weights and logits after each restore, and keep a copy of the model to put
            back if they differ. Takes the memory of a second model.
    """

    def __init__(self, editor: Any, probe: str, verify: bool = True) -> None:
        self.editor = editor
        self.generation = register().generation
        self._host = importlib.import_module("easyeditor.editors.editor")
        self._probe = probe
        self._unedited = deepcopy(editor.model) if verify else None
        self._reference = self._probe_logits() if verify else None

    def pre_score(self, request: Request) -> dict[str, Any]:
        """Score a request on the editor's model as it is."""
        return self._score(self.editor.model, request)

    def apply(self, request: Request) -> tuple[Any, Any, float]:
        """Edit; return the edited model, EasyEdit's `weights_copy`, and the seconds it took."""
        editor = self.editor
        with honoured_device(self.generation, editor.hparams.device):
            start = time.perf_counter()
            edited, weights_copy = editor.apply_algo(
                editor.model,
                editor.tok,
                [edited_request(request, editor)],
                editor.hparams,
                copy=False,
                return_orig_weights=True,
                keep_original_weight=self.generation == "pypi",
                train_ds=None,
            )
            return edited, weights_copy, time.perf_counter() - start

    def post_score(self, edited: Any, request: Request, pre: Mapping[str, Any]) -> dict[str, Any]:
        """Score a request on the edited model, locality against its `pre` scores."""
        metrics = {"pre": deepcopy(dict(pre)), "post": self._score(edited, request)}
        editor = self.editor
        if self.generation == "current":
            self._host.finalize_locality_metrics(
                metrics, request, editor.hparams, editor.model_name
            )
        else:
            _compare_locality(metrics, request)
        return metrics

    def restore(self, edited: Any, weights_copy: Any) -> bool:
        """Restore the model with EasyEdit's own means; put a copy back if it is not bit-equal.

        Returns:
            Whether EasyEdit's restore was exact; True if not verified.
        """
        try:
            with honoured_device(self.generation, self.editor.hparams.device):
                if self.generation == "current":
                    self._host.restore_after_edit(self.editor, edited, weights_copy)
                else:
                    _restore_as_the_release_does(self.editor, edited, weights_copy)
        # A peer whose restore fails is one that does not restore: its scores stand, and say so.
        except Exception:
            if self._unedited is None:
                raise
            logger.warning("EasyEdit could not restore %s", self.editor.alg_name, exc_info=True)
        reset_method_state(self.editor)
        if self._unedited is None or self._is_unedited():
            return True
        self.editor.model = deepcopy(self._unedited)
        return False

    def _score(self, model: Any, request: Request) -> dict[str, Any]:
        """Run EasyEdit's evaluator."""
        editor = self.editor
        with _evaluating(model), honoured_device(self.generation, editor.hparams.device):
            return self._host.compute_edit_quality(
                model,
                editor.model_name,
                editor.hparams,
                editor.tok,
                scored_request(request, editor),
                editor.hparams.device,
            )

    def _probe_logits(self) -> Tensor:
        """Return the model's logits on the probe."""
        model = self.editor.model
        batch = self.editor.tok(self._probe, return_tensors="pt")
        device = next(model.parameters()).device
        with torch.no_grad(), _evaluating(model):
            return model(**{name: value.to(device) for name, value in batch.items()}).logits

    def _is_unedited(self) -> bool:
        """Compare weights, names and probe logits with the unedited model's, bit for bit."""
        now, before = self.editor.model.state_dict(), self._unedited.state_dict()  # type: ignore[union-attr]
        same = now.keys() == before.keys() and all(
            torch.equal(now[name], before[name]) for name in before
        )
        return same and torch.equal(self._probe_logits(), self._reference)  # type: ignore[arg-type]


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Put a model's modules into eval mode inside this context."""
    modules = model.modules() if isinstance(model, nn.Module) else ()
    training = [module for module in modules if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


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
        if editor.alg_name == "KN":
            weights_copy()
        elif editor.alg_name == "LoRA":
            edited.unload()
            del editor.model.peft_config
        else:
            for name, weight in weights_copy.items():
                nethook.get_parameter(editor.model, name)[...] = weight


def run_single(
    editor: Any,
    requests: Sequence[Request],
    progress: Progress | None = None,
    *,
    verify: bool = True,
) -> RunResult:
    """Edit each case on the unedited model, score it, restore the model.

    Args:
        editor: An EasyEdit `BaseEditor` with an unedited model, on which it is left.
        requests: EasyEdit's request dicts, as `prepare_requests` makes them complete.
        progress: Called after each case.
        verify: Check each restore bit for bit; takes the memory of a second model.

    Raises:
        ValueError: If there are no requests.
    """
    requests = prepare_requests(requests)
    session = Session(editor, requests[0]["prompt"], verify)
    cases: list[dict[str, Any]] = []
    restored, parameters = 0, None
    for request in requests:
        pre = session.pre_score(request)
        edited, weights_copy, seconds = session.apply(request)
        metrics = session.post_score(edited, request, pre)
        parameters = changed_parameters(edited, weights_copy)
        restored += session.restore(edited, weights_copy)
        cases.append(plain({"case_id": request["case_id"], "edit_time_s": seconds, **metrics}))
        if progress is not None:
            progress(len(cases), len(requests), cases[-1])
    counts = (restored, len(cases)) if verify else None
    return _result(editor, "single", cases, parameters, counts)


def run_continual(
    editor: Any,
    requests: Sequence[Request],
    T: int,
    progress: Progress | None = None,
    *,
    verify: bool = True,
) -> RunResult:
    """Edit T cases in order, score those T after the T-th edit, restore, go on with the next T.

    Args:
        editor: An EasyEdit `BaseEditor` with an unedited model, on which it is left.
        requests: EasyEdit's request dicts; the last run is shorter if T does not divide them.
        T: Edits in a row.
        progress: Called after each edit; the scores are not known then.
        verify: Check each restore bit for bit; takes the memory of a second model.

    Raises:
        ValueError: If there are no requests, or T is below 1.
    """
    if T < 1:
        raise ValueError(f"T must be at least 1; got {T}")
    requests = prepare_requests(requests)
    session = Session(editor, requests[0]["prompt"], verify)
    cases: list[dict[str, Any]] = []
    restored = runs = 0
    parameters = None
    for start in range(0, len(requests), T):
        chunk = requests[start : start + T]
        pre = [session.pre_score(request) for request in chunk]
        edits = []
        for request in chunk:
            edits.append(session.apply(request))
            if progress is not None:
                progress(start + len(edits), len(requests), {"case_id": request["case_id"]})
        edited = edits[-1][0]
        parameters = changed_parameters(edited, edits[0][1])
        for request, before, (_, _, seconds) in zip(chunk, pre, edits, strict=True):
            metrics = session.post_score(edited, request, before)
            cases.append(plain({"case_id": request["case_id"], "edit_time_s": seconds, **metrics}))
        runs += 1
        # What the first edit returned is what undoes them all: it kept the unedited weights, and
        # EasyEdit's LoRA returns its PEFT model, which can unload, from the first edit only.
        restored += session.restore(*edits[0][:2])
    counts = (restored, runs) if verify else None
    return _result(editor, f"continual-{T}", cases, parameters, counts)


def _result(
    editor: Any,
    protocol: str,
    cases: Sequence[Mapping[str, Any]],
    parameters: int | None,
    counts: tuple[int, int] | None,
) -> RunResult:
    """Average the cases of a run; `counts` are exact restores and all, None if not verified."""
    notes = ["scored in eval mode"]
    restored, restores = counts or (None, None)
    if counts is None:
        notes.append("restores were not verified")
    elif counts[0] < counts[1]:
        notes.append(f"{_NOTE_NOT_RESTORED} ({counts[1] - counts[0]} of {counts[1]} times)")
    return RunResult(
        method=editor.alg_name,
        protocol=protocol,
        n=len(cases),
        trainable_parameters=parameters,
        num_restored=restored,
        num_restores=restores,
        notes=tuple(notes),
        cases=tuple(cases),
        **summarise(cases),  # type: ignore[arg-type]
    )


def changed_parameters(edited: Any, weights_copy: Any) -> int | None:
    """Count the numbers that an edit learned or changed; None if there is no telling."""
    if isinstance(edited, nn.Module):
        edit = attached_edit(edited)
        if edit is not None:
            return edit.num_parameters
        if hasattr(edited, "peft_config"):
            return sum(p.numel() for name, p in edited.named_parameters() if "lora_" in name)
    if isinstance(weights_copy, Mapping) and weights_copy:
        return sum(weight.numel() for weight in weights_copy.values())
    return None


def prepare_requests(requests: Sequence[Request]) -> list[dict[str, Any]]:
    """Complete request dicts with what EasyEdit reads without asking.

    Missing `ground_truth`, `case_id`, `locality` and `portability` are added; empty probes are
    dropped.

    Raises:
        ValueError: If there are no requests.
    """
    if not requests:
        raise ValueError("requests must hold at least one request; got none")
    complete = []
    for i, request in enumerate(requests):
        item = {"ground_truth": None, "case_id": i, **deepcopy(dict(request))}
        for section in ("locality", "portability"):
            probes = item.get(section) or {}
            item[section] = {k: v for k, v in probes.items() if v and v.get("prompt")}
        complete.append(item)
    return complete
