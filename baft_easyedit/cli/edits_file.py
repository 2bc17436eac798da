"""Read files of edit requests: a user's own, or the records of a benchmark."""

import csv
import io
from pathlib import Path
from typing import Any

from baft_easyedit.cli.console import note
from baft_easyedit.files.messages import short
from baft_easyedit.files.paths import read_text
from baft_easyedit.files.reading import parse_json
from baft_easyedit.training.requests import EditRequest, as_requests


def read_benchmark(kind: str, path: Path) -> list[EditRequest]:
    """Read the records of a benchmark; of several with the same prompt, only the last is used.

    Raises:
        ValueError: If there is no such kind of benchmark, or a record is unusable.
    """
    from baft_easyedit.bench.data import load_dataset

    found = load_dataset(kind, path)
    for text in found.notes:
        note(text)
    return list({one.prompt: one for one in map(EditRequest.from_dict, found.requests)}.values())


def read_requests(file: Path) -> list[EditRequest]:
    """Read edit requests: a JSON list, JSON lines (`.jsonl`), or CSV (`.csv`).

    Empty cells of a CSV file count as absent. Duplicates of a request are dropped.

    Raises:
        TypeError: If a request has a value of the wrong type.
        ValueError: If the file has none of these formats, a request is unusable, or two different
            requests have one prompt; the message names them.
    """
    if file.is_dir():
        raise ValueError(
            f"{file} must be a file of edits, or with --kind a benchmark's directory; it is a "
            "directory: give --kind, one of `baft-easyedit ls kinds`"
        )
    text = read_text(file).removeprefix("\ufeff")
    try:
        found = _parsed(text, file.suffix.lower())
    except (ValueError, csv.Error) as error:
        raise ValueError(
            f"{file} must be a JSON list, JSON lines (.jsonl) or CSV (.csv) of requests: {error}"
        ) from None
    if not isinstance(found, list) or not found:
        raise ValueError(f"{file} must hold a list of requests; got {short(found)}")
    by_prompt: dict[str, tuple[int, EditRequest]] = {}
    for number, one in enumerate(found, 1):
        try:
            (request,) = as_requests([one])
        except (TypeError, ValueError) as error:
            raise type(error)(f"request {number} of {file}: {error}") from None
        first, other = by_prompt.setdefault(request.prompt.rstrip(), (number, request))
        if other != request:
            raise ValueError(
                f"{file} must hold one request for a prompt; {short(request.prompt)} has requests "
                f"{first} and {number}: keep one"
            )
    return [request for _, request in by_prompt.values()]


def _parsed(text: str, suffix: str) -> Any:
    """Parse the text of a file in the format that the suffix of its name says."""
    if suffix == ".csv":
        rows = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        columns = rows.fieldnames or ()
        if len(columns) == 1 and any(sign in columns[0] for sign in ";\t"):
            raise ValueError(f"save it with commas between columns; got {short(columns[0])}")
        if len(set(columns)) < len(columns):
            raise ValueError("a column is there twice")
        found = [{key: value for key, value in row.items() if value} for row in rows]
        if any(None in row for row in found):
            raise ValueError("a line has more cells than there are columns")
        return found
    if suffix == ".jsonl":
        lines = enumerate(text.split("\n"), 1)
        return [parse_json(line, f"line {i}", is_strict=True) for i, line in lines if line.strip()]
    return parse_json(text, "its text", is_strict=True)
