"""EasyEdit's other methods, with hyper-parameters for small Llamas, to compare BaFT with.

The values are those of `hparams/peers/<METHOD>/facts-llama.yaml`, made for the bundled model. For a
model of another depth or width, layers keep their relative depth and step sizes follow the width:
heuristics, to be tuned on held-out requests before a comparison is published.
"""

import importlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import yaml

from baft_easyedit.easyedit.host import Generation
from baft_easyedit.easyedit.statistics import write_key_statistics, write_null_space
from baft_easyedit.resources import hparams_file

_CLASSES = {
    "FT-L": ("ft", "FTHyperParams"),
    "FT-M": ("ft", "FTHyperParams"),
    "LoRA": ("lora", "LoRAHyperParams"),
    "ROME": ("rome", "ROMEHyperParams"),
    "MEMIT": ("memit", "MEMITHyperParams"),
    "WISE": ("wise", "WISEHyperParams"),
    "GRACE": ("grace", "GraceHyperParams"),
    "AlphaEdit": ("alphaedit", "AlphaEditHyperParams"),
    "UltraEdit": ("ultraedit", "UltraEditHyperParams"),
}
PEERS = tuple(_CLASSES)
"""Names of the methods; FT-L and FT-M are EasyEdit's FT with two objectives."""
NEED_TEXTS = ("MEMIT", "AlphaEdit")
"""Methods that need statistics of the model's keys on ordinary text."""
_RELEASE_HAS = ("FT-L", "LoRA", "ROME", "MEMIT")

_DEPTH, _WIDTH = 6, 192
"""Layers and hidden size of the model that the YAML files are made for."""


@dataclass(frozen=True)
class ModelShape:
    """What hyper-parameters depend on."""

    depth: int
    width: int
    tied: bool
    """Whether the output layer shares the input embedding's weights."""

    @classmethod
    def of(cls, model_path: str) -> "ModelShape":
        """Read a model's configuration."""
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(model_path)
        return cls(config.num_hidden_layers, config.hidden_size, bool(config.tie_word_embeddings))


def is_available(name: str, generation: Generation) -> bool:
    """Tell whether a generation of EasyEdit has a method; any but a peer counts as yes."""
    return generation == "current" or name not in PEERS or name in _RELEASE_HAS


def not_available(name: str) -> str:
    """Return what is said of a peer that the release does not have."""
    return f"{name} is not in the release 0.0.1.dev0 of EasyEdit"


def peer_config(name: str, shape: ModelShape) -> dict[str, Any]:
    """Return a peer's hyper-parameters for a model of some shape; paths are still to be filled in.

    Args:
        name: One of `PEERS`.
        shape: The model's shape.

    Raises:
        ValueError: If the name is unknown.
    """
    if name not in _CLASSES:
        raise ValueError(f"method must be one of {', '.join(PEERS)}; got {name!r}")
    file = hparams_file(f"peers/{name}/facts-llama")
    config: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
    _scale_layers(config, shape.depth)
    _scale_steps(name, config, shape.width)
    if "lm_head_module" in config and shape.tied:
        # EasyEdit looks the weight up by name, and a tied output layer has none of its own.
        config["lm_head_module"] = "model.embed_tokens"
    return config


def _scale_layers(config: dict[str, Any], depth: int) -> None:
    """Move layers to the same relative depth; they stay distinct, and never become the last."""

    def moved(layer: int) -> int:
        return min(max(depth - 2, 0), round(layer / _DEPTH * depth))

    if config.get("layers"):
        config["layers"] = sorted({moved(layer) for layer in config["layers"]})
    if "v_loss_layer" in config:
        config["v_loss_layer"] = depth - 1
    for i, path in enumerate(config.get("inner_params", ())):
        # model.layers[4].mlp... in some methods, model.layers.4.mlp... in others
        config["inner_params"][i] = re.sub(
            r"(?<=[.\[])\d+(?=[.\]])", lambda match: str(moved(int(match[0]))), path
        )
    if "inner_params" in config:
        config["inner_params"] = list(dict.fromkeys(config["inner_params"]))


def _scale_steps(name: str, config: dict[str, Any], width: int) -> None:
    """Scale the step sizes that depend on a model's width."""
    narrower = _WIDTH / width
    if name in ("FT-L", "FT-M"):
        config["lr"] *= math.sqrt(narrower)
    elif name == "UltraEdit":
        config["lr"] *= narrower**2.2
    elif name in NEED_TEXTS:
        config["mom2_update_weight"] /= narrower**1.5


def peer_hparams(
    name: str,
    model_path: str,
    device: Any,
    workdir: Path,
    generation: Generation,
    num_texts: int = 0,
    overrides: Mapping[str, Any] | None = None,
) -> tuple[Any, tuple[str, ...]]:
    """Make a peer's EasyEdit hyper-parameters.

    Args:
        name: One of `PEERS`.
        model_path: The model's directory, such as `host_model_path` returns.
        device: EasyEdit's `device`.
        workdir: Where statistics and the filled-in YAML go.
        generation: EasyEdit's generation; its module must be imported.
        num_texts: Number of texts for the statistics; see `write_statistics`.
        overrides: Values that replace those of the YAML.

    Returns:
        The hyper-parameters, and what they cannot say to this EasyEdit.

    Raises:
        ValueError: If the name is unknown, this EasyEdit lacks the method, or it needs texts and
            there are none.
    """
    if not is_available(name, generation):
        raise ValueError(not_available(name))
    if name in NEED_TEXTS and num_texts == 0:
        raise ValueError(f"{name} needs statistics of the model on ordinary text: give texts")
    config = {**peer_config(name, ModelShape.of(model_path)), **(overrides or {})}
    paths = {
        "model_name": model_path,
        "tokenizer_name": model_path,
        "stats_dir": str(workdir / "stats"),
        "P_loc": str(workdir / "stats" / "null_space.pt"),
        "mom2_n_samples": num_texts,
    }
    config.update({key: value for key, value in paths.items() if key in config})
    # The release counts CUDA devices only; without CUDA its device 0 is the CPU (`devices.py`).
    without_cuda = generation == "pypi" and not torch.cuda.is_available()
    config["device"] = 0 if without_cuda else device
    module, class_name = _CLASSES[name]
    hparams_class = getattr(importlib.import_module(f"easyeditor.models.{module}"), class_name)
    dropped: list[str] = []
    if generation == "pypi":  # its classes lack a few fields of the current ones
        dropped = sorted(set(config) - {field.name for field in fields(hparams_class)})
    file = workdir / f"{name}.yaml"
    kept = {key: value for key, value in config.items() if key not in dropped}
    file.write_text(yaml.safe_dump(kept), encoding="utf-8")
    notes = (f"this EasyEdit's {name} has no {', '.join(dropped)}",) if dropped else ()
    return hparams_class.from_hparams(str(file)), notes


def write_statistics(editor: Any, texts: Sequence[str]) -> None:
    """Write the key statistics that a peer's hyper-parameters point to.

    Args:
        editor: EasyEdit's `BaseEditor` of the peer, with an unedited model.
        texts: As many texts as `peer_hparams` was told.
    """
    h = editor.hparams
    name = str(editor.model.config._name_or_path)
    moments = write_key_statistics(
        editor.model,
        editor.tok,
        h.layers,
        texts,
        Path(h.stats_dir),
        (name.rsplit("/", 1)[-1], name.replace("/", "_")),  # current, release
    )
    if hasattr(h, "P_loc"):
        write_null_space([moments[layer] for layer in h.layers], Path(h.P_loc))
