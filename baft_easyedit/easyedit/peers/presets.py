"""Hyper-parameters of EasyEdit's other methods.

The values are those of a preset: a file `hparams/peers/<METHOD>/<preset>.yaml` of ours, tuned for a
model, or one that EasyEdit ships. Without a preset they are those made for the bundled model,
`facts-llama`, scaled to the model's depth and width: heuristics, to be tuned on held-out requests
before a comparison is published.
"""

import importlib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml

from baft_easyedit.easyedit.host import Generation, load_host
from baft_easyedit.easyedit.peers.methods import METHODS, why_not
from baft_easyedit.easyedit.peers.prompts import HOW_TO_ASK
from baft_easyedit.files.paths import read_text
from baft_easyedit.files.resources import has_hparams, hparams_file, merged_settings

_DEPTH, _WIDTH = 6, 192
"""Layers and hidden size of the model that the files `facts-llama.yaml` are made for."""
_LAYER_IN_PATH = r"(?<=[.\[])\d+(?=[.\]])"
"""The 4 of model.layers[4].mlp... or model.layers.4.mlp..."""
_EDITORS_OWN = {"fp16", "bf16", "model_parallel"}
"""Hyper-parameters that `BaseEditor`, or our wrapper of it, reads of any method's class."""


def peer_config(name: str, model: Any) -> dict[str, Any]:
    """Return a peer's hyper-parameters, without paths: those for `facts-llama`, scaled.

    `model` is the configuration of the model to which they are scaled.
    """
    config: dict[str, Any] = yaml.safe_load(read_text(hparams_file(f"peers/{name}/facts-llama")))
    _scale_layers(config, model.num_hidden_layers)
    narrower = _WIDTH / model.hidden_size
    if name in ("FT-L", "FT-M"):
        config["lr"] *= math.sqrt(narrower)
    elif name == "UltraEdit":
        config["lr"] *= narrower**2.2
    elif config.get("mom2_adjustment"):
        config["mom2_update_weight"] /= narrower**1.5
    if "lm_head_module" in config and model.tie_word_embeddings:
        # EasyEdit looks the weight up by name, and a tied output layer has none of its own.
        config["lm_head_module"] = "model.embed_tokens"
    return config


def _scale_layers(config: dict[str, Any], depth: int) -> None:
    """Move a peer's layers to the same relative depth, in place; distinct, and below the last."""

    def scaled(layer: int) -> int:
        return min(max(depth - 2, 0), round(layer / _DEPTH * depth))

    if config.get("layers"):
        config["layers"] = sorted({scaled(layer) for layer in config["layers"]})
    if "v_loss_layer" in config:
        config["v_loss_layer"] = depth - 1
    if "inner_params" in config:
        paths = [_moved(path, scaled) for path in config["inner_params"]]
        config["inner_params"] = list(dict.fromkeys(paths))
    if config["alg_name"] == "MELO":  # its LoRA blocks come right after the layer that routes
        model = config["model"]
        first = _layer(model["target_modules"][0])
        shift = min(max(round(first / _DEPTH * depth), 1), depth - 1) - first
        model["grace_layer"] = _moved(model["grace_layer"], lambda layer: layer + shift)
        targets = [_moved(path, lambda layer: layer + shift) for path in model["target_modules"]]
        model["target_modules"] = [path for path in targets if _layer(path) < depth]


def _moved(path: str, move: Callable[[int], int]) -> str:
    """Return a module's path in another layer."""
    return re.sub(_LAYER_IN_PATH, lambda match: str(move(int(match[0]))), path)


def _layer(path: str) -> int:
    """Return the layer of a module's path."""
    return int(re.findall(_LAYER_IN_PATH, path)[0])


def own_preset_config(name: str, preset: str) -> dict[str, Any] | None:
    """Return a peer's hyper-parameters in `hparams/peers/<METHOD>/<preset>.yaml`, if it exists."""
    file = f"peers/{name}/{preset}"
    return yaml.safe_load(read_text(hparams_file(file))) if has_hparams(file) else None


def _shipped_presets(name: str) -> dict[str, Path]:
    """Return the files of hyper-parameters that EasyEdit ships for a peer, by model name."""
    root = load_host().path.parent / "hparams"
    if not root.is_dir():
        raise ValueError(
            f"this EasyEdit ships no hyper-parameters: there is no {root}. They come with a clone, "
            "not with the release: set EASYEDIT_HOME to one, or give no preset"
        )
    return {file.stem: file for file in sorted((root / METHODS[name].folder).glob("*.yaml"))}


def _config(
    name: str, model_path: str, preset: str | None
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return a preset's hyper-parameters, or scaled ones; and a note if a preset is not ours."""
    from transformers import AutoConfig

    if preset is None:
        return peer_config(name, AutoConfig.from_pretrained(model_path)), ()
    tuned = own_preset_config(name, preset)
    if tuned is not None:
        return tuned, ()
    shipped, wanted = _shipped_presets(name), preset.lower()
    exact = [file for known, file in shipped.items() if known.lower() == wanted]
    # UltraEdit's is llama3-8b-instruct, others' is llama3-8b
    longer = [file for known, file in shipped.items() if known.lower().startswith(f"{wanted}-")]
    if exact or longer:
        file = [*exact, *longer][0]
        note = f"{name}: EasyEdit's hparams/{METHODS[name].folder}/{file.name}"
        return yaml.safe_load(read_text(file)), (note,)
    note = (
        f"{name}: EasyEdit ships no {preset} (it has {', '.join(shipped) or 'none'}); the bundled "
        "model's values, scaled"
    )
    return peer_config(name, AutoConfig.from_pretrained(model_path)), (note,)


def peer_hparams(
    name: str,
    model_path: str,
    device: Any,
    generation: Generation,
    overrides: Mapping[str, Any] | None = None,
    *,
    preset: str | None = None,
) -> tuple[Any, tuple[str, ...]]:
    """Make a peer's EasyEdit hyper-parameters for the model in a directory.

    Args:
        name: One of `PEERS`.
        model_path: The directory, such as `host_model_path` returns.
        device: EasyEdit's `device`.
        generation: That of the imported EasyEdit.
        overrides: Values that replace those of the file; nested ones (MELO) in nested mappings.
            Beside its own, any method takes those of `HOW_TO_ASK`.
        preset: A file of `hparams/peers/<METHOD>`, such as `smollm2`; or else a model name of
            EasyEdit's `hparams/<METHOD>`, in any case, such as `llama-7b`. Where there is neither,
            the bundled model's values are scaled, and a note says so.

    Returns:
        The hyper-parameters, and notes to be reported beside the scores.

    Raises:
        ValueError: If the method cannot be run (`why_not`), or a preset is wanted of an EasyEdit
            that ships none.
    """
    reason = why_not(name, generation)
    if reason is not None:
        raise ValueError(reason)
    config, notes = _config(name, model_path, preset)
    config = {**merged_settings(config, overrides or {}), **METHODS[name].given}
    config.update({key: model_path for key in ("model_name", "tokenizer_name") if key in config})
    if name == "MELO":
        config["model"].update(name=model_path, tokenizer_name=model_path)
        # A classifier's tokenizer that is loaded and never used: any will do.
        config["lora"]["cls_name"] = model_path
    # The release counts CUDA devices only; without CUDA its device 0 is the CPU (`devices`).
    without_cuda = generation == "pypi" and not torch.cuda.is_available()
    config["device"] = 0 if without_cuda else device
    how_to_ask = {key: config.pop(key) for key in HOW_TO_ASK if key in config}
    hparams, lacking = _loaded(name, config, generation)
    vars(hparams).update(how_to_ask)
    return hparams, (*notes, *lacking)


def _loaded(
    name: str, config: Mapping[str, Any], generation: Generation
) -> tuple[Any, tuple[str, ...]]:
    """Let EasyEdit load a configuration from a file; note the keys that its class lacks."""
    hparams_class = getattr(importlib.import_module("easyeditor"), METHODS[name].hparams_class)
    unknown = set(config) - {field.name for field in fields(hparams_class)}
    # The editor reads some from any class; the release's classes lack fields of the current ones.
    attributes = unknown & _EDITORS_OWN
    lacking = unknown - attributes if generation == "pypi" else set()
    kept = {k: v for k, v in config.items() if k not in attributes | lacking}
    with TemporaryDirectory(prefix="easyedit-") as directory:
        file = Path(directory, "hparams.yaml")
        file.write_text(yaml.safe_dump(kept), encoding="utf-8")
        hparams = hparams_class.from_hparams(str(file))
    for key in attributes:
        setattr(hparams, key, config[key])
    notes = (f"this EasyEdit's {name} has no {', '.join(sorted(lacking))}",) if lacking else ()
    return hparams, notes
