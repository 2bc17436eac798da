"""Defects of EasyEdit's other methods that would make a comparison wrong, put right in memory.

Each function says what is wrong and why its repair changes no method's mathematics.
"""

import importlib
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from torch import nn


def fix_peer(name: str, hparams: Any) -> tuple[str, ...]:
    """Apply the repairs that a method needs.

    Args:
        name: A name of `peers.PEERS`.
        hparams: Its EasyEdit hyper-parameters, changed in place where that is the repair.

    Returns:
        What was done, to be told beside the scores.
    """
    if name == "GRACE":
        return (_keep_grace_values_trainable(), "GRACE is scored by generation, as EasyEdit does")
    if name == "WISE":
        # WISE.py re-creates its adapter at each edit, which forgets the earlier ones, unless the
        # hyper-parameters have this attribute; it is no field of WISEHyperParams.
        hparams.sequential_edit = True
        return ("WISE: sequential_edit set, which its hyper-parameters lack",)
    return ()


def _keep_grace_values_trainable() -> str:
    """Let GRACE edit again near an old key.

    Its constructor freezes every parameter, the values of earlier edits among them; an edit that
    reuses one of those then has nothing to train ("does not require grad").
    """
    grace = importlib.import_module("easyeditor.models.grace.GRACE").GRACE
    if not hasattr(grace, "_baft_fixed"):
        original = grace.edit

        def edit(self: Any, *args: Any, **kwargs: Any) -> Any:
            for module in self.model.modules():
                values = module._parameters.get("values")
                if isinstance(values, nn.Parameter):
                    values.requires_grad_(True)
            return original(self, *args, **kwargs)

        grace.edit = edit
        grace._baft_fixed = True
    return "GRACE: values of earlier edits stay trainable"


def reset_method_state(editor: Any) -> None:
    """Forget what a method keeps in its module between edits, where EasyEdit leaves it."""
    if editor.alg_name == "AlphaEdit":
        alphaedit: Any = importlib.import_module("easyeditor.models.alphaedit.AlphaEdit_main")
        alphaedit.cache_c_new = False
    elif editor.alg_name == "ULTRAEDIT":
        executor = editor.apply_algo.__self__
        if getattr(executor, "is_init", False):
            executor.reset_model()
    elif editor.alg_name == "WISE":
        wise = importlib.import_module("easyeditor.models.wise.WISE")
        wise.edit_history.clear()
        wise.merge_group_edit_history.clear()


def edited_request(request: Mapping[str, Any], editor: Any) -> dict[str, Any]:
    """Return a copy of a request for the method, which may change it.

    WISE wants exactly one `loc_prompt`: it gets the first of several, and a fixed text where there
    is none, not another request's locality probe, on which it will be scored.
    """
    edited = deepcopy(dict(request))
    if editor.alg_name == "WISE":
        given = edited.get("loc_prompt") or "nq question: who sang the song of the summer"
        edited["loc_prompt"] = given if isinstance(given, str) else given[0]
    return edited


def scored_request(request: Mapping[str, Any], editor: Any) -> dict[str, Any]:
    """Return the request that EasyEdit's evaluator should see.

    GRACE alone is scored by generation, against `tok.encode(target)` without the space that a
    byte-level BPE puts before it in the text: a perfect edit scores 0. Where the tokenizer does so,
    the targets get that space.
    """
    scored = dict(request)
    if editor.alg_name != "GRACE" or not _space_is_part_of_token(request, editor.tok):
        return scored
    scored = deepcopy(scored)
    scored["target_new"] = " " + scored["target_new"]
    for section in ("locality", "portability"):
        for probe in scored.get(section, {}).values():
            for key in ("prompt", "ground_truth"):
                probe[key] = [probe[key]] if isinstance(probe[key], str) else list(probe[key])
            probe["ground_truth"] = [" " + _first(answer) for answer in probe["ground_truth"]]
    return scored


def _first(answer: Any) -> str:
    """Return an answer, or the first of several accepted ones."""
    return answer if isinstance(answer, str) else str(answer[0])


def _space_is_part_of_token(request: Mapping[str, Any], tok: Any) -> bool:
    """Tell whether a target's tokens in a text are those of the target with its space."""
    text = tok.encode(request["prompt"] + " " + request["target_new"], add_special_tokens=False)
    bare = tok.encode(request["target_new"], add_special_tokens=False)
    spaced = tok.encode(" " + request["target_new"], add_special_tokens=False)
    return text[-len(bare) :] != bare and text[-len(spaced) :] == spaced
