"""The configuration of a kept edit: hyper-parameters, the model it belongs to, and versions."""

import logging
import os
import platform
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import nn

from baft_easyedit.files.messages import short
from baft_easyedit.files.reading import taken
from baft_easyedit.hparams import BaFTHyperParams, hparams_from
from baft_easyedit.model.hooks import ModelEdit
from baft_easyedit.model.inspect import input_device, text_config
from baft_easyedit.storage.fingerprint import Fingerprint

logger = logging.getLogger(__name__)

FORMAT_VERSION = 4

SHAPE = ("layers", "rank", "gate", "num_prompt_positions", "min_similarity")
"""Hyper-parameters that an edit is made with; its later edits must have the same."""
_OF_EASYEDIT = {
    *("model_name", "device", "batch_size", "max_length", "model_parallel", "fp16", "bf16"),
    *("evaluation_type", "api_key"),
}
"""Hyper-parameters that only EasyEdit needs; they do not affect the method and are not kept."""

_GONE = ("loc_own_texts", "rehearsal", "past_states", "basis_lr")
"""Hyper-parameters of earlier development versions, which did nothing if false or 0."""
_GONE_WITH = (
    *("rehearsal_irrelevant", "rehearsal_memory", "rehearsal_stop_loss", "settle_steps"),
    "parametrisation",
)
"""Hyper-parameters of these, and one that decided only how an edit was learned."""


@dataclass(frozen=True)
class KeptConfig:
    """The content of `baft_config.json`; nothing in it is ever opened as a path."""

    base_model: str
    """The model's name on the Hub; of a local model, the name of its directory."""
    revision: str | None
    """The commit of the model on the Hub, if it came from there."""
    fingerprint: Fingerprint
    hparams: dict[str, Any]
    """Hyper-parameters of the method and its training; see `method_of`."""
    versions: dict[str, Any]

    @classmethod
    def of(cls, model: nn.Module, hparams: BaFTHyperParams) -> "KeptConfig":
        """Describe an edit of a model."""
        config: Any = getattr(model, "config", None)
        return cls(
            base_model=model_name(model),
            revision=getattr(config, "_commit_hash", None),
            fingerprint=Fingerprint.of(model),
            hparams=method_of(hparams),
            versions=versions(),
        )

    @classmethod
    def from_json(cls, content: Mapping[str, Any], where: str) -> "KeptConfig":
        """Read the result of `to_json`.

        Raises:
            ValueError: If the format version is another one, or a value is missing or wrong.
        """
        found = taken(content, "format_version", int, where)
        if found != FORMAT_VERSION:
            raise ValueError(
                f"{where} must have format_version {FORMAT_VERSION}; got {short(found)}: use a "
                "version of baft_easyedit that knows it"
            )
        return cls(
            base_model=taken(content, "base_model", str, where),
            revision=taken(content, "revision", (str, type(None)), where),
            fingerprint=Fingerprint.from_json(
                taken(content, "fingerprint", dict, where), f"the fingerprint in {where}"
            ),
            hparams=taken(content, "hparams", dict, where),
            versions=taken(content, "versions", dict, where),
        )

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object."""
        return {"format_version": FORMAT_VERSION, **asdict(self)}

    def check_model(self, model: nn.Module, where: str) -> None:
        """Raise ValueError unless this is the model that the edit was learned on."""
        difference = self.fingerprint.difference(Fingerprint.of(model))
        if difference is not None:
            revision = f" at revision {self.revision}" if self.revision else ""
            raise ValueError(
                f"the model must be the one that {where} was learned on "
                f"({self.base_model}{revision}); {difference}: load that model, or pass "
                "allow_other_model=True to load() or attach() (--allow-other-model of ask, eval "
                "and serve) to use the edit on this one"
            )


def model_name(model: nn.Module) -> str:
    """Return a model's name on the Hub; of a local one, the name of its directory."""
    name = str(getattr(text_config(model), "_name_or_path", "") or "")
    name = name or str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")
    if os.path.isabs(name) or os.path.isdir(name):
        name = os.path.basename(os.path.normpath(name))
    return name or type(model).__name__


def method_of(hparams: BaFTHyperParams) -> dict[str, Any]:
    """Return the hyper-parameters to keep: those of the method and its training; no `api_key`."""
    return {f.name: getattr(hparams, f.name) for f in fields(hparams) if f.name not in _OF_EASYEDIT}


def hparams_of(method: Mapping[str, Any], model: nn.Module | None, where: str) -> BaFTHyperParams:
    """Rebuild hyper-parameters from the result of `method_of`, for a loaded model if there is one.

    A kept edit acts as before without the hyper-parameters that are gone; a warning names those
    that its next edits will be learned without.

    Raises:
        ValueError: If a hyper-parameter is unknown, missing, or wrong.
    """
    forbidden = sorted(_OF_EASYEDIT & set(method))
    if forbidden:
        raise ValueError(f"the hyper-parameters in {where} must not have {forbidden[0]!r}")
    for name in _GONE:
        if method.get(name):
            told = f"{name}: {short(method[name])}"
            logger.warning("%s: %s is gone; later edits are learned without", where, told)
    method = {k: value for k, value in method.items() if k not in (*_GONE, *_GONE_WITH)}
    own = {"model_name": "unknown", "device": "cpu"}
    if model is not None:
        own = {"model_name": model_name(model), "device": str(input_device(model))}
    try:
        return hparams_from({**method, **own})
    except (TypeError, ValueError) as error:
        raise ValueError(f"the hyper-parameters in {where} cannot be used: {error}") from None


def new_edit(hparams: BaFTHyperParams, hidden_size: int) -> ModelEdit:
    """Make an untrained edit of models of a hidden size, as the hyper-parameters describe it.

    Raises:
        ValueError: If the rank exceeds the hidden size.
    """
    shape: dict[str, Any] = {name: getattr(hparams, name) for name in SHAPE}
    return ModelEdit(hidden_size, seed=hparams.seed, **shape)


def versions() -> dict[str, Any]:
    """Return the versions of Python and of the packages that results may depend on."""
    packages = ("baft_easyedit", "torch", "transformers")
    return {"python": platform.python_version()} | {
        name: str(getattr(sys.modules.get(name), "__version__", "unknown")) for name in packages
    }


def environment(model: nn.Module) -> dict[str, Any]:
    """Return the settings of the machine on which a bit-equal replay of edits depends."""
    device = input_device(model)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {
        **versions(),
        "format_version": FORMAT_VERSION,
        "device": name,
        "threads": torch.get_num_threads(),
        "attention": text_config(model)._attn_implementation,
    }


def environment_change(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Say what differs between two results of `environment`; if nothing, what else may."""
    changed = [f"{k} {then.get(k)} then, {now[k]} now" for k in now if then.get(k) != now[k]]
    return "; ".join(changed) or (
        "versions and device are the same: this package's code within its version, the processor "
        "or a library's build may be another"
    )
