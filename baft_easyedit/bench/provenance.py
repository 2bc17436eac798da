"""Where a run's numbers come from: hashes of model and data, versions, hardware, git state."""

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import baft_easyedit
from baft_easyedit.easyedit import find_host
from baft_easyedit.files.paths import open_regular
from baft_easyedit.gguf.smollm2 import ready_location

_PACKAGES = ("torch", "transformers", "peft", "accelerate", "numpy", "easyeditor")
_SAMPLE = 1 << 20
"""Bytes hashed at each end of a weight file too large to read whole."""
_LARGE = 1 << 30


def model_fingerprint(model: str) -> dict[str, str]:
    """Hash a model's configuration, tokenizer and weights.

    Args:
        model: Hugging Face name or directory, `bundled` or `smollm2`.

    Returns:
        `model` and `tokenizer`, hex digests. Of weight files above 1 GiB, size, beginning and end
        are hashed. For a model of the Hugging Face hub, the commit in the cache; for one that is
        not there yet, its name.
    """
    directory = Path(ready_location(model))
    if not directory.is_dir():
        commit = _cached_commit(model) or model
        return {"model": commit, "tokenizer": commit}
    files = sorted(file for file in directory.iterdir() if file.is_file())
    is_weights = {".safetensors", ".bin"}
    weights = [f for f in files if f.suffix in is_weights or f.name == "config.json"]
    tokenizer = [f for f in files if "token" in f.name or f.suffix == ".model"]
    return {"model": _hash_files(weights), "tokenizer": _hash_files(tokenizer)}


def _cached_commit(model: str) -> str | None:
    """Return the commit of a hub's model in the cache, the name of its snapshot's directory."""
    hub: Any = importlib.import_module("huggingface_hub")
    config = hub.try_to_load_from_cache(model, "config.json")
    return Path(config).parent.name if isinstance(config, str) else None


def _hash_files(files: list[Path]) -> str:
    """Hash names and contents of files."""
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with open_regular(file) as stream:
            if size > _LARGE:
                digest.update(stream.read(_SAMPLE))
                stream.seek(-_SAMPLE, os.SEEK_END)
            while block := stream.read(_SAMPLE):
                digest.update(block)
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that matter to a score."""
    found = {"python": platform.python_version(), "baft_easyedit": baft_easyedit.__version__}
    for name in _PACKAGES:
        if importlib.util.find_spec(name) is not None:
            found[name] = importlib.metadata.version(name)
    return found


def easyedit_version() -> dict[str, str]:
    """Return which EasyEdit runs the methods."""
    host = find_host()
    return {"generation": host.generation, "version": host.version}


def hardware() -> dict[str, Any]:
    """Return what the run is made on."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"machine": platform.machine(), "cpus": os.cpu_count(), "gpus": gpus}


def git_state() -> dict[str, Any] | None:
    """Return commit and cleanliness of the checkout this package runs from; None if installed."""
    root = Path(baft_easyedit.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        command = ["git", "-c", "safe.directory=*", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return None


def digest(content: Mapping[str, Any] | list[Any]) -> str:
    """Hash plain data."""
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
