"""The configuration of a benchmark run: its YAML, strictly checked.

    model: bundled
    data: {kind: facts, limit: 100}
    methods: [BaFT, ReFT, FT-M, {name: +ss-w, method: BaFT, set: {gate: subspace}}]
    T: [1, 10, 100]

T edit calls of `batch_size` requests each are made on an unedited model, then scored and undone.
With T 1 and batch_size 1 these are single edits; with batch_size 1 and a larger T, continual
editing; with a larger batch_size, batched editing.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from baft_easyedit.bench.protocol import Protocol
from baft_easyedit.files.messages import short
from baft_easyedit.files.reading import read_yaml
from baft_easyedit.files.resources import BUNDLED_MODEL, hparams_file, hparams_root, merged_settings
from baft_easyedit.files.validation import validated


class _Strict(BaseModel):
    """Frozen, without unknown keys; true is no number, and a text neither."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


_Text = Annotated[str, Field(min_length=1)]


class MethodConfig(_Strict):
    """One row of the table."""

    name: _Text  # name of the row
    method: str = ""  # BaFT, ReFT or one of EasyEdit's methods; the name if absent
    hparams: _Text | None = None  # a file or name of our YAML; BaFT and ReFT only
    set: dict[str, Any] = {}  # values that replace those of the hyper-parameters

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        given = {"name": value} if isinstance(value, str) else value
        if not isinstance(given, Mapping) or not isinstance(given.get("name"), str):
            return given
        return {"method": given["name"], **given}


class DataConfig(_Strict):
    """Which records are edited."""

    kind: str  # a name of `data.DATASETS`; `requests` for a JSON list of EasyEdit's request dicts
    path: _Text | None = None  # file or directory; not needed for `facts`
    start: int = Field(default=0, ge=0)  # first record
    limit: int | None = Field(default=None, ge=1)  # number of records; all if null
    options: dict[str, Any] = {}  # further arguments of the kind's reader


class DownstreamConfig(_Strict):
    """A task on which the edited model is tried after each run (Liu et al. 2025, Table 8)."""

    task: str = "piqa"  # a task of lm-evaluation-harness that has the metric `acc`
    include_path: _Text | None = None  # a directory of further task files
    limit: int | None = Field(default=None, ge=1)  # number of questions; all if null


class JudgeConfig(_Strict):
    """A language model that grades answers, at any address of OpenAI's form."""

    address: str = Field(pattern="^https?://.")  # where it is, such as `http://localhost:8000/v1`
    model: _Text  # its name there
    key_variable: _Text = "BENCH_JUDGE_KEY"  # holds the key, which is in no file
    timeout_s: float = Field(default=60, gt=0)  # most seconds that an answer may take


_Counts = Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1, strict=False)]


class BenchConfig(_Strict):
    """A benchmark: every method under every protocol on the same records and model."""

    model: str = BUNDLED_MODEL
    """Hugging Face name or directory; `bundled` for our own."""
    data: DataConfig
    methods: tuple[MethodConfig, ...] = Field(min_length=1, strict=False)
    T: _Counts = (1,)
    """Edit calls in a row; after them all edited records are scored and the model is restored."""
    batch_size: _Counts = (1,)
    """Requests per edit call."""
    preset: _Text | None = None
    """Our hyper-parameters, `<method>/<preset>.yaml`, or with `-continual` or `-batch` after the
    preset where there is one for the protocol; made for the model's depth if null."""
    peer_preset: _Text | None = None
    """Hyper-parameters of EasyEdit's methods: ours for a model, such as `smollm2`, or those that
    EasyEdit ships, such as `llama-7b`; the bundled model's, scaled, if null."""
    texts: _Text | None = None
    """Text file, a passage a line, for the key statistics of MEMIT and its kin; if null, the texts
    of the bundled facts."""
    use_chat_template: bool = False
    """Put prompts into the model's chat template, to edit and to score.

    Answers are generated in it, also for locality, which EasyEdit's evaluators ask in plain texts.
    """
    learn_end: bool = False
    """Let edits learn where an answer ends, so that generation stops there: BaFT and ReFT by their
    `learn_end`, EasyEdit's methods by an end-of-sequence token behind their targets (a note names
    those that cannot). If false, BaFT and ReFT do as their hyper-parameters say."""
    generation: bool = True
    """Score by generation too: greedy, natural stop, exact match; CounterFact's fluency."""
    immediate: bool = True
    """Score each continual edit right after it too."""
    probes: bool = False
    """Ask probes of our own too, by generation; see `bench.questions`."""
    wild: bool = False
    """Ask and score as WILD does too; see `bench.free_text`."""
    judge: JudgeConfig | None = None
    """Who grades the answers to WILD's questions, after the run; may be given later."""
    similarity_model: _Text | None = None
    """Directory of a model of sentence-transformers that compares long answers with their targets,
    after the run; may be given later."""
    snippets: _Text | None = None
    """ROME's attribute_snippets.json, for the consistency of CounterFact's texts with texts about
    other subjects that have the new answer; may be given later."""
    basis: bool = True
    """Record basis weights of BaFT and ReFT for the figures and `diagnose`."""
    downstream: DownstreamConfig | None = None
    scoring_batch_size: int = Field(default=32, ge=1)
    """Prompts in a batch of generation; 1 for methods whose edited model does not compute each text
    of a batch by itself. Scores are the same up to rounding."""
    device: int | str = "cpu"
    """EasyEdit's device; with several processes each takes the CUDA device of its rank."""
    fp16: bool = False
    """Load the model in half precision."""
    bf16: bool = False
    """The same in bfloat16; not with `fp16`."""
    model_parallel: bool = False
    """Spread the model over all CUDA devices."""
    verify: bool = True
    """Check each restore bit for bit; takes the memory of a second model."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    threads: int = Field(default=1, ge=1)
    """Torch's number of CPU threads in each method's process."""
    jobs: int = Field(default=1, ge=1)
    """Methods run at once by each process."""

    @model_validator(mode="after")
    def _check_together(self) -> "BenchConfig":
        if not self.model:
            raise ValueError("model must be given, in the file or as --model; got ''")
        for name in ("probes", "similarity_model", "snippets"):
            if getattr(self, name) and not self.generation:
                raise ValueError(f"{name} must come with generation: true; got generation: false")
        if self.judge is not None and not self.wild:
            raise ValueError("judge must come with wild: true, whose answers it grades")
        if self.fp16 and self.bf16:
            raise ValueError("bf16 must be false with fp16, such as by --no-fp16; got both")
        return self

    @field_validator("methods", "T", "batch_size")
    @classmethod
    def _check_repeats(cls, entries: tuple[Any, ...]) -> tuple[Any, ...]:
        names = [getattr(entry, "name", entry) for entry in entries]
        if len(set(names)) < len(names):
            raise ValueError(f"must not repeat an entry; got {short(names)}")
        return entries

    @property
    def protocols(self) -> list[Protocol]:
        """The protocols that each method is run under."""
        return [Protocol(T, size) for size in self.batch_size for T in self.T]


def read_config(path: str | Path, overrides: Mapping[str, Any] | None = None) -> BenchConfig:
    """Read a benchmark's YAML. Its paths are looked up beside it, then in the working directory.

    Args:
        path: What `hparams_file` finds, such as `bench/facts`, which comes with the package.
        overrides: Values that replace those of the file. Mappings are merged; in `methods`, the
            name of a row of the file stands for that row. If another model is given, the file's
            presets are dropped.

    Raises:
        FileNotFoundError: If there is no such file.
        TypeError: If it does not hold a mapping.
        ValueError: If a key is unknown or missing, or a value breaks a rule.
    """
    file = hparams_file(path)
    content = read_yaml(file, "benchmark settings")
    named = content.get("model")
    for owner, key in _paths(content):
        beside = file.parent / os.path.expanduser(owner[key])
        is_there = beside.exists()
        if key == "hparams":
            is_there = beside.is_file() or Path(f"{beside}.yaml").is_file()
        if is_there:
            owner[key] = str(beside)
    merged = merged_settings(content, overrides or {})
    if merged.get("model") not in (named, content.get("model")):  # presets are for the file's model
        merged |= {"preset": None, "peer_preset": None}
        merged |= {k: v for k, v in (overrides or {}).items() if k in ("preset", "peer_preset")}
    if "methods" in merged:
        merged["methods"] = _rows(merged["methods"], content.get("methods"))
    try:
        return make_config(merged)
    except ValueError as error:
        raise ValueError(f"{error} (in {file})") from None


def make_config(content: Mapping[str, Any]) -> BenchConfig:
    """Check a benchmark's settings; raise ValueError for the first that is wrong."""
    known = [name for model in _Strict.__subclasses__() for name in model.model_fields]
    return validated(BenchConfig, content, "bad benchmark setting", known)


def with_absolute_paths(config: BenchConfig) -> BenchConfig:
    """Make the paths of a configuration independent of the working directory."""
    content = config.model_dump()
    for owner, key in _paths(content):
        if key == "hparams":
            file = hparams_file(owner[key]).absolute()
            is_own = file.is_relative_to(hparams_root())  # its name means it in each checkout
            name = file.relative_to(hparams_root()).with_suffix("") if is_own else file
            owner[key] = name.as_posix()
        elif Path(owner[key]).exists():
            owner[key] = str(Path(owner[key]).absolute())
    return make_config(content)


def _paths(content: Mapping[str, Any]) -> list[tuple[Any, str]]:
    """Return each setting that is, or may be, a path: the mapping that holds it, and its key."""
    rows = content.get("methods")
    named: list[tuple[Any, str]] = [
        *((content, key) for key in ("model", "texts", "similarity_model", "snippets")),
        (content.get("data"), "path"),
        (content.get("downstream"), "include_path"),
        *((row, "hparams") for row in (rows if isinstance(rows, list | tuple) else ())),
    ]
    there = [(owner, key) for owner, key in named if isinstance(owner, Mapping)]
    return [(owner, key) for owner, key in there if owner.get(key) and isinstance(owner[key], str)]


def _rows(wanted: Any, described: Any) -> Any:
    """Replace each name of a row by the file's description of that row."""
    if not isinstance(wanted, list) or not isinstance(described, list):
        return wanted
    mappings = [row for row in described if isinstance(row, Mapping)]
    rows = {row["name"]: row for row in mappings if isinstance(row.get("name"), str)}
    return [rows.get(name, name) if isinstance(name, str) else name for name in wanted]
