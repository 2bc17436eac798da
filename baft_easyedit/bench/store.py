"""The files of a run's directory; each is there as a whole or not at all.

config.yaml                             the resolved configuration
run.json                                how the run was made
requests.json                           the records that are edited
summary.json                            one row for each method and protocol
cases/<row>/<protocol>/<index>.json     one case: EasyEdit's metrics and the scores from them
chunks/<row>/<protocol>/<chunk>.json    what concerns all cases between two restores; written
                                        last: a chunk with it, and no error in it, is complete
pre_edit/<key>.json                     scores of the unedited model on a chunk's cases
verdicts/<key>.json                     what a judge said of one answer
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from baft_easyedit.bench.protocol import Chunk, Protocol
from baft_easyedit.files.paths import read_regular
from baft_easyedit.files.reading import parse_json
from baft_easyedit.files.validation import validated
from baft_easyedit.files.writing import written_whole

SCHEMA = 1
"""Version of all JSON files of a run; in each object as `schema`."""

Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_Finite = Annotated[float, Field(allow_inf_nan=False)]
_Count = Annotated[int, Field(ge=0)]


def _of_one_rank(by_layer: dict[str, list[float]]) -> dict[str, list[float]]:
    """Raise ValueError unless each layer has as many numbers."""
    counts = {len(values) for values in by_layer.values()}
    if len(counts) > 1:
        raise ValueError(f"must have a number for each basis in every layer; got {sorted(counts)}")
    return by_layer


_ByLayer = Annotated[
    dict[Annotated[str, Field(pattern=r"^[0-9]+$")], list[float]], AfterValidator(_of_one_rank)
]
"""A number for each basis, by layer."""


class _Strict(BaseModel):
    """Of exactly these types; further keys are not read."""

    model_config = ConfigDict(strict=True)


class KeptFile(_Strict):
    """A file of a run that is an object."""

    schema_: Literal[1] = Field(alias="schema")


class FileHash(_Strict):
    """Which file records are from, to the byte."""

    name: str  # name without its directory
    sha256: str
    bytes: _Count


class _Data(_Strict):
    kind: str
    files: list[FileHash]
    num_records: _Count
    sha256: str
    notes: list[str]


class _Git(_Strict):
    commit: str
    dirty: bool


class RunRecord(KeptFile):
    """`run.json`, as `provenance.run_record` makes it."""

    status: str
    command: list[str]
    date: str
    seed: int
    git: _Git | None
    versions: dict[str, str]
    easyedit: dict[str, str]
    hardware: dict[str, Any]
    model: dict[str, str]
    data: _Data
    inputs: dict[str, str]
    earlier: list[dict[str, Any]]
    locality_in_template: bool = False


class _Downstream(_Strict):
    pre_acc: float
    post_acc: float


class ChunkFile(KeptFile):
    """A chunk's file, as `write_chunk` makes it of what `worker` has measured."""

    chunk: _Count
    indices: Annotated[list[_Count], Field(min_length=1)]
    edit_times_s: list[Amount]
    trainable_parameters: _Count | None
    peak_memory_bytes: _Count | None
    basis_usage: _ByLayer | None
    downstream: _Downstream | None
    restored: bool | None
    notes: list[str]
    error: str | None


class _Answers(_Strict):
    """Those of before the edits, and after."""

    pre: list[str]
    post: list[str]


class CaseFile(KeptFile):
    """A case's file, as `worker` makes it."""

    index: _Count
    chunk: _Count
    position: _Count
    chunk_length: Annotated[int, Field(ge=1)]
    scores: Annotated[dict[str, _Finite | None], Field(min_length=1)]
    answers: _Answers | None = None
    wild: _Answers | None = None
    texts: dict[str, list[str] | None] | None = None
    basis: dict[str, _ByLayer | None] | None
    update: dict[str, _ByLayer | None] | None


Kept = Callable[
    [Mapping[str, Any], Callable[[], Mapping[str, Any]], type[BaseModel]], dict[str, Any]
]
"""Reads what a run keeps, given what it depends on, what makes it if there is none, its form."""


class RunDirectory:
    """Paths inside a run's directory, and what is in the files of its chunks and cases."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.config = root / "config.yaml"
        self.run = root / "run.json"
        self.requests = root / "requests.json"
        self.summary = root / "summary.json"

    def record(self) -> dict[str, Any]:
        """Read `run.json`, without which nothing in the directory is known to be of one run."""
        return read_json(self.run, RunRecord, self.root)

    def kept(
        self,
        kind: str,
        depends_on: Any,
        make: Callable[[], Mapping[str, Any]],
        form: type[BaseModel],
    ) -> dict[str, Any]:
        """Read a file named by a hash of everything that it depends on; make it if there is none.

        `kind` is its directory: `pre_edit` or `verdicts`.
        """
        file = self.root / kind / f"{digest(depends_on)[:16]}.json"
        if not file.is_file():
            write_json(file, {"schema": SCHEMA, **make()})
        return read_json(file, form)

    def case(self, method: str, protocol: Protocol, index: int) -> Path:
        """One case of a row."""
        return self._of("cases", method, protocol) / f"{index:05d}.json"

    def chunk(self, chunk: Chunk) -> Path:
        """What concerns all cases of a chunk."""
        return self._of("chunks", chunk.method, chunk.protocol) / f"{chunk.number:05d}.json"

    def write_chunk(self, chunk: Chunk, error: str | None = None, **measured: Any) -> None:
        """Write a chunk's file, after those of its cases: what was measured, or why nothing was."""
        content = {
            "schema": SCHEMA,
            "chunk": chunk.number,
            "indices": list(chunk.indices),
            "edit_times_s": [],
            **dict.fromkeys(("trainable_parameters", "peak_memory_bytes", "basis_usage")),
            **dict.fromkeys(("downstream", "restored")),
            "notes": [],
            "error": error,
            **measured,
        }
        write_json(self.chunk(chunk), content)

    def is_complete(self, chunk: Chunk) -> bool:
        """Tell whether a chunk has been run; one that failed or lacks a case counts as not run."""
        files = [self.case(chunk.method, chunk.protocol, index) for index in chunk.indices]
        is_there = all(file.is_file() for file in (self.chunk(chunk), *files))
        return is_there and read_json(self.chunk(chunk), ChunkFile)["error"] is None

    def chunks_of(self, method: str, protocol: Protocol) -> Iterator[dict[str, Any]]:
        """Read the chunks of one row, in order."""
        files = sorted(self._of("chunks", method, protocol).glob("*.json"))
        return (read_json(file, ChunkFile) for file in files)

    def cases_of(self, method: str, protocol: Protocol) -> Iterator[dict[str, Any]]:
        """Read the cases of one row, in order, without those of chunks that failed.

        Raises:
            ValueError: If one is not there.
        """
        for chunk in self.chunks_of(method, protocol):
            for index in chunk["indices"] if chunk["error"] is None else ():
                file = self.case(method, protocol, index)
                if not file.is_file():
                    raise ValueError(
                        f"{file} must be there, for its chunk was run; run the benchmark again, "
                        "which makes it anew"
                    )
                yield read_json(file, CaseFile)

    def _of(self, kind: str, method: str, protocol: Protocol) -> Path:
        return self.root / kind / file_name(method) / protocol.slug


def file_name(text: str) -> str:
    """Return a row's name as a file name; different names stay different."""
    return re.sub(r"^\.|[^A-Za-z0-9.+-]", _as_hex, text)


def _as_hex(match: re.Match[str]) -> str:
    """Return a character by its number, which ends after two digits or with a `_`."""
    number = ord(match[0])
    return f"_{number:02x}" if number < 0x100 else f"_u{number:x}_"


def read_json(file: Path, form: type[BaseModel] | None = None, damaged: Path | None = None) -> Any:
    """Read a JSON file of a run, which must have the form.

    Raises:
        ValueError: If it is no JSON, or of another form; the message says to delete it, or what
            else is `damaged` with it.
    """
    try:
        content = parse_json(read_regular(file), str(file))
        if form is not None:
            validated(form, content, str(file))
    except ValueError as error:
        raise ValueError(
            f"{error}; delete {damaged or 'it'}, and run the benchmark again, which makes it anew"
        ) from None
    return content


def write_json(file: Path, content: Any) -> None:
    """Write JSON that is there as a whole or not at all, with numpy and torch values made plain."""
    write_text(file, json.dumps(content, indent=1, default=_plain) + "\n")


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else str(value)


def write_text(file: Path, text: str) -> None:
    """Write a text file that is there as a whole or not at all."""
    with written_whole(file) as stream:
        stream.write(text.encode())


def digest(content: Any) -> str:
    """Hash plain data."""
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
