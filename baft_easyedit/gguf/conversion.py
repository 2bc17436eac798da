"""Write the model of a GGUF file as a Hugging Face directory, through transformers' own reader.

All supported versions of transformers read the directory alike, whichever wrote it. Weights are
dequantised, and written in fp32 unless another type is asked for: bf16 would round them once more.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from baft_easyedit.files.messages import short
from baft_easyedit.files.paths import expanded
from baft_easyedit.files.writing import directory_made_whole
from baft_easyedit.gguf.source import GGUFSource, read_gguf
from baft_easyedit.gguf.tokenizer import make_backend
from baft_easyedit.model.inspect import dtype_option

WEIGHTS = "model.safetensors"
_ROOM_BESIDE = 32 * 2**20
"""Bytes for tokenizer and configuration."""


def import_gguf(
    file: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Convert a GGUF file to a Hugging Face directory, which is there as a whole or not at all.

    The file's architecture must be one of `source.ARCHITECTURES`; the directory, which is returned,
    must be absent or empty; the dtype is that of the written weights.

    Raises:
        ImportError: If a package is missing or too old.
        ValueError: If the file holds what is not supported, or the directory holds something;
            nothing is written then.
        OSError: If the disk has too little room, or the file cannot be read.
    """
    source, target = read_gguf(expanded(file)), expanded(directory)
    backend = make_backend(source)
    check_new(target)
    needed = source.num_parameters * dtype.itemsize + _ROOM_BESIDE
    with directory_made_whole(target, needed) as partial:
        backend.save(str(partial / "tokenizer.json"))
        _write_json(partial / "tokenizer_config.json", _tokenizer_config(source))
        _write_json(partial / "generation_config.json", _generation_config(source))
        _write_model(source, partial, dtype)
    return target


def check_new(directory: Path) -> None:
    """Raise ValueError unless a directory is absent or empty."""
    if not os.path.lexists(directory):
        return
    if not directory.is_dir() or directory.is_symlink() or any(directory.iterdir()):
        raise ValueError(
            f"the directory must be new or empty; {directory} holds something: give another, or "
            "delete it"
        )


def _tokenizer_config(source: GGUFSource) -> dict[str, Any]:
    """Return the content of `tokenizer_config.json`."""
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **source.special_tokens,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    more = {
        "model_max_length": source.metadata.get(f"{source.architecture}.context_length"),
        "chat_template": source.metadata.get("tokenizer.chat_template"),
    }
    return config | {name: value for name, value in more.items() if value is not None}


def _generation_config(source: GGUFSource) -> dict[str, Any]:
    """Return the tokens with which generation begins, pads and ends."""
    special = source.special_tokens
    roles = special.keys() & {"bos_token", "pad_token"}
    ids: dict[str, Any] = {f"{role}_id": source.vocab[special[role]] for role in roles}
    ends = [source.token(name) for name in ("eos_token_id", "eot_token_id")]
    numbers = sorted({source.vocab[token] for token in ends if token is not None})
    if numbers:
        ids["eos_token_id"] = numbers[0] if len(numbers) == 1 else numbers
    return ids


def _write_model(source: GGUFSource, directory: Path, dtype: torch.dtype) -> None:
    """Write configuration and weights."""
    model, loading = _load(source, dtype)
    wrong = _wrong_tensors(model, loading)
    if wrong:
        raise ValueError(
            f"the tensors of {source.file} must be those of a {type(model).__name__}; "
            + "; ".join(f"{kind}: {short(names)}" for kind, names in wrong.items())
        )
    config = _portable(model.config.to_dict(), type(model).__name__, dtype)
    _write_json(directory / "config.json", config)
    _write_weights(model, directory / WEIGHTS)
    # The library makes files for their owner only.
    os.chmod(directory / WEIGHTS, (directory / "config.json").stat().st_mode)


def _wrong_tensors(model: Any, loading: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return, by kind of fault, the names of tensors that are not as the configuration says.

    Some versions of transformers silently accept tensors of another shape.
    """
    with torch.device("meta"):
        described = type(model)(model.config)
    shapes = {name: p.shape for name, p in described.named_parameters()}
    other = [name for name, p in model.named_parameters() if p.shape != shapes.get(name)]
    found = {
        "missing": list(loading["missing_keys"]),
        "unexpected": list(loading["unexpected_keys"]),
        "of another shape": [*map(str, loading["mismatched_keys"]), *other],
    }
    return {kind: names for kind, names in found.items() if names}


def _load(source: GGUFSource, dtype: torch.dtype) -> tuple[Any, Mapping[str, Any]]:
    """Load a file's model; return it and transformers' report on its tensors."""
    from transformers import AutoConfig, AutoModelForCausalLM

    place, name = str(source.file.parent), source.file.name
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            place,
            gguf_file=name,
            config=AutoConfig.from_pretrained(place, gguf_file=name),
            output_loading_info=True,
            **dtype_option(dtype),
        )
    # Metadata that do not fit the tensors make transformers raise almost anything.
    except Exception as error:
        raise ValueError(
            f"{source.file} could not be read as a {source.architecture} "
            f"({type(error).__name__}: {short(str(error))}): its metadata and tensors must be "
            "those that llama.cpp's converter writes"
        ) from error
    return loaded


def _portable(config: Mapping[str, Any], model_class: str, dtype: torch.dtype) -> dict[str, Any]:
    """Return a configuration that transformers 4 and 5 read alike, with the key names of both."""
    own = {key: value for key, value in config.items() if not key.startswith("_")}
    rope = own.get("rope_parameters") or {}
    if isinstance(rope.get("rope_theta"), float):
        own |= {"rope_theta": rope["rope_theta"], "rope_scaling": None}
    name = str(dtype).removeprefix("torch.")
    return own | {"architectures": [model_class], "dtype": name, "torch_dtype": name}


def _write_weights(model: Any, file: Path) -> None:
    """Write a model's weights; tied ones are written once."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    named = model.named_parameters()  # a tied one by its first name
    buffers = {name for name, _ in model.named_buffers()} & set(model.state_dict())
    tensors = {name: p.detach().contiguous() for name, p in named}
    tensors |= {name: model.get_buffer(name).contiguous() for name in buffers}
    try:
        save_file(tensors, file, {"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{file} could not be written: {error}") from error


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file."""
    text = json.dumps(content, indent=2, ensure_ascii=False, sort_keys=True)
    file.write_text(text + "\n", encoding="utf-8")
