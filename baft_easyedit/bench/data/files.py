"""Benchmark files on disk: found by name, hashed, and read as lists of records."""

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from baft_easyedit.bench.validation import M, validated
from baft_easyedit.files.messages import short
from baft_easyedit.files.paths import expanded, read_regular
from baft_easyedit.files.reading import parse_json

T = TypeVar("T")


@dataclass(frozen=True)
class FileHash:
    """Which file was read, to the byte."""

    name: str
    """Name without its directory."""
    sha256: str
    bytes: int


def find_file(path: Path | None, *names: str) -> Path:
    """Return `path` itself if it is a file, or the file called one of `names` in that directory.

    Raises:
        ValueError: If `path` is None.
        FileNotFoundError: If there is no such file.
    """
    what = " or ".join(names) or "a file"
    if path is None:
        raise ValueError(f"path must lead to {what}; got None")
    path = expanded(path)
    candidates = [path / name for name in names] if os.path.isdir(path) else [path]
    for candidate in candidates:
        if os.path.exists(candidate):
            return candidate
    raise FileNotFoundError(f"path must lead to {what}; there is none at {short(str(path))}")


def read_file(path: Path) -> tuple[bytes, FileHash]:
    """Return a file's content, and what identifies it."""
    content = read_regular(path)
    return content, FileHash(path.name, hashlib.sha256(content).hexdigest(), len(content))


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


def select(items: Sequence[T], start: int, limit: int | None, what: str) -> list[T]:
    """Return `limit` items from `start` on, all if `limit` is None.

    Raises:
        ValueError: If there are not that many; fewer would not be the benchmark that was asked for.
    """
    if not 0 <= start < len(items):
        raise ValueError(f"start must be in [0, {len(items) - 1}] for {what}; got {short(start)}")
    if limit is not None and not 1 <= limit <= len(items) - start:
        raise ValueError(
            f"limit must be in [1, {len(items) - start}] for {what} from {start} on, or None for "
            f"all; got {short(limit)}"
        )
    return list(items[start : None if limit is None else start + limit])
