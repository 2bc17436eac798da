"""What a speed run measures: its options, and the rows that they mean."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from baft_easyedit.bench.data import DATASETS
from baft_easyedit.easyedit.base_editor import OUR_METHODS
from baft_easyedit.easyedit.peers import why_not
from baft_easyedit.files.messages import short
from baft_easyedit.hparams import ENGINES
from baft_easyedit.speed.shapes import find_shape

DTYPES = ("float32", "bfloat16", "float16")
DEFAULT_SHAPE = "llama-12x512"
MIN_PROMPT_LENGTH = 4
"""A token that begins the text, and words around a subject."""
MAX_UNASKED_PARAMETERS = 1_000_000_000
"""Larger random models are written to a disk only where the user says."""

MEASURED_ENGINES = tuple(name for name in ENGINES if name != "auto")
"""What an edit can be run by, the default first."""

_DATA_RULE = f"have the form KIND=PATH, with a kind of {', '.join(DATASETS)}"
_ENGINE_RULE = f"have an engine of {', '.join(MEASURED_ENGINES)}"
_SWEPT_METHODS = ("BaFT", "ReFT")
_SWEPT = {
    "prompt-length": "prompt_length",
    "rank": "rank",
    "layers": "num_layers",
    "batch": "batch_size",
}


@dataclass(frozen=True)
class Row:
    """One method under one setting."""

    name: str
    """What the row is called, such as `BaFT-replay`; with the swept value in a sweep."""
    method: str
    """BaFT, ReFT or one of EasyEdit's methods."""
    engine: str | None
    """How BaFT or ReFT runs the model, a name of `MEASURED_ENGINES`; None for other methods."""
    prompt_length: int
    """Tokens of each prompt, with the one that begins a text."""
    answer_length: int
    """Tokens of each answer."""
    batch_size: int
    """Requests of an edit call."""
    rank: int
    """Bases per edited layer of BaFT and ReFT."""
    num_layers: int | None = None
    """Edited layers of BaFT and ReFT; the paper's four, scaled to the model's depth, if None."""
    sweep: str | None = None
    """The sweep that the row belongs to."""

    @property
    def is_ours(self) -> bool:
        """Whether this is BaFT or ReFT."""
        return self.method in OUR_METHODS

    @property
    def is_reference(self) -> bool:
        """Whether other rows of the same setting are compared with this one."""
        return (self.method, self.engine) == ("BaFT", MEASURED_ENGINES[0])

    @property
    def setting(self) -> tuple[Any, ...]:
        """Everything but the method."""
        named = {"name", "method", "engine"}
        return tuple(getattr(self, f.name) for f in fields(self) if f.name not in named)


@dataclass(frozen=True)
class Sweep:
    """Values of one setting, each measured for BaFT with every engine and for ReFT.

    Attributes:
        what: `prompt-length`, `rank`, `layers` (how many are edited) or `batch` (requests a call).
        values: Whole numbers, each at least 1.

    Raises:
        ValueError: If the setting is unknown, or a value is missing, repeated or below 1.
    """

    what: str
    values: tuple[int, ...]

    def __post_init__(self) -> None:
        allowed = f"be one of {', '.join(_SWEPT)}"
        _check(self.what in _SWEPT, "sweep", allowed, self.what)
        rule = "have values, each of them once"
        _check(bool(self.values) and len(set(self.values)) == len(self.values), "sweep", rule, self)
        _check(min(self.values) >= 1, "sweep", "have values of at least 1", self.values)

    @classmethod
    def parse(cls, text: str) -> "Sweep":
        """Read `prompt-length=16,32,64`.

        Raises:
            ValueError: If the text has another form, or breaks a rule above.
        """
        what, _, values = text.partition("=")
        numbers = [value.strip() for value in values.split(",")]
        form = "have the form prompt-length=16,32,64"
        _check(all(number.isdigit() for number in numbers), "sweep", form, text)
        return cls(what.strip(), tuple(map(int, numbers)))


@dataclass(frozen=True)
class SpeedOptions:
    """Options of a speed run.

    Raises:
        ValueError: If an option breaks a rule, or a method or shape is unknown.
    """

    model: str | None = None
    """Hugging Face name or directory, or `bundled`; random weights of `shape` if None."""
    shape: str | None = None
    """A name that `shapes.find_shape` knows; `DEFAULT_SHAPE` if there is no model either."""
    methods: tuple[str, ...] = ("BaFT", "ReFT")
    """BaFT (with every engine), BaFT-full or BaFT-replay, likewise ReFT (with the default engine
    if it names none), or methods of EasyEdit."""
    data: str | None = None
    """Benchmark records to edit, KIND=PATH such as zsre=DIR; texts of random words if None."""
    start: int = 0
    """First of these records; each repeat takes the next ones."""
    prompt_length: int = 32
    """Tokens of each prompt of random words."""
    answer_length: int = 4
    """Tokens of each answer of random words."""
    batch_size: int = 1
    """Requests of an edit call."""
    rank: int = 12
    """Bases per edited layer of BaFT and ReFT."""
    steps: int = 40
    """Optimiser steps of an edit call of BaFT and ReFT; EasyEdit's methods keep their own."""
    early_stop: bool = False
    """Let BaFT and ReFT stop as soon as the answer is learned; EasyEdit's methods always may."""
    repeats: int = 5
    """Times each row is measured, after one time that does not count."""
    dtype: str = "float32"
    """Of the model's weights, one of `DTYPES`. EasyEdit gets float16 for bfloat16."""
    device: int | str = "cpu"
    """CUDA device number, or a device name."""
    threads: int | None = None
    """Torch's CPU threads; its own choice if None."""
    new_tokens: int = 32
    """Tokens generated with and without each edit; 0 leaves generation out."""
    weights_dir: Path | None = None
    """Where the random weights that EasyEdit's methods load are written until the run ends."""
    one_by_one: bool = False
    """Measure one process after another, with one model in memory at a time, not interleaved."""
    sweeps: tuple[Sweep, ...] = ()
    """If any, these are measured, and `methods` is not."""
    profile: bool = False
    """Also say where the time of an edit goes, in a text file beside `out` for each row."""
    out: Path | None = None
    """JSON file to write, with charts beside it."""

    def __post_init__(self) -> None:
        self._check_numbers()
        _check(not (self.model and self.shape), "shape", "be absent with a model", self.shape)
        _check(self.dtype in DTYPES, "dtype", f"be one of {', '.join(DTYPES)}", self.dtype)
        suffix = "name a .json file"
        _check(self.out is None or self.out.suffix == ".json", "out", suffix, self.out)
        _check(not self.profile or self.out is not None, "out", "be given with profile", self.out)
        if self.data is not None:
            _check(self.data.partition("=")[0] in DATASETS, "data", _DATA_RULE, self.data)
        named = [sweep.what for sweep in self.sweeps]
        fixed = self.data is not None and "prompt-length" in named
        _check(not fixed, "sweeps", "leave prompt-length out with data", named)
        _check(len(set(named)) == len(named), "sweeps", "not repeat a setting", named)
        for what, value in self._values():
            rule = f"be at least {MIN_PROMPT_LENGTH} tokens"
            _check(what != "prompt-length" or value >= MIN_PROMPT_LENGTH, what, rule, value)
        names = [row.name for row in make_rows(self)]  # raises for unknown methods
        _check(bool(names), "methods", "name at least one method", self.methods)
        _check(len(set(names)) == len(names), "methods", "not name a row twice", self.methods)
        if self.model is None:
            self._check_weights_dir()

    def _check_numbers(self) -> None:
        """Check the ranges of the numbers."""
        for name in ("answer_length", "batch_size", "rank", "steps", "repeats"):
            value = getattr(self, name)
            _check(value >= 1, name, "be at least 1", value)
        for name in ("new_tokens", "start"):
            _check(getattr(self, name) >= 0, name, "be at least 0", getattr(self, name))
        _check(self.threads is None or self.threads >= 1, "threads", "be at least 1", self.threads)

    def _values(self) -> list[tuple[str, int]]:
        """Return every value of every setting that can be swept."""
        swept = [(sweep.what, value) for sweep in self.sweeps for value in sweep.values]
        return [("prompt-length", self.prompt_length), *swept]

    def _check_weights_dir(self) -> None:
        """Check the shape, and that a place is given for a large file of random weights."""
        shape = find_shape(self.shape_name)
        peers = [row.name for row in make_rows(self) if not row.is_ours]
        if peers and self.weights_dir is None:
            count = shape.num_parameters()
            gigabytes = math.ceil(count * (4 if self.dtype == "float32" else 2) / 1e9)
            if count > MAX_UNASKED_PARAMETERS:
                raise ValueError(
                    f"weights_dir must be given to run {peers[0]} on {shape.name}; got None: "
                    f"EasyEdit loads models from files, of {gigabytes} GB here; name a directory "
                    "for them, or leave EasyEdit's methods out"
                )

    @property
    def shape_name(self) -> str:
        """The shape of the random weights."""
        return self.shape or DEFAULT_SHAPE

    @property
    def texts(self) -> str:
        """What is edited, in words."""
        if self.data is not None:
            return f"{self.data.partition('=')[0]} records from {self.start} on"
        return f"prompt of {self.prompt_length} and answer of {self.answer_length} tokens"

    def as_json(self) -> dict[str, Any]:
        """Return the options as plain data."""
        plain = {f.name: getattr(self, f.name) for f in fields(self)}
        plain["methods"] = list(self.methods)
        plain["sweeps"] = {sweep.what: list(sweep.values) for sweep in self.sweeps}
        for name in ("weights_dir", "out"):
            plain[name] = None if plain[name] is None else str(plain[name])
        plain["shape"] = None if self.model else self.shape_name
        return plain


def make_rows(options: SpeedOptions) -> list[Row]:
    """Return what is measured, in order.

    Raises:
        ValueError: If a method or engine is unknown.
    """
    base = {
        name: getattr(options, name)
        for name in ("prompt_length", "answer_length", "batch_size", "rank")
    }
    if not options.sweeps:
        return _rows_of(options.methods, base)
    return [
        row
        for sweep in options.sweeps
        for value in sweep.values
        for row in _rows_of(_SWEPT_METHODS, {**base, _SWEPT[sweep.what]: value}, sweep.what, value)
    ]


def swept_value(row: Row) -> int:
    """Return the value that a row of a sweep has."""
    return int(getattr(row, _SWEPT[row.sweep or ""]))


def _rows_of(
    methods: Sequence[str],
    settings: Mapping[str, Any],
    sweep: str | None = None,
    value: int | None = None,
) -> list[Row]:
    """Return the rows of some methods under one setting."""
    suffix = "" if sweep is None else f" {sweep}={value}"
    return [
        Row(name=name + suffix, method=method, engine=engine, sweep=sweep, **settings)
        for given in methods
        for name, method, engine in _meanings(given)
    ]


def _meanings(name: str) -> list[tuple[str, str, str | None]]:
    """Return the rows, by name, method and engine, that the name of a method stands for.

    Raises:
        ValueError: If there is no such method or engine.
    """
    method, _, engine = name.partition("-")
    if method not in OUR_METHODS:
        why_not(name, "current")  # raises if there is no such method
        return [(name, name, None)]
    if engine:
        _check(engine in MEASURED_ENGINES, "methods", _ENGINE_RULE, name)
        return [(name, method, engine)]
    if method == "BaFT":
        return [(f"BaFT-{engine}", "BaFT", engine) for engine in MEASURED_ENGINES]
    return [(method, method, MEASURED_ENGINES[0])]


def _check(holds: bool, name: str, rule: str, value: object) -> None:
    """Raise ValueError about one option unless its rule holds."""
    if not holds:
        raise ValueError(f"{name} must {rule}; got {short(value)}")
