"""EasyEdit's other methods that BaFT is compared with, and what each of them can do.

They are those in the configurations of `hparams/bench`; for others, `_NOT_RUN` says why not.

Names are EasyEdit's, but for FT-L and FT-M, its FT with two objectives, for AdaLoRA, its LoRA with
another `lora_type`, and for UltraEdit, which it spells ULTRAEDIT.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from baft_easyedit.easyedit.host import Generation
from baft_easyedit.files.reading import did_you_mean
from baft_easyedit.hparams import OUR_METHODS


@dataclass(frozen=True)
class Peer:
    """One method of EasyEdit."""

    hparams_class: str
    folder: str
    """Its folder in EasyEdit's `hparams`."""
    given: Mapping[str, Any] = field(default_factory=dict)
    """Hyper-parameters that make it this method; they override those of a file."""


METHODS: Mapping[str, Peer] = {
    "FT-L": Peer("FTHyperParams", "FT", {"objective_optimization": "prompt_last"}),
    "FT-M": Peer("FTHyperParams", "FT", {"objective_optimization": "target_new"}),
    "LoRA": Peer("LoRAHyperParams", "LoRA", {"lora_type": "lora"}),
    "AdaLoRA": Peer("LoRAHyperParams", "LoRA", {"lora_type": "adalora"}),
    "ROME": Peer("ROMEHyperParams", "ROME"),
    "MEMIT": Peer("MEMITHyperParams", "MEMIT"),
    "AlphaEdit": Peer("AlphaEditHyperParams", "AlphaEdit"),
    "UltraEdit": Peer("UltraEditHyperParams", "UltraEdit"),
    "WISE": Peer("WISEHyperParams", "WISE"),
    "GRACE": Peer("GraceHyperParams", "GRACE"),
    "MELO": Peer("MELOHyperParams", "MELO"),
}
"""The methods that can be run."""
PEERS = tuple(METHODS)

_ONE_BY_ONE = ("ROME", "WISE", "GRACE", "MELO")
_IN_RELEASE = ("FT-L", "AdaLoRA", "ROME", "MEMIT")
_BATCHABLE_IN_RELEASE = ("FT-L", "MEMIT")
_NOT_RUN = {
    "MEND": "needs a hypernetwork trained for the model, which EasyEdit does not ship",
    "SERAC": "needs a classifier and a second model trained for it, which EasyEdit does not ship",
    "IKE": "puts demonstrations before each prompt and edits no model",
    "QLoRA": "edits a model quantised to 4 bits, which is another model than the others edit",
    "DINM": "is for detoxifying: it reads an unsafe answer and a safety constraint of each request",
    "FT-Api": "edits through a paid service",
    "DeepEdit-Api": "edits through a paid service",
}
"""Others of EasyEdit's, and why they cannot be compared."""


def why_not(name: str, generation: Generation) -> str | None:
    """Return why a method cannot be compared under a generation of EasyEdit; None if it can.

    Raises:
        ValueError: If there is no such method.
    """
    if name in _NOT_RUN:
        return f"{name} {_NOT_RUN[name]}"
    _check_known(name)
    if generation == "current" or name in (*OUR_METHODS, *_IN_RELEASE):
        return None
    if name == "LoRA":
        return "the LoRA of the release 0.0.1.dev0 of EasyEdit is AdaLoRA: ask for that"
    return f"{name} is not in the release 0.0.1.dev0 of EasyEdit"


def batchable(name: str, generation: Generation) -> bool:
    """Tell whether one call of a method edits several requests together.

    The answer is that of EasyEdit's `BatchEditor`.

    Raises:
        ValueError: If there is no such method.
    """
    _check_known(name)
    if generation == "pypi":
        return name in (*OUR_METHODS, *_BATCHABLE_IN_RELEASE)
    return name not in _ONE_BY_ONE


def _check_known(name: str) -> None:
    """Raise unless there is a method of that name."""
    known = (*OUR_METHODS, *PEERS)
    if name not in known:
        raise ValueError(
            f"method must be one of {', '.join(known)}; got {name!r}{did_you_mean(name, known)}"
        )
