"""Peers' hyper-parameters for models of another depth and width than the bundled one.

Layers keep their relative depth and step sizes follow the width, as far as small models of several
widths told; heuristics both.
"""

import math
import re
from collections.abc import Callable
from typing import Any

_DEPTH, _WIDTH = 6, 192
"""Layers and hidden size of the model that the YAML files are made for."""
_LAYER_IN_PATH = r"(?<=[.\[])\d+(?=[.\]])"
"""The 4 of model.layers[4].mlp... or model.layers.4.mlp..."""


def _moved(path: str, move: Callable[[int], int]) -> str:
    """Return a module's path in another layer."""
    return re.sub(_LAYER_IN_PATH, lambda match: str(move(int(match[0]))), path)


def _layer(path: str) -> int:
    """Return the layer of a module's path."""
    return int(re.findall(_LAYER_IN_PATH, path)[0])


def scale_layers(config: dict[str, Any], depth: int) -> None:
    """Move a peer's layers to the same relative depth, in place; distinct, and below the last."""

    def scaled(layer: int) -> int:
        return min(max(depth - 2, 0), round(layer / _DEPTH * depth))

    if config.get("layers"):
        config["layers"] = sorted({scaled(layer) for layer in config["layers"]})
    if "v_loss_layer" in config:
        config["v_loss_layer"] = depth - 1
    if "layer_range" in config:  # CORE watches this many layers after the edited ones
        config["layer_range"] = max(1, round(config["layer_range"] / _DEPTH * depth))
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


def scale_steps(name: str, config: dict[str, Any], width: int) -> None:
    """Scale, in place, the step sizes of a peer that depend on a model's hidden size."""
    narrower = _WIDTH / width
    if name in ("FT-L", "FT-M"):
        config["lr"] *= math.sqrt(narrower)
    elif name == "DEFER":
        config["edit_lr"] *= math.sqrt(narrower)
    elif name == "UltraEdit":
        config["lr"] *= narrower**2.2
    elif config.get("mom2_adjustment"):
        config["mom2_update_weight"] /= narrower**1.5
