"""Peers' hyper-parameters for models of another depth and width than the bundled one.

Layers keep their relative depth and step sizes follow the width, as far as small models of several
widths told; heuristics both.
"""

import math
import re
from typing import Any

_DEPTH, _WIDTH = 6, 192
"""Layers and hidden size of the model that the YAML files are made for."""
_LAYER_IN_PATH = r"(?<=[.\[])\d+(?=[.\]])"
"""model.layers[4].mlp... in some methods, model.layers.4.mlp... in others."""


def scale_layers(config: dict[str, Any], depth: int) -> None:
    """Move layers to the same relative depth, in place; they stay distinct, and below the last.

    Args:
        config: A peer's hyper-parameters.
        depth: Number of decoder layers.
    """

    def moved(layer: int) -> int:
        return min(max(depth - 2, 0), round(layer / _DEPTH * depth))

    if config.get("layers"):
        config["layers"] = sorted({moved(layer) for layer in config["layers"]})
    if "v_loss_layer" in config:
        config["v_loss_layer"] = depth - 1
    if "layer_range" in config:  # CORE watches this many layers after the edited ones
        config["layer_range"] = max(1, round(config["layer_range"] / _DEPTH * depth))
    if "inner_params" in config:
        paths = [
            re.sub(_LAYER_IN_PATH, lambda match: str(moved(int(match[0]))), path)
            for path in config["inner_params"]
        ]
        config["inner_params"] = list(dict.fromkeys(paths))
    if config["alg_name"] == "MELO":
        _shift_melo(config["model"], depth)


def _shift_melo(model: dict[str, Any], depth: int) -> None:
    """Move MELO's layers together: those with LoRA blocks come right after the one that routes."""
    first = int(re.findall(_LAYER_IN_PATH, model["target_modules"][0])[0])
    shift = min(max(round(first / _DEPTH * depth), 1), depth - 1) - first

    def moved(path: str) -> str:
        return re.sub(_LAYER_IN_PATH, lambda match: str(int(match[0]) + shift), path)

    model["grace_layer"] = moved(model["grace_layer"])
    targets = [moved(path) for path in model["target_modules"]]
    model["target_modules"] = [
        path for path in targets if int(re.findall(_LAYER_IN_PATH, path)[0]) < depth
    ]


def scale_steps(name: str, config: dict[str, Any], width: int) -> None:
    """Scale the step sizes that depend on a model's width, in place.

    Args:
        name: One of `PEERS`.
        config: Its hyper-parameters.
        width: Hidden size.
    """
    narrower = _WIDTH / width
    if name in ("FT-L", "FT-M"):
        config["lr"] *= math.sqrt(narrower)
    elif name == "DEFER":
        config["edit_lr"] *= math.sqrt(narrower)
    elif name == "UltraEdit":
        config["lr"] *= narrower**2.2
    elif config.get("mom2_adjustment"):
        config["mom2_update_weight"] /= narrower**1.5
