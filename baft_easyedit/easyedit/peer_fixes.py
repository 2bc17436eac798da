"""Defects of EasyEdit's other methods that would make a comparison wrong, put right in memory.

Each function says what is wrong and why its repair changes no method's mathematics. In the order in
which a run needs them: `fix_peer` before the editor is made and `prepare_method` after it;
`edited_request` and `after_edit` around each edit; `scored_request` and `whole_answers` for each
score; `reset_method_state` after each restore.
"""

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from baft_easyedit.easyedit.base_editor import OUR_METHODS
from baft_easyedit.easyedit.joint_scoring import as_list
from baft_easyedit.easyedit.peer_caches import fill_context_templates, forget_caches
from baft_easyedit.easyedit.peer_calls import (
    APPEND_ANSWERS,
    calls_put_right,
    space_is_part_of_token,
)
from baft_easyedit.easyedit.peer_prompts import (
    learned_texts,
    learns_no_end,
    shown,
    tell_end_from_padding,
)

_PAD_RIGHT = ("PMET", "MEMIT-FE", "SimIE")
_KEEPS_WRAPPED = ("MELO", "DPO")
_TOLD = {
    "GRACE": ("values of earlier edits stay trainable", "scored by generation, as EasyEdit does"),
    "WISE": ("sequential_edit set, which its hyper-parameters lack",),
    "DEFER": ("each prompt of a batch is answered by itself",),
    "DPO": (
        "later edits train the same adapter",
        "unlearns ground_truth if there is no target_neg",
    ),
    "MELO": ("later edits extend the same model, which is unwrapped when it is restored",),
    "EAMET": ("texts keep the token that begins them",),
    "KN": ("answers are taken without the token that begins texts",),
    "EMMET": ("its copy of the weights, which EasyEdit drops, restores the model",),
    "UltraEdit": (
        "a copy of the weights restores the model",
        "its normalisation begins anew with each edit, as EasyEdit has it",
    ),
}
"""What is done for a method, beside what several need."""


def fix_peer(name: str, hparams: Any) -> tuple[str, ...]:
    """Apply the repairs that a method needs before its editor is made.

    Args:
        name: A name of `peers.PEERS`.
        hparams: Its EasyEdit hyper-parameters, changed in place where that is the repair.

    Returns:
        What was done here, or will be by `prepare_method`, to be told beside the scores.
    """
    if name == "GRACE":
        _keep_grace_values_trainable()
    elif name == "WISE":
        # WISE.py re-creates its adapter at each edit, which forgets the earlier ones, unless the
        # hyper-parameters have this attribute; it is no field of WISEHyperParams.
        hparams.sequential_edit = True
    elif name == "DEFER":
        _let_defer_answer_batches()
    elif name == "DPO":
        _let_dpo_go_on()
    notes = [*_TOLD.get(name, ())]
    if name in _PAD_RIGHT:
        notes.append("padded on the right, as its positions are counted")
    if getattr(hparams, "learn_end", False) and (reason := learns_no_end(hparams)):
        notes.append(f"does not learn where an answer ends: {reason}")
    if name in APPEND_ANSWERS:
        notes.append("answers keep their first space with a SentencePiece tokenizer")
    return tuple(f"{name}: {note}" for note in notes)


def _keep_grace_values_trainable() -> None:
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


def _let_defer_answer_batches() -> None:
    """Let DEFER answer several prompts at once.

    Its forward broadcasts one gate and one value a prompt, [B, 1] and [B, D], against [B, T, D]: an
    error, or rows mixed up where B happens to be T. For one prompt this is the same computation.
    """
    adaptor = importlib.import_module("easyeditor.models.defer.DEFER").DeferAdaptor

    def forward(self: Any, hidden: Tensor) -> Tensor:
        output = self.original_layer(hidden)  # [B, T, D]
        if self.untrained:
            return output
        query = hidden[:, min(self.key_id, hidden.shape[1] - 1)]  # [B, I]
        gate = torch.sigmoid(self.defer(query)).unsqueeze(1)  # [B, 1, 1]
        value = self.predict_values(query).unsqueeze(1)  # [B, 1, D]
        if self.training:
            return gate * value + (1 - gate) * output
        return torch.where(gate >= self.threshold, value, output)

    adaptor.forward = forward


def _let_dpo_go_on() -> None:
    """Let DPO train its adapter further at the next edit, as EasyEdit's LoRA does.

    It asks PEFT for a new adapter of the same name each time, which throws the earlier edits away.
    `after_edit` gives it its own model back.
    """
    dpo: Any = importlib.import_module("easyeditor.models.dpo.dpo_main")
    if not hasattr(dpo, "_baft_fixed"):
        original = dpo.get_peft_model
        peft_model = importlib.import_module("peft").PeftModel

        def get_peft_model(model: Any, config: Any) -> Any:
            return model if isinstance(model, peft_model) else original(model, config)

        dpo.get_peft_model = get_peft_model
        dpo._baft_fixed = True


def prepare_method(name: str, editor: Any, seed: int) -> None:
    """Prepare a method's editor, once after it is made, so that no edit depends on the one before.

    Caches that the method's module may hold of an earlier editor are emptied. The prefixes that
    ROME and its kin generate with the unedited model at their first edit are generated here, so
    they do not depend on which case comes first; the random state stays as it was. What a method
    draws during an edit (adapters, dropout, WISE's mask, CORE's prefixes) is the caller's to seed.

    Args:
        name: A name of `peers.PEERS`.
        editor: EasyEdit's `BaseEditor` of the method, with an unedited model.
        seed: Seed of the prefixes.
    """
    if name in _PAD_RIGHT:
        # They find tokens by their position in the bare text, like the ROME family, for which alone
        # `BaseEditor` pads on the right.
        editor.tok.padding_side = "right"
    tell_end_from_padding(editor)
    if name == "MELO":
        _remember_melo_modules(editor)
    editor.apply_algo = calls_put_right(name, editor.apply_algo)
    forget_caches(name)
    fill_context_templates(name, editor, seed)


def after_edit(editor: Any, edited: Any) -> None:
    """Let the next edit of a sequence start from this one; to be called after each.

    EasyEdit passes `editor.model` to each edit. Methods that wrap it and look for their wrapper
    would wrap it anew and forget: MELO and DPO get the edited model instead, until it is restored.

    Args:
        editor: EasyEdit's `BaseEditor`.
        edited: The edited model, as the method returned it.
    """
    if editor.alg_name in _KEEPS_WRAPPED:
        editor.model = edited


def reset_method_state(editor: Any) -> None:
    """Forget what a method keeps between edits where EasyEdit leaves it; after each restore."""
    name = editor.alg_name
    if name in ("AlphaEdit", "SPHERE"):
        folder = {"AlphaEdit": "alphaedit"}.get(name, name)
        module: Any = importlib.import_module(f"easyeditor.models.{folder}.{name}_main")
        module.cache_c_new = False
    elif name == "WISE":
        wise = importlib.import_module("easyeditor.models.wise.WISE")
        wise.edit_history.clear()
        wise.merge_group_edit_history.clear()
    elif name == "SimIE":
        editor.hparams._simie_instance = None
    elif name == "MELO":
        _unwrap_melo(editor)


def _remember_melo_modules(editor: Any) -> None:
    """Keep the modules that MELO will replace in the model."""
    places = editor.hparams.model
    paths = (places.grace_layer, *places.target_modules)
    modules = {path: editor.model.get_submodule(path) for path in paths}
    editor._baft_unwrapped = (editor.model, modules)


def _unwrap_melo(editor: Any) -> None:
    """Put the model's own modules back: EasyEdit keeps a model that MELO edited, edits and all.

    MELO replaces modules and shares their weights, which it never changes.
    """
    if not hasattr(editor, "_baft_unwrapped"):
        return
    model, modules = editor._baft_unwrapped
    for path, module in modules.items():
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, module)
    editor.model = model


def edited_request(request: Mapping[str, Any], editor: Any) -> dict[str, Any]:
    """Return a copy of a request for the method, which may change it.

    WISE wants exactly one `loc_prompt`: it gets the first of several, and a fixed text where there
    is none, not another request's locality probe, on which it will be scored. DPO wants the answer
    to unlearn, `target_neg`, and KN and CORE the `ground_truth`: they get the first of several.
    PMET and KN take answers' tokens without the space that a byte-level BPE puts before them in the
    text, which no evaluator asks for: where the tokenizer does so, they get them with the space.
    Ours are given the request as it is.
    """
    edited = deepcopy(dict(request))
    name = editor.alg_name
    if name in OUR_METHODS:
        return edited
    if name == "WISE":
        given = edited.get("loc_prompt") or "nq question: who sang the song of the summer"
        edited["loc_prompt"] = given if isinstance(given, str) else given[0]
    if name in ("DPO", "KN", "CORE"):
        edited["ground_truth"] = _old_answer(edited, name)
    if name == "DPO":
        edited.setdefault("target_neg", edited["ground_truth"])
    if name in ("PMET", "KN") and space_is_part_of_token(request, editor.tok):
        answers = ("target_new", "ground_truth") if name == "KN" else ("target_new",)
        edited.update({key: " " + edited[key] for key in answers})
    return edited | learned_texts(edited, editor)


def _old_answer(request: Mapping[str, Any], name: str) -> str:
    """Return a request's old answer, or the first of several.

    Raises:
        ValueError: If there is none.
    """
    answer = request.get("ground_truth")
    if not answer:
        raise ValueError(
            f"{name} needs the old answer: ground_truth must not be empty for "
            f"{request['prompt']!r}; got {answer!r}"
        )
    return _first(answer)


def scored_request(request: Mapping[str, Any], editor: Any) -> dict[str, Any]:
    """Return the request that EasyEdit's evaluator should see.

    GRACE alone is scored by generation, against `tok.encode(target)` without the space that a
    byte-level BPE puts before it in the text: a perfect edit scores 0. Where the tokenizer does so,
    the targets get that space. Nor does EasyEdit use a chat template then: all prompts but those of
    locality get it here.
    """
    if editor.alg_name != "GRACE":
        return dict(request)
    scored = deepcopy(dict(request))
    space = " " if space_is_part_of_token(request, editor.tok) else ""
    asked_space = "" if getattr(editor.hparams, "use_chat_template", False) else space
    scored["target_new"] = asked_space + scored["target_new"]
    for key in ("prompt", "rephrase_prompt"):
        if scored.get(key):
            scored[key] = shown(scored[key], editor)
    for section, before in (("locality", space), ("portability", asked_space)):
        for probe in scored.get(section, {}).values():
            prompts = as_list(probe["prompt"])
            asked = [shown(p, editor) for p in prompts]
            probe["prompt"] = prompts if section == "locality" else asked
            probe["ground_truth"] = [before + _first(a) for a in as_list(probe["ground_truth"])]
    return scored


@contextmanager
def whole_answers(model: Any, name: str) -> Iterator[None]:
    """Let GRACE's answers not end while EasyEdit scores them.

    It takes as many tokens from the back as the target has, of prompt and answer where the answer
    ends sooner, and raises where even both have fewer.
    """
    if name != "GRACE":
        yield
        return
    answering = model if hasattr(model, "generation_config") else model.model  # which GRACE wraps
    config = answering.generation_config
    ends, config.eos_token_id = config.eos_token_id, None
    try:
        yield
    finally:
        config.eos_token_id = ends


def _first(answer: Any) -> str:
    """Return an answer, or the first of several accepted ones."""
    return answer if isinstance(answer, str) else str(answer[0])
