"""What a speed run measures: its options, and the rows of its table."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from baft_easyedit.bench.data import DATASETS
from baft_easyedit.easyedit.peers import why_not
from baft_easyedit.files.messages import short
from baft_easyedit.hparams import ENGINES, OUR_METHODS
from baft_easyedit.speed.inputs import shape_sizes

MEASURED_ENGINES = tuple(name for name in ENGINES if name != "auto")
"""Ways to run the model in an edit, the default first."""


@dataclass(frozen=True)
class Row:
    """One measured method."""

    name: str  # such as BaFT-cached
    method: str  # BaFT, ReFT or one of EasyEdit's methods
    engine: str | None = None  # of `MEASURED_ENGINES`; None for EasyEdit's methods


@dataclass(frozen=True)
class SpeedOptions:
    """Options of a speed run.

    The command line checks the numbers: repeats, sizes and steps must be at least 1.

    Raises:
        ValueError: If an option breaks a rule, or a method or shape is unknown.
    """

    model: str | None = None  # Hugging Face name or directory, or `bundled`
    shape: str = "llama-12x512"  # of random weights, if there is no model
    methods: tuple[str, ...] = ("BaFT", "ReFT")  # BaFT: with each engine; BaFT-full: with one
    data: str | None = None  # records to edit, KIND=PATH; texts of random words if None
    start: int = 0  # first of the records; each repeat takes the next ones
    prompt_length: int = 32  # tokens of a prompt of random words, with the one that begins a text
    batch_size: int = 1  # requests of an edit call
    rank: int = 12  # bases per edited layer of BaFT and ReFT
    steps: int = 40  # of BaFT and ReFT; EasyEdit's methods keep their own
    repeats: int = 5  # measured edits of each row, after the first
    dtype: str = "float32"  # of the weights
    device: int | str = "cpu"  # CUDA device number, or a device name
    threads: int | None = None  # torch's CPU threads; its own choice if None
    new_tokens: int = 32  # generated with and without each edit; 0 leaves generation out
    profile: bool = False  # also say where the time of an edit goes, in a file beside `out`
    out: Path | None = None  # JSON file to write

    def __post_init__(self) -> None:
        out, names = self.out, [row.name for row in self.rows]
        _check(out is None or out.suffix == ".json", "out", "name a .json file", out)
        _check(not self.profile or out is not None, "out", "be given with profile", out)
        is_known = self.data is None or self.data.partition("=")[0] in DATASETS
        form = f"have the form KIND=PATH, with a kind of {', '.join(DATASETS)}"
        _check(is_known, "data", form, self.data)
        _check(bool(names), "methods", "name at least one method", self.methods)
        _check(len(set(names)) == len(names), "methods", "not name a row twice", self.methods)
        if self.model is None:
            shape_sizes(self.shape)  # raises if there is no such shape

    @property
    def rows(self) -> list[Row]:
        """What is measured, in order."""
        return [row for name in self.methods for row in _rows_of(name)]


def _rows_of(name: str) -> Sequence[Row]:
    """Return the rows that the name of a method stands for."""
    method, _, engine = name.partition("-")
    if method not in OUR_METHODS:
        why_not(name, "current")  # raises if there is no such method
        return [Row(name, name)]
    if not engine and method == "ReFT":
        return [Row(name, name, MEASURED_ENGINES[0])]
    rule = f"have an engine of {', '.join(MEASURED_ENGINES)}"
    _check(not engine or engine in MEASURED_ENGINES, "methods", rule, name)
    return [Row(f"{method}-{e}", method, e) for e in ([engine] if engine else MEASURED_ENGINES)]


def _check(holds: bool, name: str, rule: str, value: object) -> None:
    """Raise ValueError about one option unless its rule holds."""
    if not holds:
        raise ValueError(f"{name} must {rule}; got {short(value)}")
