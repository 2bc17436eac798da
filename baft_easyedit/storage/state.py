"""The format of a state file: safetensors whose metadata holds all else that belongs to a state.

Metadata keys: `format_version`; `entry_id` and `entries`, the id of the latest journal entry and
its line, after all lines that the journal file did not have yet; `state_hash`; `attached`;
`memory`; `config`; `metadata_hash`, over all the others.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from baft_easyedit.files.messages import cut, short
from baft_easyedit.files.paths import open_regular, read_regular
from baft_easyedit.model.hooks import ModelEdit
from baft_easyedit.storage.config import FORMAT_VERSION, READABLE_VERSIONS, KeptConfig
from baft_easyedit.storage.files import parse_object, to_json
from baft_easyedit.storage.journal import Entry, Journal
from baft_easyedit.storage.older import converted
from baft_easyedit.training.learner import EditState

_MAX_HEADER = 100_000_000
"""Longest header that safetensors reads, in bytes."""
MAX_STATE = 2**31 + _MAX_HEADER
"""Most bytes of a state file."""
_KEYS = ("format_version", "entry_id", "entries", "state_hash", "attached", "memory", "config")


@dataclass(frozen=True)
class StateFile:
    """The content of a state file."""

    state: EditState
    entries: tuple[Entry, ...]
    """The journal entry that led to the state, after those that were written with it."""
    config: KeptConfig
    is_converted: bool = False
    """Whether the format was an older one: the state does not have the entry's hash then."""


def state_hash(state: EditState) -> str:
    """Return the SHA-256 of a state: names, dtypes, shapes and bytes, and what is not a tensor."""
    digest = hashlib.sha256()
    for name in sorted(state.learned):
        value = state.learned[name]
        digest.update(f"{name} {value.dtype} {tuple(value.shape)};".encode())
        flat = value.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    digest.update(to_json([state.attached, state.memory]).encode())
    return digest.hexdigest()


def is_after(state: EditState, journal: Journal, entry_id: int) -> bool:
    """Tell whether a state is that after an entry of a journal, bit for bit."""
    return journal.has_hash(entry_id, state_hash(state))


def present(state: EditState, journal: Journal) -> EditState | None:
    """Return a state as a journal ends with it, attached or not; None if it was changed."""
    either = (state._replace(attached=attached) for attached in (True, False))
    return next((s for s in either if is_after(s, journal, len(journal) - 1)), None)


def check_finite(state: EditState) -> None:
    """Raise ValueError if a learned value is NaN or infinite."""
    for name, value in state.learned.items():
        if not torch.isfinite(value).all():
            raise ValueError(f"every learned value must be finite; {name} holds NaN or an infinity")


def encode(content: StateFile) -> bytes:
    """Return the bytes of a state file.

    Raises:
        ValueError: If a value is not finite, `memory` is not JSON, or the file would be too large.
    """
    from safetensors.torch import save

    check_finite(content.state)
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
    data = save({name: v.detach().cpu() for name, v in content.state.learned.items()}, metadata)
    if len(data) > MAX_STATE:
        raise ValueError(
            f"an edit must have at most {MAX_STATE:,} bytes; it has {len(data):,}: use a smaller "
            "rank, or fewer layers"
        )
    return data


def read_state(file: Path) -> StateFile:
    """Read a state file, and check all of its hashes.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is damaged, of another format, or holds what no edit has.
    """
    where = str(file)
    data = read_regular(file, MAX_STATE)
    entries, content = _read_metadata(BytesIO(data), where)
    state = EditState(
        _tensors(data, where),
        attached=content["attached"] == "true",
        memory=parse_object(content["memory"], f"memory in {where}"),
    )
    if not state_hash(state) == content["state_hash"] == entries[-1].state_hash:
        raise ValueError(f"{where} is damaged: its tensors do not have the hash that it names")
    check_finite(state)
    config = parse_object(content["config"], f"config in {where}")
    is_old = content["format_version"] != str(FORMAT_VERSION)
    if is_old:
        state = state._replace(learned=converted(state.learned))
    return StateFile(state, entries, KeptConfig.from_json(config, f"config in {where}"), is_old)


def read_entries(file: Path) -> tuple[Entry, ...]:
    """Read the journal entries of a state file, without its tensors.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If its header is damaged, or of another format.
    """
    with open_regular(file) as stream:
        return _read_metadata(stream, str(file))[0]


def _read_metadata(stream: IO[bytes], where: str) -> tuple[tuple[Entry, ...], dict[str, str]]:
    """Read what is beside the tensors: the journal entries, and all metadata."""
    content = _checked_metadata(_read_header(stream, where).get("__metadata__"), where)
    lines = content["entries"].split("\n")
    entries = tuple(Entry.from_line(line, f"a journal entry in {where}") for line in lines)
    return entries, content


def _read_header(stream: IO[bytes], where: str) -> dict[str, Any]:
    """Read the header of a safetensors file: 8 bytes of its length, and JSON."""
    start = stream.read(8)
    length = int.from_bytes(start, "little")
    text = stream.read(length) if length <= _MAX_HEADER else b""
    if len(start) < 8 or len(text) < length:
        raise ValueError(f"{where} is damaged: it ends within its header")
    return parse_object(text, f"the header of {where}")


def _checked_metadata(metadata: Any, where: str) -> dict[str, str]:
    """Return the metadata, once they are known to be whole and of a readable format."""
    if not isinstance(metadata, dict) or "format_version" not in metadata:
        raise ValueError(f"{where} must be a state of baft_easyedit; its metadata are not of one")
    if metadata["format_version"] not in map(str, READABLE_VERSIONS):
        raise ValueError(
            f"{where} must have format_version {READABLE_VERSIONS[0]} to {FORMAT_VERSION}; got "
            f"{short(metadata['format_version'])}: use a version of baft_easyedit that knows it"
        )
    content: dict[str, Any] = {key: metadata.get(key) for key in _KEYS}
    missing = [key for key, value in content.items() if not isinstance(value, str)]
    if missing or _metadata_hash(content) != metadata.get("metadata_hash"):
        raise ValueError(f"{where} is damaged: its metadata do not have the hash that they name")
    return content


def _metadata_hash(metadata: Mapping[str, Any]) -> str:
    """Return the SHA-256 of all metadata but the hash itself."""
    return hashlib.sha256(to_json([metadata[key] for key in _KEYS]).encode()).hexdigest()


def _tensors(data: bytes, where: str) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, all of float32."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(data)
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise ValueError(f"{where} is damaged: {cut(error, 500)}") from None
    for name, value in tensors.items():
        if value.dtype != torch.float32:
            raise ValueError(f"{where} must hold float32 tensors; {short(name)} is {value.dtype}")
    return tensors


def check_fits(state: EditState, edit: ModelEdit, where: str) -> None:
    """Raise ValueError unless a state is one of an edit of this shape."""
    own = edit.state_dict()
    for name in sorted({*own, *state.learned}):
        expected, found = (
            f"{tensors[name].dtype} {tuple(tensors[name].shape)}" if name in tensors else "nothing"
            for tensors in (own, state.learned)
        )
        if expected != found:
            raise ValueError(
                f"{name} must be {expected} for the layers, rank and gate of the edit on this "
                f"model; {where} holds {found}"
            )
