"""Read a GGUF file's metadata, and refuse files that would not become the same model."""

import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from baft_easyedit.files.messages import short
from baft_easyedit.files.paths import open_regular
from baft_easyedit.files.reading import did_you_mean

LEAST = {"gguf": "0.16", "accelerate": "1.0"}
"""The oldest versions of packages; those of `gguf` before do not decode metadata."""
HOW_TO_GET = "pip install 'baft_easyedit[real]'"
ARCHITECTURES = ("gemma3", "gpt2", "llama", "qwen2", "qwen3")
"""Architectures that transformers reads and that can be edited; Mistral's files say `llama`."""

_UNREAD = ("rope_freqs.", "rope_factors_")
"""Beginnings of the names of tensors that transformers' reader ignores."""
_ROLES = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
"""Names of special tokens in transformers, and in GGUF."""


@dataclass(frozen=True)
class GGUFSource:
    """The description of a model in a GGUF file."""

    file: Path
    metadata: Mapping[str, Any] = field(repr=False)
    """Plain values by key, such as `general.architecture`."""
    shapes: Mapping[str, tuple[int, ...]] = field(repr=False)
    """Shapes of the tensors, by name."""

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the architecture."""
        return str(self.metadata.get("general.architecture"))

    @property
    def num_parameters(self) -> int:
        """Number of elements in all tensors."""
        return sum(int(np.prod(shape)) for shape in self.shapes.values())

    def tokenizer(self, name: str, default: Any = None) -> Any:
        """Return the value of `tokenizer.ggml.<name>`."""
        return self.metadata.get(f"tokenizer.ggml.{name}", default)

    @cached_property
    def vocab(self) -> dict[str, int]:
        """The ids of the tokens, in their order.

        Raises:
            ValueError: If there is no list of tokens, or the list repeats one.
        """
        tokens = self.tokenizer("tokens") or []
        found = {token: i for i, token in enumerate(tokens)}
        if len(found) < max(1, len(tokens)):
            what = "repeats one" if tokens else "has none"
            raise ValueError(f"tokenizer.ggml.tokens must be a list of tokens; {self.file} {what}")
        return found

    def token(self, id_name: str) -> str | None:
        """Return the token whose id is in `tokenizer.ggml.<id_name>`; None if that is not there.

        Raises:
            ValueError: If there is no token of that id.
        """
        number = self.tokenizer(id_name)
        if number is None:
            return None
        if not 0 <= number < len(self.vocab):
            raise ValueError(
                f"tokenizer.ggml.{id_name} must be below {len(self.vocab)}, the number of tokens; "
                f"{self.file} has {short(number)}"
            )
        return str(self.tokenizer("tokens")[number])

    @property
    def special_tokens(self) -> dict[str, str]:
        """Special tokens by transformers' names, such as `eos_token`."""
        found = {role: self.token(id_name) for role, id_name in _ROLES.items()}
        return {role: token for role, token in found.items() if token is not None}

    def tokens_of_type(self, kind: int) -> list[str]:
        """Return the tokens of one type."""
        types = self.tokenizer("token_type") or []
        return [token for token, its in zip(self.vocab, types, strict=False) if its == kind]


def read_gguf(file: Path) -> GGUFSource:
    """Read a GGUF file's metadata, and check that it can be converted.

    Raises:
        ImportError: If the package `gguf` or `accelerate` is missing, or `gguf` too old.
        ValueError: If it is no whole GGUF file, or its architecture or position encoding is not
            supported.
        OSError: If it cannot be read.
    """
    check_packages()
    from gguf import GGUFReader

    with open_regular(file):  # numpy would map any file
        pass
    try:
        reader = GGUFReader(file)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
        shapes = {t.name: tuple(map(int, t.shape)) for t in reader.tensors}
    # If a file is cut or damaged, numpy, struct and the reader itself raise almost anything.
    except Exception as error:
        raise ValueError(
            f"{file} must be a whole GGUF file; reading it failed ({type(error).__name__}: "
            f"{short(str(error))}): get it again"
        ) from error
    source = GGUFSource(file, metadata, shapes)
    _check_architecture(source)
    _check_rope(source)
    return source


def check_packages() -> None:
    """Raise ImportError unless the packages with which transformers reads GGUF files are there."""
    from packaging.version import Version

    for name, least in LEAST.items():
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found = "0"
        if Version(found) < Version(least):
            raise ImportError(
                f"a GGUF file needs the package {name!r} from version {least} on; "
                f"{found if found != '0' else 'none'} is installed: {HOW_TO_GET}"
            )


def _check_architecture(source: GGUFSource) -> None:
    """Raise ValueError unless transformers reads the architecture rightly."""
    if source.architecture not in ARCHITECTURES:
        raise ValueError(
            f"general.architecture must be one of {', '.join(ARCHITECTURES)}; {source.file} has "
            f"{short(source.architecture)}{did_you_mean(source.architecture, ARCHITECTURES)}"
        )


def _check_rope(source: GGUFSource) -> None:
    """Raise ValueError for scaled position encodings, which transformers' reader ignores."""
    kind = source.metadata.get(f"{source.architecture}.rope.scaling.type", "none")
    tensors = [name for name in source.shapes if name.startswith(_UNREAD)]
    if kind == "none" and not tensors:
        return
    raise ValueError(
        f"rope scaling is not supported, and without it the model would be another one; "
        f"{source.file} has {tensors[0] if tensors else f'rope.scaling.type {short(kind)}'}: use "
        "the model's original files"
    )
