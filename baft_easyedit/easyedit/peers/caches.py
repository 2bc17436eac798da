"""What the modules of EasyEdit's other methods keep: emptied, and filled the same way each time."""

import importlib
from typing import Any

import torch

from baft_easyedit.easyedit.devices import honoured_device
from baft_easyedit.easyedit.host import loaded_generation

_TEMPLATES_IN = {
    "ROME": "rome.rome_main",
    "R-ROME": "r_rome.r_rome_main",
    "MEMIT": "memit.memit_main",
    "MEMIT-FE": "memit_FE.memit_FE_main",
    "EMMET": "emmet.emmet_main",
    "PMET": "pmet.pmet_main",
    "EAMET": "eamet.eamet_main",
    "CORE": "core.core_main",
    "AlphaEdit": "alphaedit.AlphaEdit_main",
    "SPHERE": "SPHERE.SPHERE_main",
    "WISE": "wise.utils",
    "SimIE": "rome.rome_main",
}
"""Modules, below `easyeditor.models`, that keep prefixes in `CONTEXT_TEMPLATES_CACHE`."""
_WISE_LENGTHS = [[5, 5], [10, 5]]
"""As `apply_wise_to_model` has them: number of tokens, and of prefixes."""


def method_module(path: str) -> Any:
    """Import a module of EasyEdit's methods."""
    return importlib.import_module(f"easyeditor.models.{path}")


def make_caches_anew(name: str, editor: Any, seed: int) -> None:
    """Empty the caches of a method's module, and generate the prefixes that it edits behind.

    The caches know models by name and texts not at all. The prefixes, which ROME and its kin would
    generate at their first edit, then do not depend on which case comes first.

    Args:
        name: A name of `PEERS`; those without caches are left alone.
        editor: EasyEdit's `BaseEditor` of the method, with an unedited model.
        seed: Seed of the generation; torch's random state stays as it was.
    """
    if name not in _TEMPLATES_IN:
        return
    module, h = method_module(_TEMPLATES_IN[name]), editor.hparams
    module.CONTEXT_TEMPLATES_CACHE = None
    getattr(module, "COV_CACHE", {}).clear()
    if hasattr(module, "P_loaded"):
        module.P_loaded = module.cache_c_new = False
    arguments: tuple[Any, ...] = ()
    if name in ("ROME", "R-ROME", "SimIE"):
        package = _TEMPLATES_IN[name].partition(".")[0]
        method_module(f"{package}.compute_u").inv_mom2_cache.clear()
        arguments = (getattr(h, "_base_hparams", h).context_template_length_params,)
    elif name == "WISE":
        arguments = (_WISE_LENGTHS, getattr(editor, "device", None))
    elif name == "CORE":
        arguments = tuple(getattr(h, key, None) for key in ("ctx_len", "ctx_top_k", "ctx_num"))
    with torch.random.fork_rng(), honoured_device(loaded_generation(), h.device):
        torch.manual_seed(seed)
        module.get_context_templates(editor.model, editor.tok, *arguments)
