"""The options that choose a model and its hyper-parameters, and how they are resolved."""

import argparse
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from baft_easyedit.cli.console import note
from baft_easyedit.cli.options import DTYPES, device
from baft_easyedit.files.reading import read_yaml
from baft_easyedit.files.resources import BUNDLED_MODEL, REAL_MODEL, hparams_file, own_preset
from baft_easyedit.hparams import BaFTHyperParams, read_hparams
from baft_easyedit.model.devices import check_device, needs_missing_cuda

WITHOUT_FILE: Mapping[str, Any] = {"learn_end": True, "loc_stand_ins": 4}
"""Changed hyper-parameters without `--hparams`: generated answers end, and neighbours stay."""


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose a model and its hyper-parameters."""
    model = "Hugging Face name or directory; that of --hparams, or else"
    place = "CUDA device number, or a name; that of --hparams, or else the first CUDA device, or"
    parser.add_argument("--model", help=f"{model} {BUNDLED_MODEL}, if absent")
    parser.add_argument("--hparams", help="YAML file; scaled to the model's depth if absent")
    parser.add_argument("--device", type=device, help=f"{place} the CPU, if absent")
    weights = "of the model's weights; that of --hparams, or else float32, if absent"
    parser.add_argument("--dtype", choices=DTYPES, help=weights)


def hparams_of(arguments: argparse.Namespace, in_a_row: bool = False) -> BaFTHyperParams:
    """Return the hyper-parameters of a file, of a preset, or scaled to the model's depth.

    `in_a_row` takes, without a file, a preset for many successive edits.

    Raises:
        OSError: If there is no such file, or no such model.
        TypeError: If a value has the wrong type.
        ValueError: If a value breaks a rule.
    """
    given = {"model_name": arguments.model, "device": arguments.device}
    asked = {name: value for name, value in given.items() if value is not None}
    if arguments.dtype is not None:
        asked |= {"fp16": arguments.dtype == "float16", "bf16": arguments.dtype == "bfloat16"}
    if arguments.hparams is not None:
        content = read_yaml(hparams_file(arguments.hparams), "hyper-parameters")
        if "model_name" not in {**content, **asked}:
            raise ValueError(f"--model must be given, as {arguments.hparams} has no model_name")
        hparams = read_hparams(arguments.hparams, **asked)
        return replace(hparams, device=usable_device(hparams.device, arguments.hparams))
    asked.setdefault("device", default_device())
    preset = own_preset(asked.setdefault("model_name", BUNDLED_MODEL))
    if preset is None:
        asked["layers"] = "auto"
        if not in_a_row:
            return BaFTHyperParams(**asked)
    name = f"BaFT/{preset or REAL_MODEL}{'-continual' if in_a_row else ''}"
    return BaFTHyperParams.from_hparams(name, **asked)


def default_device() -> int | str:
    """Return the first CUDA device, or the CPU."""
    return "cpu" if needs_missing_cuda(0) else 0


def usable_device(wanted: Any, file: str) -> Any:
    """Return the device that a file names; without CUDA, the CPU in its place, with a note.

    Raises:
        ValueError: If torch knows no such device, or this machine has none.
    """
    if needs_missing_cuda(wanted):
        note(f"{file} names the device {wanted!r}; torch finds no CUDA here: using the CPU")
        return "cpu"
    check_device(wanted)
    return wanted
