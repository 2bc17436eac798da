"""The options that choose a model and its hyper-parameters, and how a command gets both."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from baft_easyedit.cli.console import note, silence_loading
from baft_easyedit.cli.options import DTYPES, device
from baft_easyedit.editor import BaFTEditor
from baft_easyedit.files.messages import short
from baft_easyedit.files.reading import read_yaml
from baft_easyedit.files.resources import (
    BUNDLED_MODEL,
    REAL_MODEL,
    hparams_file,
    model_location,
)
from baft_easyedit.hparams import BaFTHyperParams, read_hparams
from baft_easyedit.model.devices import check_device, needs_missing_cuda
from baft_easyedit.storage.loading import kept_hparams
from baft_easyedit.storage.reading import holds_edit, read_latest


def add_model_options(parser: argparse.ArgumentParser, begins: bool = True) -> None:
    """Add the options that choose a model and, of a command that begins edits, the settings."""
    add = parser.add_argument
    other = "that of the kept edit" + (" or --hparams, or else {}," if begins else "")
    own = f"needed if the kept edit's is neither {BUNDLED_MODEL} nor {REAL_MODEL}"
    absent = f"{other.format(BUNDLED_MODEL)} if absent"
    add("--model", help=f"Hugging Face name or directory; {absent} ({own})")
    place = "that of --hparams, or else the first" if begins else "the first"
    add("--device", type=device, help=f"CUDA device number, or a name; {place}, or the CPU")
    add("--dtype", choices=DTYPES, help=f"of the weights; {other.format('float32')} if absent")
    if begins:
        add("--hparams", help="YAML file; scaled to the model's depth if absent")


def add_other_model_option(parser: argparse.ArgumentParser) -> None:
    """Add the option to use a kept edit on a model that it was not learned on."""
    other = "use the edit on another model of the same shape, a fine-tuned one, say"
    parser.add_argument("--allow-other-model", action="store_true", help=other)


def begun(arguments: argparse.Namespace, asked: Sequence[Mapping[str, Any]] = ()) -> BaFTEditor:
    """Open a kept edit with its model, or begin one.

    Args:
        arguments: The options of `add_model_options`, and the `directory`.
        asked: Requests, which are checked first, so that no edit is begun for a bad one.
    """
    model, tokenizer, hparams = load_to_edit(arguments)
    if asked:
        BaFTEditor(model, tokenizer, hparams).check(asked)
    return BaFTEditor.open(model, tokenizer, arguments.directory, hparams)


def load_to_edit(arguments: argparse.Namespace) -> tuple[Any, Any, BaFTHyperParams]:
    """Load a model and its tokenizer, and the settings of a kept edit or of one to begin."""
    if arguments.hparams is None and arguments.directory and holds_edit(arguments.directory):
        model, tokenizer = load(arguments)
        read_latest(arguments.directory).config.check_model(model, str(arguments.directory))
        return model, tokenizer, kept_hparams(arguments.directory, model)
    hparams = hparams_of(arguments)
    model, tokenizer = _load(hparams.model_name, hparams.device, hparams.dtype)
    if arguments.hparams is None:
        from baft_easyedit.generation import with_usable_end

        hparams = with_usable_end(replace(hparams, learn_end=True), tokenizer)
    return model, tokenizer, hparams


def load(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """Load the model of a kept edit, and the model's tokenizer.

    Raises:
        FileNotFoundError: If no edit is kept there.
        ValueError: If `--model` is absent, and the edit is not of one of the package's own models.
    """
    config = read_latest(arguments.directory).config
    learned = config.fingerprint.dtypes
    dtype = arguments.dtype or (learned if learned in DTYPES else "float32")
    names = (BUNDLED_MODEL, REAL_MODEL)  # no other name is trusted
    own = (n for n in names if Path(model_location(n)).name == config.base_model)
    name = arguments.model or next(own, None)
    if name is None:
        raise ValueError(
            f"--model must be given; the edit in {arguments.directory} is of "
            f"{short(config.base_model)}"
        )
    return _load(name, default_device(arguments.device), dtype)


def _load(name: str, place: int | str, dtype: str) -> tuple[Any, Any]:
    """Load a model and its tokenizer without the messages of other libraries."""
    import torch

    from baft_easyedit.generation import load_model

    silence_loading()
    return load_model(name, place, getattr(torch, dtype))


def hparams_of(arguments: argparse.Namespace) -> BaFTHyperParams:
    """Return the hyper-parameters of a file, or those of SmolLM2 at the model's depth.

    Raises:
        OSError: If there is no such file, or no such model.
        TypeError: If a value has the wrong type.
        ValueError: If a value breaks a rule.
    """
    asked = given(arguments, "device")
    if arguments.model is not None:
        asked["model_name"] = arguments.model
    if arguments.dtype is not None:
        asked |= {"fp16": arguments.dtype == "float16", "bf16": arguments.dtype == "bfloat16"}
    if arguments.hparams is not None:
        content = read_yaml(hparams_file(arguments.hparams), "hyper-parameters")
        if "model_name" not in {**content, **asked}:
            raise ValueError(f"--model must be given, as {arguments.hparams} has no model_name")
        hparams = read_hparams(arguments.hparams, **asked)
        return replace(hparams, device=usable_device(hparams.device, arguments.hparams))
    asked = {"model_name": BUNDLED_MODEL, "device": default_device(), **asked}
    return BaFTHyperParams.from_hparams(f"BaFT/{REAL_MODEL}", layers="auto", **asked)


def given(arguments: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Return those of some options that the command has and that are given."""
    found = {name: getattr(arguments, name, None) for name in names}
    return {name: value for name, value in found.items() if value is not None}


def default_device(asked: int | str | None = None) -> int | str:
    """Return the device that is asked for; if none is, the first CUDA device, or the CPU."""
    if asked is not None:
        return asked
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
