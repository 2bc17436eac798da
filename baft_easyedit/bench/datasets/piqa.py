"""PIQA: questions of everyday physics with two solutions, to see what editing did to a model."""

from pathlib import Path
from typing import Literal, NamedTuple

from baft_easyedit.bench.datasets.files import FileHash, find_file, read_file, select
from baft_easyedit.bench.datasets.schema import Layout, Text, check
from baft_easyedit.files.messages import short
from baft_easyedit.files.reading import parse_json


class PiqaItem(Layout):
    """A goal and two ways to reach it; blanks at the ends of texts are gone."""

    goal: Text
    sol1: Text
    sol2: Text
    label: Literal[0, 1]
    """0 if `sol1` is right, 1 if `sol2` is."""


class Piqa(NamedTuple):
    """The items, and the files they were read from."""

    items: list[PiqaItem]
    files: list[FileHash]


def load_piqa(path: str | Path, limit: int | None = None) -> Piqa:
    """Read PIQA.

    Args:
        path: The directory of valid.jsonl and valid-labels.lst, or a `<name>.jsonl` with its
            `<name>-labels.lst` beside it.
        limit: Number of items, from the first on; all if None.

    Raises:
        ValueError: If a line is not JSON, breaks a rule, or has no label, or there are fewer items
            than `limit`.
        TypeError: If a line is not a JSON object.
        FileNotFoundError: If a file is missing.
    """
    questions_file = find_file(Path(path), "valid.jsonl")
    labels_file = find_file(questions_file.with_name(f"{questions_file.stem}-labels.lst"))
    questions, questions_hash = _read_lines(questions_file)
    labels, labels_hash = _read_lines(labels_file)
    if len(questions) != len(labels):
        raise ValueError(
            f"{labels_file.name} must have a label for each of the {len(questions)} lines of "
            f"{questions_file.name}; got {len(labels)}"
        )
    items = [
        _item(question, label, f"{questions_file.name}, record {i}")
        for i, (question, label) in enumerate(zip(questions, labels, strict=True))
    ]
    return Piqa(select(items, 0, limit, "piqa"), [questions_hash, labels_hash])


def _read_lines(path: Path) -> tuple[list[bytes], FileHash]:
    """Read the lines of a file; only a line feed ends one, for JSON may hold other separators."""
    content, file = read_file(path)
    return content.rstrip().split(b"\n"), file


def _item(question: bytes, label: bytes, place: str) -> PiqaItem:
    """Join a question with its label."""
    record = parse_json(question, place)
    if not isinstance(record, dict):
        raise TypeError(f"{place} must be an object with goal, sol1 and sol2; got {short(record)}")
    return check(PiqaItem, {**record, "label": {b"0": 0, b"1": 1}.get(label.strip(), label)}, place)
