"""A run's directory: where each record lies; each is there as a whole or not at all.

config.yaml  run.json  requests.json  summary.json
cases/<row>/<protocol>/<index>.json     one case: EasyEdit's metrics and the scores from them
chunks/<row>/<protocol>/<chunk>.json    what concerns all cases between two restores; written
                                        last, so a chunk with this file is complete
pre_edit/<key>.json                     scores of the unedited model on a chunk's cases
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baft_easyedit.bench.plan import Protocol, Unit, file_name
from baft_easyedit.files.messages import short
from baft_easyedit.files.paths import read_regular
from baft_easyedit.files.reading import parse_json
from baft_easyedit.files.writing import written_whole

SCHEMA = 1
"""Version of all records; in each of them as `schema`."""


@dataclass(frozen=True)
class RunDirectory:
    """Paths inside a run's directory."""

    root: Path

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.root / "config.yaml"

    @property
    def run(self) -> Path:
        """How the run was made."""
        return self.root / "run.json"

    @property
    def requests(self) -> Path:
        """The records that are edited."""
        return self.root / "requests.json"

    @property
    def summary(self) -> Path:
        """One row for each method and protocol."""
        return self.root / "summary.json"

    def case(self, unit: Unit, index: int) -> Path:
        """The record of one case."""
        return self._of(unit.method, unit.protocol, "cases") / f"{index:05d}.json"

    def is_complete(self, unit: Unit) -> bool:
        """Tell whether a chunk has been run; one that failed has not."""
        file = self.chunk(unit)
        return file.is_file() and read_json(file)["error"] is None

    def chunk(self, unit: Unit) -> Path:
        """The record of one chunk."""
        return self._of(unit.method, unit.protocol, "chunks") / f"{unit.chunk:05d}.json"

    def pre_edit(self, key: str) -> Path:
        """The unedited model's scores under the key of all that they depend on."""
        return self.root / "pre_edit" / f"{key}.json"

    def cases_of(self, method: str, protocol: Protocol) -> Iterator[dict[str, Any]]:
        """Read the cases of one row, in order; not those that an unfinished chunk left behind."""
        done = {c["chunk"] for c in self.chunks_of(method, protocol) if c["error"] is None}
        cases = _read_all(self._of(method, protocol, "cases"))
        return (case for case in cases if case["chunk"] in done)

    def chunks_of(self, method: str, protocol: Protocol) -> Iterator[dict[str, Any]]:
        """Read the chunks of one row, in order."""
        return _read_all(self._of(method, protocol, "chunks"))

    def _of(self, method: str, protocol: Protocol, kind: str) -> Path:
        """The directory of one row's records."""
        return self.root / kind / file_name(method) / protocol.slug


def _read_all(directory: Path) -> Iterator[dict[str, Any]]:
    """Read the records of a directory in the order of their names."""
    for file in sorted(directory.glob("*.json")):
        yield read_json(file)


def read_json(file: Path) -> Any:
    """Read a record.

    Raises:
        ValueError: If the file is not JSON, or of another schema.
    """
    try:
        content = parse_json(read_regular(file), str(file))
    except ValueError as error:
        raise ValueError(f"{error}; delete it, and it is made again") from None
    found = content.get("schema", SCHEMA) if isinstance(content, dict) else SCHEMA
    if found != SCHEMA:
        raise ValueError(f"{file} must have schema {SCHEMA}; got {short(found)}")
    return content


def write_json(file: Path, content: Any) -> None:
    """Write a record so that it is there as a whole or not at all."""
    write_text(file, json.dumps(content, indent=1, default=str) + "\n")


def write_text(file: Path, text: str) -> None:
    """Write a text file so that it is there as a whole or not at all."""
    with written_whole(file) as stream:
        stream.write(text.encode())
