"""Hyper-parameters of BaFT and ReFT and their strict YAML loader.

The method reads most fields. EasyEdit's `BaseEditor` reads `model_name`, `device`, `fp16`,
`batch_size` and a few more, as it does of every method's hyper-parameters. Needs pyyaml only.
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from baft_easyedit.files.fields import check_types, is_json
from baft_easyedit.files.messages import short
from baft_easyedit.files.reading import did_you_mean, read_yaml
from baft_easyedit.files.resources import hparams_file, hparams_root, model_location, own_preset
from baft_easyedit.method.gates import GATES
from baft_easyedit.method.objective import RESCALINGS

logger = logging.getLogger(__name__)

_PAPER_DEPTH = 32
_PAPER_LAYERS = (9, 18, 24, 28)
_LATE_LAYERS = (25, 26, 27, 28)
"""Where the last token tells questions of one form apart, so that `min_similarity` can, too."""
_AUTO = "auto"

ENGINES = ("auto", "cached", "full")
"""How the model is run in each training step: `cached` computes only what the edit can change (see
`training.prefix_cache`), `full` the whole forward; `auto` is `cached` where the model allows it."""

_CHOICES: Mapping[str, Iterable[str]] = {
    "gate": GATES,
    "rescaling": RESCALINGS,
    "loc_positions": ("all", "last"),
    "engine": ENGINES,
    "evaluation_type": ("LLM-judge", "generate-text"),
}
_RULES: Mapping[tuple[str, Callable[[Any], bool]], Sequence[str]] = {
    ("be at least 1", lambda value: value >= 1): (
        "rank", "num_prompt_positions", "num_steps", "batch_size", "max_length",
    ),
    ("be at least 0", lambda value: value >= 0): (
        "loc_stand_ins", "weight_decay",
        "early_stop_loss", "balance_coef", "locality_coef",
    ),
    ("be above 0", lambda value: value > 0): ("lr", "gate_lr"),
    ("be in [-1, 1), or null", lambda value: -1 <= value < 1): ("min_similarity",),
    ("be in [0, 1]", lambda value: 0 <= value <= 1): ("alpha", "beta", "gamma"),
}  # fmt: skip
"""The numeric fields by the rule that their values must follow."""

_OPEN_IN_TEMPLATE = (
    "with use_chat_template, an edit with these settings changes most other answers in the "
    "template, too: the states at its last tokens are alike, and the gates stay open there"
)
_CLOSE = "Set min_similarity, as BaFT/smollm2 has it"

HParams = TypeVar("HParams", bound="BaFTHyperParams")


@dataclass
class BaFTHyperParams:
    """Hyper-parameters of BaFT; the values of the paper's Table 5 unless a field says otherwise."""

    algorithm: ClassVar[str] = "BaFT"

    model_name: str
    """Hugging Face name or directory of the model that EasyEdit loads; `bundled` for our own."""
    layers: list[int] | str
    """Decoder layers whose output is edited, 0-based, each below the model's depth; `auto` for the
    paper's, scaled to that depth, or with `min_similarity` for later ones (see `at_depth`)."""
    alg_name: str = ""
    """Name of the method in EasyEdit; set by the class."""
    device: int | str = 0
    """CUDA device number, or a device name such as `cpu`."""
    rank: int = 12
    """Bases per edited layer, in [1, hidden size]; with `min_similarity`, those of each edit call.
    Higher: more capacity, more parameters."""
    num_prompt_positions: int = 3
    """P, how many of the last prompt tokens are edited (all answer tokens are), at least 1."""
    gate: str = "rms-sigmoid"
    """The function from a hidden state to basis weights, a name of `gates.GATES`."""
    num_steps: int = 40
    """Most optimiser steps of one edit call, at least 1."""
    lr: float = 1.0e-3
    """AdamW's learning rate, above 0."""
    gate_lr: float | None = None
    """Learning rate of the gate, above 0; null for `lr` (the paper has one rate). A higher rate
    tells irrelevant prompts apart in fewer steps, but earlier edits fade sooner."""
    min_similarity: float | None = None
    """Each edit call has bases of its own, which act only at hidden states whose similarity to one
    of its own is at least this, in [-1, 1), and no less than to those of other edits (ours); see
    `method.past_edits`. Elsewhere the model is bit-equal to that without the edit, and later edits
    change nothing of earlier ones. Higher: more of the other answers stay, and fewer rephrasings
    are edited. null for one edit that all calls train, and that acts everywhere (the paper)."""
    use_subject: bool = True
    """With `min_similarity`, tell prompts of one form apart by the request's `subject`, if it has
    one; false for a model that hardly knows the names of `training.stand_ins`."""
    weight_decay: float = 0.0
    """AdamW's weight decay, at least 0 (ours: the paper gives none)."""
    early_stop_loss: float = 0.01
    """Stop once the answer loss is below this, in nats per token; 0 never stops early."""
    learn_end: bool = False
    """Learn the tokenizer's eos token after the target, so that generated answers stop there. Not
    in the paper, whose scores are teacher forced."""
    balance: bool = True
    """Use the load-balance term R_bal."""
    locality: bool = True
    """Use the locality term R_loc. Its irrelevant prompts are a request's `loc_prompt`, or come
    from `loc_stand_ins`."""
    loc_stand_ins: int = 0
    """Irrelevant prompts to make for a request with a `subject`, but no `loc_prompt`, by invented
    names in the subject's place (ours): see `training.stand_ins`. 0 for none (the paper)."""
    balance_coef: float = 1.0
    """Factor of R_bal after rescaling, at least 0."""
    locality_coef: float = 1.0
    """Factor of R_loc after rescaling, at least 0."""
    alpha: float = 0.01
    """R_loc: weight up to which an irrelevant position is not penalised, in [0, 1]."""
    beta: float = 0.05
    """R_loc: weight from which an edited position is not penalised, in [0, 1]."""
    gamma: float = 0.02
    """R_loc: wanted gap between the largest weight of the edited positions and the largest of the
    irrelevant ones, in [0, 1]."""
    rescaling: str = "match"
    """How the terms are brought to one magnitude, a name of `objective.RESCALINGS` (ours)."""
    loc_positions: str = "all"
    """Which tokens of an irrelevant prompt R_loc sees: `all`, or the `last` P (ours), as always
    of its copy in a chat template."""
    engine: str = "auto"
    """How the model is run in each step, a name of `ENGINES`; the results are the same up to
    rounding. If a model cannot use a cached prefix, `auto` runs the full forward, with a warning in
    the log and the reason in the report; `cached` raises an error."""
    seed: int = 0
    """Seed of the random initial bases."""
    batch_size: int = 1
    """Requests per call of EasyEdit's `batch_edit`; 1 for its `edit`."""
    max_length: int = 40
    """Tokens at which EasyEdit's scoring pads or cuts; longer texts raise it, so none is cut."""
    model_parallel: bool = False
    """Spread the model's layers over all CUDA devices."""
    fp16: bool = False
    """Load the model in half precision; the edit itself stays fp32."""
    bf16: bool = False
    """The same in bfloat16, without `fp16`: EasyEdit loads fp32, and the weights are cast then."""
    use_chat_template: bool = False
    """Put prompts into the tokenizer's chat template, for editing and scoring alike. Other
    prompts in it stay as they are only with `min_similarity`."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Further arguments of the chat template, such as `enable_thinking: false` for Qwen3; null for
    none."""
    separator: str | None = None
    """Text between prompt and target, for editing and scoring alike. Null stands for a space, as in
    EasyEdit; for nothing after a chat template, and after a prompt whose last letter is of a script
    written without spaces, such as Chinese (ours)."""
    evaluation_type: str | None = None
    """EasyEdit's scoring: null for teacher forcing, `LLM-judge` or `generate-text`."""
    api_key: str | None = field(default=None, repr=False)
    """Key for EasyEdit's `LLM-judge`."""

    def __post_init__(self) -> None:
        self.alg_name = self.alg_name or self.algorithm
        check_types(self)
        self.model_name = model_location(self.model_name)
        self._check(self.alg_name == self.algorithm, "alg_name", f"be {self.algorithm!r}")
        self._check(bool(self.model_name), "model_name", "not be empty")
        self._check_layers()
        for name, allowed in _CHOICES.items():
            value = getattr(self, name)
            self._check(value is None or value in allowed, name, f"be one of {', '.join(allowed)}")
        for (rule, holds), names in _RULES.items():
            for name in names:
                value = getattr(self, name)
                self._check(value is None or holds(value), name, rule)
        self._check(not (self.fp16 and self.bf16), "bf16", "be false with fp16: choose one of them")
        self._check_chat_template()

    @property
    def dtype(self) -> str:
        """Name of the dtype that the model is loaded in."""
        return "float16" if self.fp16 else "bfloat16" if self.bf16 else "float32"

    def at_depth(self: HParams, depth: int) -> HParams:
        """Return these hyper-parameters with the layers of a model of `depth` layers for `auto`."""
        if self.layers != _AUTO:
            return self
        layers = _PAPER_LAYERS if self.min_similarity is None else _LATE_LAYERS
        return replace(self, layers=scaled_layers(depth, layers))

    def warn_of_open_gates(self) -> None:
        """Log a warning if other prompts are not kept from the edit where gates alone cannot."""
        if self.min_similarity is None and self.use_chat_template and self.gate != "one":
            logger.warning("%s. %s", _OPEN_IN_TEMPLATE, _CLOSE)

    def _check_layers(self) -> None:
        """Check the layers, as far as can be told without a model."""
        layers, name = self.layers, "layers"
        if isinstance(layers, str):
            self._check(layers == _AUTO, name, f"be {_AUTO}, or a list of layers")
            return
        self._check(bool(layers), name, f"name at least one layer, or be {_AUTO}")
        self._check(min(layers) >= 0, name, "not be negative (they are 0-based)")
        self._check(len({*layers}) == len(layers), name, "not repeat a layer")

    def _check_chat_template(self) -> None:
        """Check the further arguments of the chat template."""
        name, given = "chat_template_kwargs", self.chat_template_kwargs
        if given is None:
            return
        self._check(self.use_chat_template, name, "be null without use_chat_template")
        taken = ("conversation", "tokenize", "add_generation_prompt", "continue_final_message")
        self._check(not {*taken} & {*given}, name, f"not set {', '.join(taken)}")
        self._check(is_json(given), name, "hold JSON values by name, to be kept with an edit")

    def _check(self, holds: bool, name: str, rule: str) -> None:
        """Raise ValueError about a hyper-parameter unless its rule holds."""
        if not holds:
            raise ValueError(f"{name} must {rule}; got {short(getattr(self, name))}")

    @classmethod
    def from_hparams(cls: type[HParams], path: str | Path, **overrides: Any) -> HParams:
        """Read a YAML file.

        Args:
            path: A file, with or without `.yaml`; or the name of one that comes with the package,
                such as `BaFT/llama-2-7b`.
            overrides: Values that replace those of the file, by field. Another model in place of
                `bundled` or `smollm2` gets the layers of its own depth, unless `layers` is given.

        Returns:
            The checked hyper-parameters.

        Raises:
            FileNotFoundError: If there is no such file.
            TypeError: If a value has the wrong type.
            ValueError: If a key is unknown or missing, or a value is out of range.
        """
        return _read(path, overrides, cls.from_dict)

    @classmethod
    def from_dict(cls: type[HParams], config: Mapping[str, Any]) -> HParams:
        """Build from a mapping with exactly this class's fields as keys.

        Raises:
            TypeError: If a value has the wrong type.
            ValueError: If a key is unknown or missing, or a value is out of range.
        """
        allowed = [f.name for f in fields(cls)]
        unknown = [key for key in config if key not in allowed]
        if unknown:
            raise ValueError(
                f"unknown hyper-parameter {short(unknown[0])} of {cls.algorithm}"
                f"{did_you_mean(unknown[0], allowed)}; allowed: {', '.join(allowed)}"
            )
        missing = [key for key in ("model_name", "layers") if key not in config]
        if missing:
            raise ValueError(f"hyper-parameter {missing[0]!r} of {cls.algorithm} is missing")
        return cls(**config)


@dataclass
class ReFTHyperParams(BaFTHyperParams):
    """Hyper-parameters of ReFT: BaFT with every weight 1 (Lemma 2.4), minimising L1 alone."""

    algorithm: ClassVar[str] = "ReFT"

    gate: str = "one"
    balance: bool = False
    locality: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(self.gate == "one", "gate", "be 'one' for ReFT")
        self._check(not self.balance, "balance", "be false for ReFT")
        self._check(not self.locality, "locality", "be false for ReFT")


OUR_METHODS: Mapping[str, type[BaFTHyperParams]] = {
    cls.algorithm: cls for cls in (BaFTHyperParams, ReFTHyperParams)
}
"""The hyper-parameters' classes of this package's methods, by EasyEdit's `alg_name`."""


def check_hparams(value: object) -> None:
    """Raise TypeError unless a value is hyper-parameters."""
    if not isinstance(value, BaFTHyperParams):
        raise TypeError(
            f"hparams must be BaFTHyperParams or ReFTHyperParams; got {short(value)}: "
            "BaFTHyperParams.from_hparams reads a file"
        )


def read_hparams(path: str | Path, **overrides: Any) -> BaFTHyperParams:
    """Read a YAML file of either method; its `alg_name` says which.

    Args:
        path: As for `from_hparams`.
        overrides: Values that replace those of the file, by field.

    Raises:
        FileNotFoundError: If there is no such file.
        TypeError: If a value has the wrong type.
        ValueError: If `alg_name` is neither BaFT nor ReFT, or a value breaks a rule.
    """
    return _read(path, overrides, hparams_from)


def hparams_from(config: Mapping[str, Any]) -> BaFTHyperParams:
    """Build the hyper-parameters of the method in `alg_name`; BaFT if absent; see `from_dict`."""
    name = config.get("alg_name", "BaFT")
    if not isinstance(name, str) or name not in OUR_METHODS:
        raise ValueError(f"alg_name must be one of {', '.join(OUR_METHODS)}; got {short(name)}")
    return OUR_METHODS[name].from_dict(config)


def scaled_layers(depth: int, layers: Sequence[int] = _PAPER_LAYERS) -> list[int]:
    """Scale layers of 32, the paper's 9;18;24;28 if none are given, to `depth` layers (ours).

    Raises:
        ValueError: If the model has no layer.
    """
    if depth < 1:
        raise ValueError(f"depth must be at least 1; got {depth}")
    return sorted({layer * depth // _PAPER_DEPTH for layer in layers})


def _read(
    path: str | Path,
    overrides: Mapping[str, Any],
    build: Callable[[Mapping[str, Any]], HParams],
) -> HParams:
    """Read a YAML file, and build hyper-parameters; errors name the file."""
    file = hparams_file(path)
    settings = read_yaml(file, "hyper-parameters")
    is_ours = file.resolve().is_relative_to(hparams_root().resolve())
    if is_ours and _is_another_model(settings, overrides):
        settings["layers"] = _AUTO
    try:
        return build({**settings, **overrides})
    except (TypeError, ValueError) as error:
        raise type(error)(f"{error} (in {file})") from None


def _is_another_model(settings: Mapping[str, Any], overrides: Mapping[str, Any]) -> bool:
    """Tell whether overrides name another model than a file that is for one of the package's own.

    The files for models of other names hold for local copies of these, too.
    """
    own, other = settings.get("model_name"), overrides.get("model_name")
    if not isinstance(own, str) or not isinstance(other, str) or own_preset(own) is None:
        return False
    return model_location(own) != model_location(other)
