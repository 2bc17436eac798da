"""Defects of EasyEdit's other methods that would make a comparison wrong, put right in memory.

Each says what is wrong; none changes a method's mathematics. In the order of a run: `fix_peer`
before the editor is made and `prepare_method` after it; `after_edit` after each edit;
`whole_answers` around each score; `reset_method_state` after each restore.
"""

import functools
import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from baft_easyedit.easyedit.host import loaded_generation
from baft_easyedit.easyedit.peers.caches import make_caches_anew, method_module
from baft_easyedit.easyedit.peers.methods import batchable
from baft_easyedit.easyedit.peers.prompts import (
    APPEND_ANSWERS,
    learns_no_end,
    suited_tokenizer,
    tell_end_from_padding,
)

_PAD_RIGHT = ("PMET", "MEMIT-FE", "SimIE")
"""They find tokens by their position in the bare text, like the ROME family, for which alone
`BaseEditor` pads on the right."""
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
    "EAMET": ("texts keep the token that begins them when they are scored",),
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
        name: A name of `PEERS`.
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
        method_module("defer.DEFER").DeferAdaptor.forward = _forward_of_defer
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
    grace = method_module("grace.GRACE").GRACE
    original = grace.edit

    def edit(self: Any, *args: Any, **kwargs: Any) -> Any:
        for module in self.model.modules():
            values = module._parameters.get("values")
            if isinstance(values, nn.Parameter):
                values.requires_grad_(True)
        return original(self, *args, **kwargs)

    grace.edit = edit


def _forward_of_defer(self: Any, hidden: Tensor) -> Tensor:
    """Answer several prompts at once, as `DeferAdaptor.forward` answers one.

    That broadcasts one gate and one value a prompt, [B, 1] and [B, D], against [B, T, D]: an error,
    or rows mixed up where B happens to be T.
    """
    output = self.original_layer(hidden)  # [B, T, D]
    if self.untrained:
        return output
    query = hidden[:, min(self.key_id, hidden.shape[1] - 1)]  # [B, I]
    gate = torch.sigmoid(self.defer(query)).unsqueeze(1)  # [B, 1, 1]
    value = self.predict_values(query).unsqueeze(1)  # [B, 1, D]
    if self.training:
        return gate * value + (1 - gate) * output
    return torch.where(gate >= self.threshold, value, output)


def _let_dpo_go_on() -> None:
    """Let DPO train its adapter further at the next edit, as EasyEdit's LoRA does.

    It asks PEFT for a new adapter of the same name each time, which throws the earlier edits away.
    """
    dpo, peft = method_module("dpo.dpo_main"), importlib.import_module("peft")
    dpo.get_peft_model = lambda model, config: (
        model if isinstance(model, peft.PeftModel) else peft.get_peft_model(model, config)
    )


def prepare_method(name: str, editor: Any, seed: int) -> None:
    """Prepare a method's editor, once after it is made, so that no edit depends on the one before.

    What a method draws during an edit (adapters, dropout, WISE's mask, CORE's prefixes) is the
    caller's to seed.

    Args:
        name: A name of `PEERS`.
        editor: EasyEdit's `BaseEditor` of the method, with an unedited model.
        seed: Seed of the prefixes that some methods edit behind; the random state stays as it was.
    """
    if name in _PAD_RIGHT:
        editor.tok.padding_side = "right"
    tell_end_from_padding(editor)
    if name == "MELO":  # it replaces modules and shares their weights, which it never changes
        places = editor.hparams.model
        paths = (places.grace_layer, *places.target_modules)
        modules = {path: editor.model.get_submodule(path) for path in paths}
        editor._baft_unwrapped = (editor.model, modules)
    editor.apply_algo = _put_right(name, editor.apply_algo)
    make_caches_anew(name, editor, seed)


def _put_right(name: str, apply: Callable[..., tuple[Any, Any]]) -> Callable[..., tuple[Any, Any]]:
    """Wrap a method's entry point: one mini-batch a call, a suited tokenizer, and a way back.

    `BaseEditor.batch_edit` passes `batch_size` requests a call. Methods count on that: UltraEdit
    ignores further ones and asserts that there are not fewer, FT and LoRA split them up.
    """

    @functools.wraps(apply)
    def apply_to_model(
        model: Any, tok: Any, requests: Sequence[Any], hparams: Any, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        if batchable(name, loaded_generation()):
            hparams.batch_size = len(requests)
            if hasattr(hparams, "batch_size_once"):  # UltraEdit's part of it, a divisor
                hparams.batch_size_once = 1
        if name == "EMMET":  # it drops its copy of the weights unless it is told not to
            kwargs["keep_original_weight"] = True
        if name == "MELO":
            _check_free_block(model, hparams.grace.num_block)
        kept = _weights_of_modules(model, hparams) if name == "UltraEdit" else None
        suited = suited_tokenizer(name, tok, requests, hparams)
        edited, weights_copy = apply(model, suited, requests, hparams, *args, **kwargs)
        return edited, weights_copy if kept is None else kept

    return apply_to_model


def _check_free_block(model: Any, num_blocks: int) -> None:
    """Refuse an edit for which MELO has no LoRA block left; it would train none, and say nothing.

    Raises:
        ValueError: If there have been as many edits as blocks.
    """
    edited_before = hasattr(model, "grace_layer")
    if edited_before and model.model.get_submodule(model.grace_layer).block_id >= num_blocks:
        raise ValueError(
            f"MELO's grace.num_block must be at least the number of edits in a row; got "
            f"{num_blocks}: set more"
        )


def _weights_of_modules(model: Any, hparams: Any) -> dict[str, Tensor]:
    """Copy the weights that UltraEdit changes.

    It looks for parameters by the names of modules, finds none, and returns nothing to restore.
    """
    names = [f"{path.removesuffix('.weight')}.weight" for path in hparams.inner_params]
    return {name: model.get_parameter(name).detach().clone() for name in names}


def after_edit(editor: Any, edited: Any) -> None:
    """Let the next edit of a sequence start from the edited model, as the method returned it.

    EasyEdit passes `editor.model` to each edit. Methods that wrap it and look for their wrapper
    would wrap it anew and forget: MELO and DPO get the edited model instead, until it is restored.
    """
    if editor.alg_name in _KEEPS_WRAPPED:
        editor.model = edited


def reset_method_state(editor: Any) -> None:
    """Forget what a method keeps between edits where EasyEdit leaves it; after each restore."""
    name = editor.alg_name
    if name == "AlphaEdit":
        method_module("alphaedit.AlphaEdit_main").cache_c_new = False
    elif name == "SPHERE":
        method_module("SPHERE.SPHERE_main").cache_c_new = False
    elif name == "WISE":
        wise = method_module("wise.WISE")
        wise.edit_history.clear()
        wise.merge_group_edit_history.clear()
    elif name == "SimIE":
        editor.hparams._simie_instance = None
    elif hasattr(editor, "_baft_unwrapped"):  # EasyEdit keeps a model that MELO edited
        editor.model, modules = editor._baft_unwrapped
        for path, module in modules.items():
            parent, _, child = path.rpartition(".")
            setattr(editor.model.get_submodule(parent), child, module)


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
