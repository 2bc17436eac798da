"""Repairs, in memory, of defects in EasyEdit's other methods that would falsify a comparison.

Each says what is wrong; none changes a method's mathematics. In the order of a run: `fix_peer`
before the editor is made and `prepare_method` after it; `whole_answers` around each score;
`reset_method_state` after each restore.
"""

import functools
import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from baft_easyedit.easyedit.compat import honoured_device
from baft_easyedit.easyedit.host import loaded_generation
from baft_easyedit.easyedit.peers.methods import batchable
from baft_easyedit.easyedit.peers.prompts import (
    APPEND_ANSWERS,
    learns_end,
    suited_tokenizer,
    tell_end_from_padding,
)
from baft_easyedit.easyedit.peers.statistics import key_moments, null_space

_TEMPLATES_IN = {
    "ROME": "rome.rome_main",
    "MEMIT": "memit.memit_main",
    "AlphaEdit": "alphaedit.AlphaEdit_main",
    "WISE": "wise.utils",
}
"""Modules, below `easyeditor.models`, that keep prefixes in `CONTEXT_TEMPLATES_CACHE`."""
_WISE_LENGTHS = [[5, 5], [10, 5]]
"""As `apply_wise_to_model` has them: number of tokens, and of prefixes."""
_NOTES = {
    "GRACE": ("values of earlier edits stay trainable", "scored by generation, as EasyEdit does"),
    "WISE": ("sequential_edit set, which its hyper-parameters lack",),
    "MELO": ("later edits extend the same model, which is unwrapped when it is restored",),
    "UltraEdit": (
        "a copy of the weights restores the model",
        "its normalisation begins anew with each edit, as EasyEdit has it",
    ),
}
"""Notes on what is done for one method alone."""


def method_module(path: str) -> Any:
    """Import a module of EasyEdit's methods."""
    return importlib.import_module(f"easyeditor.models.{path}")


def fix_peer(name: str, hparams: Any) -> tuple[str, ...]:
    """Apply the repairs that a method needs before its editor is made, to its hyper-parameters too.

    Returns:
        Notes on what is done, here or by `prepare_method`, to be reported beside the scores.
    """
    if name == "GRACE":
        _keep_grace_values_trainable()
    elif name == "WISE":
        # WISE.py re-creates its adapter at each edit, which forgets the earlier ones, unless the
        # hyper-parameters have this attribute; it is no field of WISEHyperParams.
        hparams.sequential_edit = True
    notes = [*_NOTES.get(name, ())]
    if getattr(hparams, "learn_end", False) and not learns_end(hparams):
        notes.append("does not learn where an answer ends")
    if name in APPEND_ANSWERS:
        notes.append("answers keep their first space with a SentencePiece tokenizer")
    return tuple(f"{name}: {note}" for note in notes)


def _keep_grace_values_trainable() -> None:
    """Let GRACE edit again near an old key.

    GRACE's constructor freezes every parameter, also the values that earlier edits learned. A later
    edit that reuses one of these values then has nothing to train ("does not require grad").
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


def prepare_method(name: str, editor: Any, texts: Sequence[str], seed: int) -> None:
    """Prepare a method's editor, once after it is made, so that no edit depends on the one before.

    Of the texts are the statistics that some methods need. The seed is of the prefixes that some
    methods edit behind; the random state stays as it was. The caller seeds what a method draws
    during an edit (adapters, dropout, WISE's mask).

    Raises:
        ValueError: If no direction is below AlphaEdit's threshold.
    """
    tell_end_from_padding(editor)
    if name == "MELO":  # it wraps these modules, and leaves their weights as they are
        places = editor.hparams.model
        paths = (places.grace_layer, *places.target_modules)
        modules = {path: editor.model.get_submodule(path) for path in paths}
        editor._baft_unwrapped = (editor.model, modules)
    editor.apply_algo = _put_right(name, editor.apply_algo)
    if name in _TEMPLATES_IN:
        _make_prefixes(name, editor, seed)
    if getattr(editor.hparams, "mom2_adjustment", False):
        _fill_statistics(name, editor, texts)


def _make_prefixes(name: str, editor: Any, seed: int) -> None:
    """Generate the prefixes that a method edits behind.

    Methods would do so at their first edit; so they do not depend on which case comes first.
    """
    module, h = method_module(_TEMPLATES_IN[name]), editor.hparams
    module.CONTEXT_TEMPLATES_CACHE = None
    arguments: tuple[Any, ...] = ()
    if name == "ROME":
        arguments = (h.context_template_length_params,)
    elif name == "WISE":
        arguments = (_WISE_LENGTHS, editor.device)
    with torch.random.fork_rng(), honoured_device(loaded_generation(), h.device):
        torch.manual_seed(seed)
        module.get_context_templates(editor.model, editor.tok, *arguments)


def _fill_statistics(name: str, editor: Any, texts: Sequence[str]) -> None:
    """Put the statistics of texts where a method keeps those that it has computed."""
    h, model = editor.hparams, editor.model
    modules = [h.rewrite_module_tmp.format(layer) for layer in h.layers]
    moments = key_moments(model, editor.tok, texts, modules)
    device = next(model.parameters()).device
    module = method_module(_TEMPLATES_IN[name])
    if name == "AlphaEdit":
        spaces = [null_space(m.to(device), h.nullspace_threshold) for m in moments.values()]
        module.P, module.P_loaded, module.cache_c_new = torch.stack(spaces), True, False
        h.P_loc = os.devnull  # a file that is there, and is not read
        return
    place = str(model.config._name_or_path).replace("/", "_")
    for path, moment in moments.items():
        if name == "ROME":
            inverse = torch.inverse(moment.to(device))
            method_module("rome.compute_u").inv_mom2_cache[place, path] = inverse
        else:
            module.COV_CACHE[place, path] = moment


def _put_right(name: str, apply: Callable[..., tuple[Any, Any]]) -> Callable[..., tuple[Any, Any]]:
    """Wrap a method's entry point: one mini-batch a call, a suited tokenizer, and a way back.

    `BaseEditor.batch_edit` passes `batch_size` requests a call, and methods rely on it: UltraEdit
    ignores further ones and asserts that there are not fewer, FT and LoRA split them up.
    """

    @functools.wraps(apply)
    def apply_to_model(
        model: Any, tok: Any, requests: Sequence[Any], hparams: Any, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        if batchable(name, loaded_generation()):
            hparams.batch_size = len(requests)
            if hasattr(hparams, "batch_size_once"):  # of UltraEdit, which it must divide
                hparams.batch_size_once = 1
        if name == "MELO":
            _check_free_block(model, hparams.grace.num_block)
        kept = _weights_of_modules(model, hparams) if name == "UltraEdit" else None
        suited = suited_tokenizer(name, tok, requests, hparams)
        edited, weights_copy = apply(model, suited, requests, hparams, *args, **kwargs)
        return edited, weights_copy if kept is None else kept

    return apply_to_model


def _check_free_block(model: Any, num_blocks: int) -> None:
    """Refuse an edit for which MELO has no LoRA block left: it would silently train none."""
    edited_before = hasattr(model, "grace_layer")
    if edited_before and model.model.get_submodule(model.grace_layer).block_id >= num_blocks:
        raise ValueError(
            f"MELO's grace.num_block must be at least the number of edits in a row; got "
            f"{num_blocks}: set more"
        )


def _weights_of_modules(model: Any, hparams: Any) -> dict[str, Tensor]:
    """Copy the weights that UltraEdit changes.

    UltraEdit looks for parameters by the names of modules, finds none, and returns no weights.
    """
    names = [f"{path.removesuffix('.weight')}.weight" for path in hparams.inner_params]
    return {name: model.get_parameter(name).detach().clone() for name in names}


def reset_method_state(editor: Any) -> None:
    """Clear, after a restore, the state that a method keeps between edits and EasyEdit leaves."""
    name = editor.alg_name
    if name == "AlphaEdit":
        method_module("alphaedit.AlphaEdit_main").cache_c_new = False
    elif name == "WISE":
        wise = method_module("wise.WISE")
        wise.edit_history.clear()
        wise.merge_group_edit_history.clear()
    elif hasattr(editor, "_baft_unwrapped"):  # EasyEdit keeps a model that MELO edited
        editor.model, modules = editor._baft_unwrapped
        for path, module in modules.items():
            parent, _, child = path.rpartition(".")
            setattr(editor.model.get_submodule(parent), child, module)


@contextmanager
def whole_answers(model: Any, name: str) -> Iterator[None]:
    """Let GRACE generate past the end-of-sequence token while EasyEdit scores it in this context.

    EasyEdit compares the last tokens of prompt and answer, as many as the target has: of an answer
    that ends sooner these include the prompt's, and it raises if both together have fewer.
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
