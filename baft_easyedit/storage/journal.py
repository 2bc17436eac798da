"""The journal: one line for each change of a kept edit, never rewritten.

Every line names the SHA-256 of the line before it, so that a change of any but the last is found;
the state file holds a copy of the last. Entries form a tree: an edit grows from the state that it
began with, its `parent`; `undo` and `rollback` go `to` an earlier entry.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from baft_easyedit.files.messages import cut, short
from baft_easyedit.files.paths import open_regular
from baft_easyedit.files.reading import taken
from baft_easyedit.storage.files import parse_object, to_json
from baft_easyedit.training.loop import EditReport, StepLosses

MAX_LINE = 16 * 2**20
"""Longest line, in bytes."""

KINDS = ("start", "settings", "edit", "consolidate", "install", "undo", "rollback")
"""A consolidation is read, but not written any more."""
"""`start` is entry 0; `settings` notes that hyper-parameters or the environment changed."""
_CHANGES = ("edit", "consolidate", "install")
_SETTINGS = ("start", "settings")
_CONTENT: dict[str, dict[str, type]] = {
    **{kind: {"parent": int, "requests": list, "report": dict} for kind in _CHANGES},
    **{kind: {"to": int} for kind in ("undo", "rollback")},
    **{kind: {"hparams": dict, "environment": dict} for kind in _SETTINGS},
}
"""What a line holds beside what all have, by its kind."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One line; of what is in it, only what is needed all the time is kept apart in memory."""

    id: int
    kind: str
    """One of `KINDS`."""
    time: str
    """When it was completed, UTC."""
    state_hash: str
    """Hash of the state after it; see `state.state_hash`."""
    previous: str
    """SHA-256 of the line before; empty for the first."""
    parent: int | None
    """What an edit grew from."""
    to: int | None
    """Where an undo or rollback went."""
    line: str = field(repr=False)
    """The line itself, without its end."""

    @classmethod
    def from_line(cls, line: str, where: str) -> "Entry":
        """Read a line.

        Raises:
            ValueError: If it is too long, not JSON, or lacks what its kind has.
        """
        if len(line) > MAX_LINE or not line.isascii():
            raise ValueError(f"{where} must be ASCII below {MAX_LINE} bytes; got {len(line)}")
        content = parse_object(line, where)
        kind = taken(content, "kind", str, where)
        if kind not in KINDS:
            raise ValueError(
                f"kind in {where} must be one of {', '.join(KINDS)}; got {short(kind)}"
            )
        entry_id = taken(content, "id", int, where)
        others = {key: taken(content, key, t, where) for key, t in _CONTENT[kind].items()}
        taken({"snapshot_of": "", **content}, "snapshot_of", str, where)
        if not all(isinstance(request, dict) for request in others.get("requests", ())):
            raise ValueError(f"requests in {where} must be JSON objects")
        for key in ("parent", "to"):
            if not 0 <= others.get(key, 0) < max(entry_id, 1):
                raise ValueError(
                    f"{key} in {where} must be an entry before {short(entry_id)}; got "
                    f"{short(others[key])}"
                )
        time, state_hash, previous = (
            taken(content, key, str, where) for key in ("time", "state_hash", "previous")
        )
        places = others.get("parent"), others.get("to")
        return cls(entry_id, kind, time, state_hash, previous, *places, line)

    @property
    def sha256(self) -> str:
        """What the next line calls this one."""
        return hashlib.sha256(self.line.encode()).hexdigest()

    @property
    def reference(self) -> str:
        """What a snapshot calls the entry that it is of."""
        return f"entry {self.id}, whose line has the SHA-256 {self.sha256}"

    @property
    def content(self) -> dict[str, Any]:
        """What the line holds beside, by its kind: see `_CONTENT`."""
        content = parse_object(self.line, f"journal entry {self.id}")
        return {key: content[key] for key in _CONTENT[self.kind]}

    @property
    def requests(self) -> list[dict[str, Any]]:
        """EasyEdit's request dicts, as `request_dict` gives them; empty where there are none."""
        return self.content.get("requests", [])

    @property
    def report(self) -> dict[str, Any]:
        """What `report_dict` gives; empty where nothing was learned."""
        return self.content.get("report", {})

    @property
    def snapshot_of(self) -> str | None:
        """What an entry 0 says of the edit that came before; None if nothing did."""
        return parse_object(self.line, f"journal entry {self.id}").get("snapshot_of")

    def summary(self) -> str:
        """Tell the entry in a line of text, with nothing in it that could upset a terminal."""
        parts = [f"{self.id:>5}  {self.time[:19]}Z  {self.state_hash[:10]}  {self.kind:<8}"]
        if self.to is not None:
            parts.append(f"to {self.to}")
        if self.id == 0 and (before := self.snapshot_of):
            parts.append(f"snapshot of {cut(before, 300)}")
        if requests := self.requests:
            request = requests[0]
            more = f" (and {len(requests) - 1} more)" if len(requests) > 1 else ""
            parts.append(f"{request.get('prompt')} -> {request.get('target_new')}{more}")
        if report := self.report:
            parts.append(_told(report))
        text = " ".join(parts)
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _told(report: Mapping[str, Any]) -> str:
    """Tell a report in a few words; it may come from anybody."""
    try:
        loss, learned = float(report["losses"]["answer"][-1]), list(report.get("learned", ()))
        steps, time_s = int(report["num_steps"]), float(report["time_s"])
    except (KeyError, IndexError, TypeError, ValueError, OverflowError):
        return "[its report is not one]"
    missed = f", {learned.count(False)} of {len(learned)} not learned" if False in learned else ""
    return f"[{steps} steps, loss {loss:.3f}, {time_s:.2f} s{missed}]"


class Journal:
    """The entries so far, and where in their tree the state is.

    Args:
        entries: From entry 0 on.

    Raises:
        ValueError: If they do not follow one another.
    """

    def __init__(self, entries: Iterable[Entry] = ()) -> None:
        self.entries: list[Entry] = []
        self._positions: list[int] = []
        self._settings: list[int] = []
        self._hashes: dict[int, set[str]] = {}  # by position
        for entry in entries:
            self.append(entry)

    def __len__(self) -> int:
        return len(self.entries)

    def append(self, entry: Entry) -> None:
        """Add the next entry.

        Raises:
            ValueError: If it does not follow the last one.
        """
        previous = self.entries[-1].sha256 if self.entries else ""
        if (
            entry.id != len(self)
            or entry.previous != previous
            or (entry.kind == "start") != (entry.id == 0)
        ):
            raise ValueError(f"journal entry {len(self)} must follow the one before it")
        position = entry.id
        if entry.to is not None:
            position = self._positions[entry.to]
        elif entry.kind == "settings":
            position = self._positions[-1]
        self._positions.append(position)
        if entry.kind in _SETTINGS:
            self._settings.append(entry.id)
        self.entries.append(entry)
        self.note_hash(entry.id, entry.state_hash)

    def note_hash(self, entry_id: int, state_hash: str) -> None:
        """Take note of a hash that the state after an entry has: another one once converted."""
        self._hashes.setdefault(self._positions[entry_id], set()).add(state_hash)

    def has_hash(self, entry_id: int, state_hash: str) -> bool:
        """Tell whether the state after an entry has a hash."""
        return state_hash in self._hashes[self._positions[entry_id]]

    def next(self, kind: str, state_hash: str, content: Mapping[str, Any]) -> Entry:
        """Return a new entry that follows the last one, not yet appended.

        Raises:
            ValueError: If its line would be too long.
        """
        line = to_json(
            {
                "id": len(self),
                "kind": kind,
                "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
                "state_hash": state_hash,
                "previous": self.entries[-1].sha256 if self.entries else "",
                **({"parent": self.position} if kind in _CHANGES else {}),
                **content,
            }
        )
        return Entry.from_line(line, f"journal entry {len(self)}")

    @property
    def position(self) -> int:
        """The start or change whose state is the present one."""
        return self._positions[-1]

    def position_of(self, entry_id: int) -> int:
        """Return the start or change whose state is that after an entry."""
        return self._positions[entry_id]

    def ancestors(self, entry_id: int) -> Iterator[int]:
        """Yield the position of an entry, that which it grew from, and so on down to 0."""
        position = self._positions[entry_id]
        yield position
        while (parent := self.entries[position].parent) is not None:
            position = self._positions[parent]
            yield position

    def settings_of(self, entry_id: int) -> Entry:
        """Return the entry with the hyper-parameters and environment that an entry was made in."""
        return self.entries[self._settings[bisect_right(self._settings, entry_id) - 1]]


def read_lines(file: Path) -> tuple[list[str], str]:
    """Read the complete lines of a journal, and what follows the last of them.

    Raises:
        ValueError: If a line is too long, or it is no regular file.
    """
    lines: list[str] = []
    if not file.exists():
        return lines, ""
    with open_regular(file) as stream:
        while raw := stream.readline(MAX_LINE + 2):
            text = raw.decode("ascii", errors="replace")
            if len(raw) > MAX_LINE + 1:
                raise ValueError(
                    f"line {len(lines) + 1} of {file} must be below {MAX_LINE} bytes, and is not"
                )
            if not text.endswith("\n"):
                return lines, text
            lines.append(text[:-1])
    return lines, ""


def parse_lines(lines: Sequence[str], where: str) -> Journal:
    """Read the lines of a journal.

    Raises:
        ValueError: If one is damaged; the message tells which, and how to go on.
    """
    journal = Journal()
    for number, line in enumerate(lines, 1):
        try:
            journal.append(Entry.from_line(line, f"line {number}"))
        except ValueError as error:
            raise ValueError(
                f"{where} is damaged at line {number} or the one before it ({error}): restore it "
                "from a backup; or go on without the history: load() reads the state alone, and "
                "save() puts it into a new directory, or open() with repair=True begins a new "
                "journal and keeps the old one aside"
            ) from None
    return journal


def report_dict(report: EditReport) -> dict[str, Any]:
    """Return what the journal keeps of a report: of each term, its first and last value."""
    return {
        "num_requests": report.num_requests,
        "num_steps": report.num_steps,
        "stopped_early": report.stopped_early,
        "time_s": report.time_s,
        "losses": _ends(report.losses),
        "learned": list(report.learned),
        "engine": report.engine,
    }


def _ends(losses: Sequence[StepLosses]) -> dict[str, list[float]]:
    """Return the first and last value of each term in use."""
    first, last = losses[0], losses[-1]
    return {
        name: [getattr(first, name), getattr(last, name)]
        for name in ("answer", "rehearsal", "balance", "locality")
        if getattr(first, name) is not None
    }
