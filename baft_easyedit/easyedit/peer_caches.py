"""Caches in the modules of EasyEdit's other methods: emptied, and filled the same way each time."""

import functools
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
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
_INVERSES_IN = {
    "ROME": "rome.compute_u",
    "R-ROME": "r_rome.compute_u",
    "SimIE": "rome.compute_u",
}
"""Modules that keep inverted statistics in `inv_mom2_cache`."""
_WISE_LENGTHS = [[5, 5], [10, 5]]
"""As `apply_wise_to_model` has them: number of tokens, and of prefixes."""


def forget_caches(name: str) -> None:
    """Empty the caches in a method's module, which know models by name and texts not at all.

    Args:
        name: A name of `peers.PEERS`; those without caches are left alone.
    """
    if name not in _TEMPLATES_IN:
        return
    module = _module(_TEMPLATES_IN[name])
    module.CONTEXT_TEMPLATES_CACHE = None
    getattr(module, "COV_CACHE", {}).clear()
    if hasattr(module, "P_loaded"):
        module.P_loaded = module.cache_c_new = False
    if name in _INVERSES_IN:
        _module(_INVERSES_IN[name]).inv_mom2_cache.clear()


def fill_context_templates(name: str, editor: Any, seed: int) -> None:
    """Generate the prefixes that a method edits behind, as it would at its first edit.

    Args:
        name: A name of `peers.PEERS`; those without prefixes are left alone.
        editor: EasyEdit's `BaseEditor` of the method, with an unedited model.
        seed: Seed of the generation; torch's random state stays as it was.
    """
    if name not in _TEMPLATES_IN:
        return
    h = editor.hparams
    arguments: dict[str, tuple[Any, ...]] = {
        "CORE": tuple(getattr(h, key, None) for key in ("ctx_len", "ctx_top_k", "ctx_num")),
        "WISE": (_WISE_LENGTHS, getattr(editor, "device", None)),
    }
    if name in ("ROME", "R-ROME", "SimIE"):
        lengths = getattr(h, "_base_hparams", h).context_template_length_params
        arguments[name] = (lengths,)
    with (
        torch.random.fork_rng(),
        honoured_device(loaded_generation(), h.device),
        _default_device(editor),
    ):
        torch.manual_seed(seed)
        _module(_TEMPLATES_IN[name]).get_context_templates(
            editor.model, editor.tok, *arguments.get(name, ())
        )


@contextmanager
def _default_device(editor: Any) -> Iterator[None]:
    """Let the generation that EAMET calls use the editor's device.

    `generate_standard` asks for no device and so gets the first CUDA device wherever there is one.
    """
    generate: Any = importlib.import_module("easyeditor.util.generate")
    if not hasattr(generate, "normalize_device"):  # the release
        yield
        return
    original = generate.normalize_device
    generate.normalize_device = functools.partial(original, editor.hparams.device)
    try:
        yield
    finally:
        generate.normalize_device = original


def _module(path: str) -> Any:
    """Import a module of EasyEdit's methods."""
    return importlib.import_module(f"easyeditor.models.{path}")
