"""The journal of a kept edit: one line of JSON for each change; lines are only appended.

Every line holds the SHA-256 of the line before it, so that an altered line is detected; the last
line is compared with its copy in the state file. The entries form a tree: the `parent` of an edit
is the entry whose state it began from. An `undo` or `rollback` is an entry, too, and goes `to` an
earlier one. The *position* of the journal is the entry (never of these two kinds, nor `settings`)
that produced the present state.
"""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from baft_easyedit.files.messages import cut, printable, short
from baft_easyedit.files.paths import read_regular
from baft_easyedit.files.reading import did_you_mean, parse_object, taken
from baft_easyedit.training.loop import EditReport
from baft_easyedit.training.requests import EditRequest

MAX_LINE = 16 * 2**20
"""Longest line, in bytes."""
_MAX_JOURNAL = 2**32
REPAIR = "`baft-easyedit repair` or BaFTEditor.open(..., repair=True)"
"""What to do about a damaged directory, in errors."""
_COMMON = {"id": int, "kind": str, "time": str, "state_hash": str, "previous": str}
_CHANGE = {"parent": int, "requests": list, "report": dict}
_SETTINGS = {"hparams": dict, "environment": dict}
_CONTENT: Mapping[str, Mapping[str, type]] = {
    "start": _SETTINGS,
    "settings": _SETTINGS,
    "edit": _CHANGE,
    "install": _CHANGE,
    "undo": {"to": int},
    "rollback": {"to": int},
}
"""The fields of each kind of line beside `_COMMON`. `start` is entry 0, and may have `snapshot_of`,
where the state came from; `settings` tells new hyper-parameters or a new environment; a rollback
may have `forgotten`, a prompt: the edits after it are then the ones learned again without it."""


def to_json(value: Any) -> str:
    """Return a value as one line of ASCII, the same for equal values.

    Raises:
        ValueError: If JSON has no such value: NaN, infinity, a cycle, a key or value of other type.
    """
    try:
        return json.dumps(value, allow_nan=False, separators=(",", ":"), sort_keys=True)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"what is kept must be JSON; {cut(error, 500)}") from None


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the journal. Fields that are rarely needed are parsed from `line` on demand."""

    id: int
    kind: str
    time: str
    """Time at which the change was completed, UTC."""
    state_hash: str
    """Hash of the state after the change; see `state.state_hash`."""
    previous: str
    """SHA-256 of the line before; empty for the first."""
    parent: int | None
    """Id of the entry whose state an edit or install began from; None for other kinds."""
    to: int | None
    """Id of the entry that an undo or rollback went to; None for other kinds."""
    line: str = field(repr=False)
    """The line itself, without its line break."""

    @classmethod
    def from_line(cls, line: str, where: str) -> "Entry":
        """Read a line.

        Raises:
            ValueError: If the line is too long, not JSON, or lacks a field of its kind.
        """
        if len(line) > MAX_LINE or not line.isascii():
            raise ValueError(f"{where} must be ASCII below {MAX_LINE} bytes; got {len(line)}")
        content = parse_object(line, where)
        kind = taken(content, "kind", str, where)
        if kind not in _CONTENT:
            raise ValueError(
                f"kind in {where} must be one of {', '.join(_CONTENT)}; got {short(kind)}"
            )
        for key, type_ in {**_COMMON, **_CONTENT[kind]}.items():
            taken(content, key, type_, where)
        for key in ("snapshot_of", "forgotten"):
            taken({key: "", **content}, key, str, where)
        for request in content.get("requests", ()):
            if not isinstance(request, dict):
                raise ValueError(f"requests in {where} must be JSON objects; got {short(request)}")
            for key in ("prompt", "target_new"):
                taken(request, key, str, f"a request in {where}")
        parent, to = (content[key] if key in _CONTENT[kind] else None for key in ("parent", "to"))
        for key, place in (("parent", parent), ("to", to)):
            if place is not None and not 0 <= place < max(content["id"], 1):
                raise ValueError(
                    f"{key} in {where} must be an entry before {short(content['id'])}; got "
                    f"{short(place)}"
                )
        common = {key: content[key] for key in _COMMON}
        return cls(**common, parent=parent, to=to, line=line)

    @property
    def sha256(self) -> str:
        """SHA-256 of the line, which the next line holds as `previous`."""
        return hashlib.sha256(self.line.encode()).hexdigest()

    @property
    def reference(self) -> str:
        """Name of the entry in the `snapshot_of` of a snapshot of its state."""
        return f"entry {self.id}, whose line has the SHA-256 {self.sha256}"

    @property
    def content(self) -> dict[str, Any]:
        """All fields of the line."""
        return dict(json.loads(self.line))

    @property
    def requests(self) -> list[dict[str, Any]]:
        """The requests of an edit, as EasyEdit's dicts; empty for other kinds."""
        return self.content.get("requests", [])

    def summary(self) -> str:
        """Return the entry as a line of text for people, without control characters."""
        content = self.content
        parts = [f"{self.id:>5}  {self.time[:19]}Z  {self.state_hash[:10]}  {self.kind:<8}"]
        if self.to is not None:
            parts.append(f"to {self.to}")
        if forgotten := content.get("forgotten"):
            parts.append(f"to forget {cut(forgotten, 300)}")
        if self.id == 0 and (before := content.get("snapshot_of")):
            parts.append(f"snapshot of {cut(before, 300)}")
        if requests := content.get("requests"):
            request = requests[0]
            more = f" (and {len(requests) - 1} more)" if len(requests) > 1 else ""
            parts.append(f"{request.get('prompt')} -> {request.get('target_new')}{more}")
        if report := content.get("report"):
            parts.append(_in_words(report))
        return printable(" ".join(parts))


def _in_words(report: Mapping[str, Any]) -> str:
    """Return a report in a few words; a journal may come from anybody, so nothing is trusted."""
    try:
        loss, learned = float(report["losses"]["answer"][-1]), list(report["learned"])
        steps, time_s = int(report["num_steps"]), float(report["time_s"])
    except (KeyError, IndexError, TypeError, ValueError, OverflowError):
        return "[its report is not one]"
    missed = f", {learned.count(False)} of {len(learned)} not learned" if False in learned else ""
    return f"[{steps} steps, loss {loss:.3f}, {time_s:.2f} s{missed}]"


class Journal:
    """The entries of a kept edit, and the position of the present state in their tree.

    They must follow one another from entry 0 on; it is a ValueError if they do not.
    """

    def __init__(self, entries: Iterable[Entry] = ()) -> None:
        self.entries: list[Entry] = []
        self._positions: list[int] = []
        self._settings: list[int] = []
        self._hashes: dict[int, set[str]] = {}
        """Hashes by position: a state has one hash attached, and another detached."""
        for entry in entries:
            self.append(entry)

    def __len__(self) -> int:
        return len(self.entries)

    def append(self, entry: Entry) -> None:
        """Add the next entry; ValueError if it does not follow the last one."""
        previous = self.entries[-1].sha256 if self.entries else ""
        follows = entry.id == len(self) and entry.previous == previous
        if not follows or (entry.kind == "start") != (entry.id == 0):
            raise ValueError(f"journal entry {len(self)} must follow the one before it")
        position = entry.id
        if entry.to is not None:
            position = self._positions[entry.to]
        elif entry.kind == "settings":
            position = self._positions[-1]
        self._positions.append(position)
        if entry.kind in ("start", "settings"):
            self._settings.append(entry.id)
        self.entries.append(entry)
        self._hashes.setdefault(position, set()).add(entry.state_hash)

    def has_hash(self, entry_id: int, state_hash: str) -> bool:
        """Tell whether a hash is that of the state after an entry."""
        return state_hash in self._hashes[self._positions[entry_id]]

    def next(self, kind: str, state_hash: str, content: Mapping[str, Any]) -> Entry:
        """Make the entry that follows the last one; ValueError if the line would be too long."""
        common = {
            "id": len(self),
            "kind": kind,
            "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
            "state_hash": state_hash,
            "previous": self.entries[-1].sha256 if self.entries else "",
        }
        parent = {"parent": self.position} if "parent" in _CONTENT[kind] else {}
        line = to_json({**common, **parent, **content})
        return Entry.from_line(line, f"journal entry {len(self)}")

    def add(self, kind: str, state_hash: str, content: Mapping[str, Any]) -> None:
        """Add the entry of a change, as `next` makes it."""
        self.append(self.next(kind, state_hash, content))

    @property
    def position(self) -> int:
        """Id of the start, edit or install that produced the present state."""
        return self._positions[-1]

    def position_of(self, entry_id: int) -> int:
        """Return the id of the start, edit or install that produced the state after an entry."""
        return self._positions[entry_id]

    def ancestors(self, entry_id: int) -> Iterator[int]:
        """Yield the position of an entry, the position that it began from, and so on down to 0."""
        position = self._positions[entry_id]
        yield position
        while (parent := self.entries[position].parent) is not None:
            position = self._positions[parent]
            yield position

    def path_from(self, prompt: str, where: str) -> list[Entry]:
        """Return the entries that led to the present state, from the first edit of a prompt on.

        Raises:
            ValueError: If there is no such edit, or one of these entries is no edit.
        """
        path = [self.entries[i] for i in sorted(self.ancestors(self.position))]
        prompts = [{request["prompt"] for request in entry.requests} for entry in path]
        first = next((n for n, known in enumerate(prompts) if prompt in known), None)
        if first is None:
            hint = did_you_mean(prompt, sorted(set().union(*prompts)))
            is_snapshot = self.entries[0].content.get("snapshot_of") is not None
            more = "; edits in the snapshot that it begins with are not listed" * is_snapshot
            raise ValueError(
                f"prompt must be that of an edit in {where}; got {short(prompt)}{hint}{more}"
            )
        for entry in path[first:]:
            if entry.kind != "edit":
                raise ValueError(
                    f"entry {entry.id} of {where} must be an edit to be learned again; it is an "
                    f"{entry.kind}: roll back to before it"
                )
        return path[first:]

    def settings_of(self, entry_id: int) -> dict[str, Any]:
        """Return the hyper-parameters and the environment that an entry was made in."""
        entry = self.entries[self._settings[bisect_right(self._settings, entry_id) - 1]]
        return {key: value for key, value in entry.content.items() if key in _SETTINGS}

    def ends_with(self, settings: Mapping[str, Any]) -> bool:
        """Tell whether these are the settings of the last entry."""
        return bool(self.entries) and self.settings_of(len(self) - 1) == settings


def read_lines(file: Path) -> tuple[list[str], str]:
    """Read the complete lines of a journal file, and an incomplete last line ("" if none).

    Raises:
        ValueError: If it is not a regular file.
    """
    if not file.exists():
        return [], ""
    *lines, rest = read_regular(file, _MAX_JOURNAL).decode("ascii", errors="replace").split("\n")
    return lines, rest


def parse_lines(lines: Sequence[str], where: str) -> Journal:
    """Parse the lines of a journal.

    Raises:
        ValueError: If a line is damaged; the message tells which one, and how to go on.
    """
    journal = Journal()
    for number, line in enumerate(lines, 1):
        try:
            journal.append(Entry.from_line(line, f"line {number}"))
        except ValueError as error:
            raise ValueError(
                f"{where} is damaged at line {number} or the one before it ({error}): restore it "
                "from a backup; or go on without the history: load() reads the state alone, and "
                f"save() puts it into a new directory, or {REPAIR} begins a new journal and keeps "
                "the old one aside"
            ) from None
    return journal


def edit_content(requests: Sequence[EditRequest], report: EditReport) -> dict[str, Any]:
    """Return what an edit's entry holds; of each loss term, the first and the last value."""
    first, last = report.losses[0], report.losses[-1]
    terms = ("answer", "balance", "locality")
    used = [name for name in terms if getattr(first, name) is not None]
    told = {
        "num_requests": report.num_requests,
        "num_steps": report.num_steps,
        "stopped_early": report.stopped_early,
        "time_s": report.time_s,
        "losses": {name: [getattr(first, name), getattr(last, name)] for name in used},
        "learned": list(report.learned),
        "engine": report.engine,
    }
    return {"requests": [request.to_dict() for request in requests], "report": told}
