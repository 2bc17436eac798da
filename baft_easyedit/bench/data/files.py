"""Benchmark files on disk: found by name, hashed, and read as lists of records or cases."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from baft_easyedit.bench.data.case import Case
from baft_easyedit.bench.store import FileHash
from baft_easyedit.files.messages import short
from baft_easyedit.files.paths import expanded, read_regular
from baft_easyedit.files.reading import parse_json
from baft_easyedit.files.validation import M, validated


class Source(NamedTuple):
    """What a reader makes of its files."""

    cases: list[Case]
    files: list[FileHash]
    notes: list[str]


def find_file(path: Path | None, *names: str) -> Path:
    """Return `path` itself if it is a file, or the file called one of `names` in that directory.

    Raises:
        ValueError: If `path` is None.
        FileNotFoundError: If there is no such file.
    """
    what = " or ".join(names) or "a file"
    if path is None:
        raise ValueError(
            f"path must lead to {what}; got None: give --data, or path under data in the YAML"
        )
    path = expanded(path)
    candidates = [path / name for name in names] if os.path.isdir(path) else [path]
    for candidate in candidates:
        if os.path.exists(candidate):
            return candidate
    raise FileNotFoundError(f"path must lead to {what}; there is none at {short(str(path))}")


def read_file(path: Path) -> tuple[bytes, FileHash]:
    """Return a file's content, and what identifies it."""
    content = read_regular(path)
    digest = hashlib.sha256(content).hexdigest()
    return content, FileHash(name=path.name, sha256=digest, bytes=len(content))


def read_records(path: Path, model_of: Callable[[Any], type[M]]) -> tuple[list[M], FileHash]:
    """Read a JSON list, each record into the model that `model_of` says.

    Raises:
        ValueError: If the file is not JSON, the list is empty, or a record breaks a rule; records
            are numbered from 0.
        TypeError: If it does not hold a list.
    """
    content, file = read_file(path)
    records = parse_json(content, path.name)
    if not isinstance(records, list):
        raise TypeError(f"{path.name} must hold a list of records; got {type(records).__name__}")
    if not records:
        raise ValueError(f"{path.name} must hold at least one record; got an empty list")
    numbered = enumerate(records)
    return [validated(model_of(r), r, f"{file.name}, record {i}") for i, r in numbered], file


def read_cases(layout: Any, names: tuple[str, ...], path: Path | None) -> Source:
    """Read a file, or one of `names` in a directory, each of whose records has one case."""
    records, file = read_records(find_file(path, *names), lambda _: layout)
    return Source([record.case() for record in records], [file], [])
