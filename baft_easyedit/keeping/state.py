"""The format of a state file: safetensors whose metadata holds all else that belongs to a state.

Metadata keys: `format_version`; `entry_id` and `entries`, the id of the latest journal entry and
its line (after a save, all lines that the directory did not have); `state_hash`; `attached`;
`memory`; `config`; `metadata_hash`, over all the others.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from baft_easyedit.hooks import ModelEdit
from baft_easyedit.keeping.config import FORMAT_VERSION, READABLE_VERSIONS, KeptConfig
from baft_easyedit.keeping.files import parse_object, to_json
from baft_easyedit.keeping.journal import Entry
from baft_easyedit.keeping.version1 import converted
from baft_easyedit.learner import EditState

_MAX_HEADER = 100_000_000
"""Longest header that safetensors reads, in bytes."""
_DTYPES = {"F32": torch.float32}
"""What an edit is made of."""
_KEYS = ("format_version", "entry_id", "entries", "state_hash", "attached", "memory", "config")


@dataclass(frozen=True)
class StateFile:
    """The content of a state file."""

    state: EditState
    entries: tuple[Entry, ...]
    """The journal entry that the state is of, after those that were written with it."""
    config: KeptConfig
    is_converted: bool = False
    """Whether it was written in an older format: the state does not have the entry's hash then."""


def state_hash(state: EditState) -> str:
    """Return the SHA-256 of a state: names, dtypes, shapes and bytes, and what is not a tensor."""
    digest = hashlib.sha256()
    for name in sorted(state.learned):
        value = state.learned[name]
        digest.update(f"{name} {value.dtype} {tuple(value.shape)};".encode())
        digest.update(_bytes(value))
    digest.update(to_json([state.attached, state.memory]).encode())
    return digest.hexdigest()


def _bytes(value: Tensor) -> bytes:
    """Return a tensor's bytes."""
    flat = value.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes()


def check_finite(state: EditState) -> None:
    """Raise ValueError if a learned value is NaN or infinite."""
    for name, value in state.learned.items():
        if not torch.isfinite(value).all():
            raise ValueError(f"every learned value must be finite; {name} holds NaN or an infinity")


def encode(content: StateFile) -> bytes:
    """Return the bytes of a state file.

    Raises:
        ValueError: If a value is not finite, `memory` is not JSON, or it is all too long.
    """
    from safetensors.torch import save

    check_finite(content.state)
    assert state_hash(content.state) == content.entries[-1].state_hash
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
    learned = {name: value.detach().cpu() for name, value in content.state.learned.items()}
    return save(learned, metadata)


def read_state(file: Path) -> StateFile:
    """Read a state file, and check all of its hashes.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is damaged, of another format, or holds what no edit has.
    """
    data = file.read_bytes()
    metadata = _header(data, str(file)).get("__metadata__")
    content = _checked_metadata(metadata, str(file))
    tensors = _tensors(data, str(file))
    where = str(file)
    state = EditState(
        tensors,
        attached=content["attached"] == "true",
        memory=parse_object(content["memory"], f"memory in {where}"),
    )
    lines = content["entries"].split("\n")
    entries = tuple(Entry.from_line(line, f"a journal entry in {where}") for line in lines)
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
    with open(file, "rb") as stream:
        start = stream.read(8)
        length = int.from_bytes(start, "little")
        data = start + stream.read(min(length, _MAX_HEADER))
    metadata = _checked_metadata(
        _header(data, str(file), has_tensors=False).get("__metadata__"), str(file)
    )
    lines = metadata["entries"].split("\n")
    return tuple(Entry.from_line(line, f"a journal entry in {file}") for line in lines)


def _header(data: bytes, where: str, has_tensors: bool = True) -> dict[str, Any]:
    """Return the header of a safetensors file, once its sizes and dtypes are known to fit."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > min(_MAX_HEADER, len(data) - 8):
        raise ValueError(f"{where} is damaged: it ends within its header")
    header = parse_object(data[8 : 8 + length], f"the header of {where}")
    end = 0
    for name, tensor in header.items():
        if name == "__metadata__":
            continue
        dtype = tensor.get("dtype") if isinstance(tensor, dict) else None
        if not isinstance(dtype, str) or dtype not in _DTYPES:
            raise ValueError(f"{where} must hold float32 tensors; {name} is {dtype}")
        offsets = tensor.get("data_offsets")
        if not (isinstance(offsets, list) and all(type(o) is int for o in offsets)):
            raise ValueError(f"{where} is damaged: {name} has no place in it")
        end = max([end, *offsets])
    if has_tensors and len(data) != 8 + length + end:
        raise ValueError(
            f"{where} is damaged: it must have {8 + length + end} bytes, and has {len(data)}"
        )
    return header


def _checked_metadata(metadata: Any, where: str) -> dict[str, str]:
    """Return the metadata, once it is known to be whole and of this format."""
    if not isinstance(metadata, dict) or "format_version" not in metadata:
        raise ValueError(f"{where} must be a state of baft_easyedit; its metadata are not of one")
    if metadata["format_version"] not in map(str, READABLE_VERSIONS):
        raise ValueError(
            f"{where} must have format_version {READABLE_VERSIONS[0]} to {FORMAT_VERSION}; got "
            f"{metadata['format_version']!r}: use a version of baft_easyedit that knows it"
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
    """Return the tensors of a safetensors file."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return load(data)
    except SafetensorError as error:
        raise ValueError(f"{where} is damaged: {error}") from None


def check_fits(state: EditState, edit: ModelEdit, where: str) -> None:
    """Raise ValueError unless a state is one of an edit of this shape."""
    own = edit.state_dict()
    for name in sorted({*own, *state.learned}):
        found = [
            f"{tensors[name].dtype} {tuple(tensors[name].shape)}" if name in tensors else "nothing"
            for tensors in (own, state.learned)
        ]
        if found[0] != found[1]:
            raise ValueError(
                f"{name} must be {found[0]} for the layers, rank and gate of the edit on this "
                f"model; {where} holds {found[1]}"
            )
