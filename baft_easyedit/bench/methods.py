"""What a benchmark's rows run with: our hyper-parameters by protocol, and texts for statistics."""

from collections.abc import Sequence
from typing import Any

from baft_easyedit.bench.config import BenchConfig, MethodConfig
from baft_easyedit.bench.protocol import Protocol
from baft_easyedit.easyedit.peers import why_not
from baft_easyedit.files.paths import expanded, read_text
from baft_easyedit.files.resources import has_hparams, own_preset
from baft_easyedit.generation import model_depth
from baft_easyedit.hparams import OUR_METHODS, BaFTHyperParams, scaled_layers

_SUFFIXES = {"single": "", "continual": "-continual", "batched": "-batch"}
_NUM_TEXTS = 500
"""About how many of the bundled facts serve as texts for key statistics."""


def check_methods(config: BenchConfig) -> None:
    """Check every row's settings, as far as that goes without loading EasyEdit or a model.

    Errors are those of `our_hparams` and `why_not`, and a ValueError for a row that cannot be so.
    """
    for method in config.methods:
        why_not(method.method, "current")  # raises if there is no such method
        if method.method in OUR_METHODS:
            for protocol in config.protocols:
                our_hparams(config, method, protocol)
        elif method.hparams is not None:
            raise ValueError(
                f"hparams is for BaFT and ReFT only; got it for the row {method.name!r}: use "
                "peer_preset, or set"
            )


def our_hparams(
    config: BenchConfig,
    method: MethodConfig,
    protocol: Protocol,
    model_path: str | None = None,
    device: int | str | None = None,
) -> BaFTHyperParams:
    """Make the hyper-parameters of a row of BaFT or ReFT for one protocol.

    `model_path` and `device` are EasyEdit's; those of the configuration if None.
    """
    hparams_class = OUR_METHODS[method.method]
    values: dict[str, Any] = {
        "model_name": model_path or config.model,
        "device": config.device if device is None else device,
        "batch_size": protocol.batch_size,
        **{name: getattr(config, name) for name in ("fp16", "bf16", "model_parallel", "seed")},
        **asked_of_all(config),
        **method.set,
    }
    preset = _preset(config, method, protocol)
    if preset is None:
        values.setdefault("layers", scaled_layers(model_depth(config.model)))
        return hparams_class.from_dict(values)
    return hparams_class.from_hparams(preset, **values)


def asked_of_all(config: BenchConfig) -> dict[str, bool]:
    """Return the hyper-parameters that a configuration sets for every method."""
    names = ("fp16", "bf16", "model_parallel", "use_chat_template", "learn_end")
    return {name: True for name in names if getattr(config, name)}


def _preset(config: BenchConfig, method: MethodConfig, protocol: Protocol) -> str | None:
    """Return the YAML of a row under a protocol; None if there is none for the model."""
    if method.hparams is not None:
        return method.hparams
    preset = config.preset or own_preset(config.model)
    if config.preset is None and not has_hparams(f"{method.method}/{preset}"):
        return None
    special = f"{method.method}/{preset}{_SUFFIXES[protocol.name]}"
    return special if has_hparams(special) else f"{method.method}/{preset}"


def statistics_texts(config: BenchConfig) -> Sequence[str]:
    """Return the texts for the key statistics of MEMIT and its kin: a file's, or bundled facts."""
    if config.texts is None:
        from baft_easyedit.facts import questions

        asked = questions("trained")
        return [f"{q.prompt} {q.answer}" for q in asked[:: max(1, len(asked) // _NUM_TEXTS)]]
    lines = read_text(expanded(config.texts)).splitlines()
    texts = [line.strip() for line in lines if line.strip()]
    if not texts:
        raise ValueError(f"texts must name a file with a passage a line; {config.texts} has none")
    return texts
