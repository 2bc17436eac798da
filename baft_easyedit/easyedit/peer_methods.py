"""Which of EasyEdit's other methods there are to compare with, and what each of them can do.

Names are EasyEdit's, but for FT-L and FT-M, its FT with two objectives, for AdaLoRA, its LoRA with
another `lora_type`, and for UltraEdit, which it spells ULTRAEDIT.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from baft_easyedit.easyedit.base_editor import OUR_METHODS
from baft_easyedit.easyedit.host import Generation
from baft_easyedit.files.reading import did_you_mean


@dataclass(frozen=True)
class Peer:
    """One method of EasyEdit."""

    module: str
    """Where its hyper-parameters' class lies, below `easyeditor.models`."""
    hparams_class: str
    folder: str
    """Its folder in EasyEdit's `hparams`; CORE has none there."""
    given: Mapping[str, Any] = field(default_factory=dict)
    """Hyper-parameters that make it this method, whatever a file says."""
    needs_texts: bool = False
    """Whether it needs statistics of the model's keys on ordinary text."""
    batchable: bool = False
    """Whether one call edits several requests together."""
    in_release: bool = False
    """Whether the release 0.0.1.dev0 has it too."""


METHODS: Mapping[str, Peer] = {
    "FT-L": Peer(
        "ft",
        "FTHyperParams",
        "FT",
        {"objective_optimization": "prompt_last"},
        batchable=True,
        in_release=True,
    ),
    "FT-M": Peer(
        "ft", "FTHyperParams", "FT", {"objective_optimization": "target_new"}, batchable=True
    ),
    "LoRA": Peer("lora", "LoRAHyperParams", "LoRA", {"lora_type": "lora"}, batchable=True),
    "AdaLoRA": Peer(
        "lora",
        "LoRAHyperParams",
        "LoRA",
        {"lora_type": "adalora"},
        batchable=True,
        in_release=True,
    ),
    "DPO": Peer("dpo", "DPOHyperParams", "DPO", batchable=True),
    "ROME": Peer("rome", "ROMEHyperParams", "ROME", in_release=True),
    "R-ROME": Peer("r_rome", "R_ROMEHyperParams", "R-ROME"),
    "MEMIT": Peer(
        "memit", "MEMITHyperParams", "MEMIT", needs_texts=True, batchable=True, in_release=True
    ),
    "MEMIT-FE": Peer(
        "memit_FE", "MEMITFEHyperParams", "MEMIT-FE", needs_texts=True, batchable=True
    ),
    "EMMET": Peer(
        "emmet.emmet_hparams", "EMMETHyperParams", "EMMET", needs_texts=True, batchable=True
    ),
    "PMET": Peer("pmet.pmet_hparams", "PMETHyperParams", "PMET", needs_texts=True, batchable=True),
    "EAMET": Peer("eamet.hparams", "EAMETHyperParams", "EAMET", needs_texts=True, batchable=True),
    "CORE": Peer("core", "COREHyperParams", "CORE", needs_texts=True, batchable=True),
    "AlphaEdit": Peer(
        "alphaedit", "AlphaEditHyperParams", "AlphaEdit", needs_texts=True, batchable=True
    ),
    "SPHERE": Peer(
        "SPHERE.SPHERE_hparams", "SPHEREHyperParams", "SPHERE", needs_texts=True, batchable=True
    ),
    "UltraEdit": Peer("ultraedit", "UltraEditHyperParams", "UltraEdit", batchable=True),
    "WISE": Peer("wise", "WISEHyperParams", "WISE"),
    "GRACE": Peer("grace", "GraceHyperParams", "GRACE"),
    "MELO": Peer("melo.melo_hparams", "MELOHyperParams", "MELO"),
    "DEFER": Peer("defer", "DeferHyperParams", "DEFER"),
    "SimIE": Peer("simie", "SimIEHyperParams", "SimIE"),
    "KN": Peer("kn", "KNHyperParams", "KN", in_release=True),
}
"""The methods that can be run."""
PEERS = tuple(METHODS)
NEED_TEXTS = tuple(name for name, peer in METHODS.items() if peer.needs_texts)
"""Methods that need statistics of the model's keys on ordinary text."""

_NOT_RUN = {
    "MEND": "needs a hypernetwork trained for the model, which EasyEdit does not ship",
    "SERAC": "needs a classifier and a second model trained for it, which EasyEdit does not ship",
    "IKE": "puts demonstrations before each prompt and edits no model",
    "QLoRA": "edits a model quantised to 4 bits, which is another model than the others edit",
    "DINM": "is for detoxifying: it reads an unsafe answer and a safety constraint of each request",
    "FT-Api": "edits through a paid service",
    "DeepEdit-Api": "edits through a paid service",
}
"""The rest of EasyEdit's methods for text, and why they are not run here."""


def why_not(name: str, generation: Generation) -> str | None:
    """Say why a method cannot be compared under a generation of EasyEdit; None if it can.

    Args:
        name: `BaFT`, `ReFT`, one of `PEERS`, or another method of EasyEdit.
        generation: EasyEdit's generation.

    Raises:
        ValueError: If there is no such method.
    """
    if name in OUR_METHODS:
        return None
    if name in _NOT_RUN:
        return f"{name} {_NOT_RUN[name]}"
    peer = _peer(name)
    if generation == "current" or peer.in_release:
        return None
    if name == "LoRA":
        return "the LoRA of the release 0.0.1.dev0 of EasyEdit is AdaLoRA: ask for that"
    return f"{name} is not in the release 0.0.1.dev0 of EasyEdit"


def batchable(name: str, generation: Generation) -> bool:
    """Tell whether one call of a method edits several requests together.

    For the release, what its `BatchEditor` lists. For the current EasyEdit, that and two that were
    tried: EAMET and SPHERE. SimIE takes several requests too, but edits them one after another.

    Args:
        name: `BaFT`, `ReFT` or one of `PEERS`.
        generation: EasyEdit's generation.

    Raises:
        ValueError: If there is no such method.
    """
    if name in OUR_METHODS:
        return True
    if generation == "pypi":
        return _peer(name).in_release and name in ("FT-L", "MEMIT")
    return _peer(name).batchable


def _peer(name: str) -> Peer:
    """Return a method by its name."""
    if name not in METHODS:
        known = (*OUR_METHODS, *PEERS)
        raise ValueError(
            f"method must be one of {', '.join(known)}; got {name!r}{did_you_mean(name, known)}"
        )
    return METHODS[name]
