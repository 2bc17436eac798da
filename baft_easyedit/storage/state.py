"""The format of a state file: learned tensors as safetensors, everything else in its metadata.

Metadata keys: `format_version`; `entries`, the lines that the journal file did not have yet, the
last being that of the state; `entry_id`, the id of that entry; `state_hash`; `attached`; `memory`,
which is empty but for edits of earlier versions; `config`; `metadata_hash`, over all the others.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from baft_easyedit.files.messages import cut, short
from baft_easyedit.files.paths import open_regular
from baft_easyedit.files.reading import parse_object
from baft_easyedit.storage.config import FORMAT_VERSION, KeptConfig
from baft_easyedit.storage.journal import Entry, Journal, to_json
from baft_easyedit.training.learner import EditState

_MAX_HEADER = 100_000_000
"""Longest header that safetensors reads, in bytes."""
_KEYS = ("format_version", "entry_id", "entries", "state_hash", "attached", "memory", "config")


@dataclass(frozen=True)
class StateFile:
    """The content of a state file."""

    state: EditState = field(repr=False)
    entries: tuple[Entry, ...]
    """Journal entries that the journal file may lack; the last one led to the state."""
    config: KeptConfig


def state_hash(state: EditState) -> str:
    """Return the SHA-256 of a state: tensors (names, dtypes, shapes, bytes) and other fields.

    Texts that are not known are left out: earlier versions kept none.
    """
    digest = hashlib.sha256()
    for name in sorted(state.learned):
        value = state.learned[name]
        if name.endswith(".texts") and not value.any():
            continue
        digest.update(f"{name} {value.dtype} {tuple(value.shape)};".encode())
        flat = value.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    digest.update(to_json([state.attached, state.memory]).encode())
    return digest.hexdigest()


def present(state: EditState, journal: Journal) -> EditState | None:
    """Return a state with `attached` as the journal's end has it; None if the state was changed."""
    either = (state._replace(attached=attached) for attached in (True, False))
    return next((s for s in either if journal.has_hash(len(journal) - 1, state_hash(s))), None)


def encode(content: StateFile) -> bytes:
    """Return the bytes of a state file.

    Raises:
        ValueError: If a value is not finite, `memory` is not JSON, or the header would be too long.
    """
    from safetensors.torch import save

    _check_finite(content.state)
    metadata = {
        "format_version": str(FORMAT_VERSION),
        "entry_id": str(content.entries[-1].id),
        "entries": "\n".join(entry.line for entry in content.entries),
        "state_hash": content.entries[-1].state_hash,
        "attached": to_json(content.state.attached),
        "memory": to_json(content.state.memory),
        "config": to_json(content.config.to_json()),
    }
    metadata["metadata_hash"] = _metadata_hash(metadata)
    length = sum(map(len, metadata.values()))
    if 2 * length > _MAX_HEADER:  # JSON in JSON: its quotation marks are escaped
        raise ValueError(
            f"what is kept beside the tensors must be below {_MAX_HEADER // 2} bytes; got {length}:"
            " edit in smaller batches; to move a long journal, copy its directory"
        )
    return save({name: v.detach().cpu() for name, v in content.state.learned.items()}, metadata)


def read_state(file: Path) -> StateFile:
    """Read a state file, and check all of its hashes.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, of another format, or holds tensors that no edit has.
    """
    from safetensors import SafetensorError, safe_open

    where = str(file)
    with open_regular(file):  # safetensors calls any file that it cannot open absent
        pass
    try:
        with safe_open(file, framework="pt") as stream:
            metadata = stream.metadata() or {}
            # Clones, for the stream's tensors are mapped from the file, which may be truncated.
            learned = {name: stream.get_tensor(name).clone() for name in stream.keys()}  # noqa: SIM118
    except (SafetensorError, LookupError, TypeError, ValueError, RuntimeError, OSError) as error:
        raise ValueError(f"{where} is damaged: {cut(error, 500)}") from None
    _check_metadata(metadata, where)
    lines = metadata["entries"].split("\n")
    entries = tuple(Entry.from_line(line, f"a journal entry in {where}") for line in lines)
    memory = parse_object(metadata["memory"], f"memory in {where}")
    state = EditState(learned, metadata["attached"] == "true", memory)
    if not state_hash(state) == metadata["state_hash"] == entries[-1].state_hash:
        raise ValueError(f"{where} is damaged: its tensors do not have the hash that it names")
    for name, value in learned.items():
        needed = "int64" if name.endswith(".texts") else "float32"
        if value.dtype != getattr(torch, needed):
            raise ValueError(f"{where} must hold {needed} as {short(name)}; got {value.dtype}")
    _check_finite(state)
    config = parse_object(metadata["config"], f"config in {where}")
    return StateFile(state, entries, KeptConfig.from_json(config, f"config in {where}"))


def _check_finite(state: EditState) -> None:
    """Raise ValueError if a learned value is NaN or infinite."""
    for name, value in state.learned.items():
        if not torch.isfinite(value).all():
            raise ValueError(f"every learned value must be finite; {name} holds NaN or an infinity")


def _check_metadata(metadata: Mapping[str, str], where: str) -> None:
    """Raise ValueError unless the metadata are intact, and of the present format."""
    if "format_version" not in metadata:
        raise ValueError(f"{where} must be a state of baft_easyedit; its metadata are not of one")
    if metadata["format_version"] != str(FORMAT_VERSION):
        raise ValueError(
            f"{where} must have format_version {FORMAT_VERSION}; got "
            f"{short(metadata['format_version'])}: use a version of baft_easyedit that knows it"
        )
    if not {*_KEYS} <= {*metadata} or _metadata_hash(metadata) != metadata.get("metadata_hash"):
        raise ValueError(f"{where} is damaged: its metadata do not have the hash that they name")


def _metadata_hash(metadata: Mapping[str, str]) -> str:
    """Return the SHA-256 of all metadata but the hash itself."""
    return hashlib.sha256(to_json([metadata[key] for key in _KEYS]).encode()).hexdigest()
