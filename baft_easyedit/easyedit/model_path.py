"""Paths from which EasyEdit loads the right classes.

`BaseEditor` chooses model and tokenizer classes by the first of a list of names that occurs
anywhere in the path: a Llama in `/data/gpt-runs/llama` is loaded as GPT-2. Where a model's path
would mislead it, EasyEdit gets a symbolic link with a fitting name in a temporary directory.
"""

import atexit
import re
import shutil
import tempfile
from importlib import import_module
from pathlib import Path

from baft_easyedit.files.paths import read_regular
from baft_easyedit.files.reading import parse_object
from baft_easyedit.gguf.smollm2 import ready_location

_FAMILIES = (
    "t5", "chatglm-api", "gpt-3.5", "gpt", "llama", "baichuan", "chatglm", "internlm", "qwen2",
    "qwen3", "qwen", "mistral",
)  # fmt: skip
"""Names of model families, in the order in which EasyEdit looks for them in a path."""


def host_model_path(path: str) -> str:
    """Return a path from which EasyEdit loads a local model with the right classes.

    Returns:
        The absolute path itself if EasyEdit reads it rightly, else a link to it in a new temporary
        directory that lives as long as the process. A Hugging Face name is returned as it is if it
        holds a family that EasyEdit knows; else (such as Gemma's) the model is downloaded, and its
        directory treated like any other.

    Raises:
        ValueError: If every temporary directory's name would mislead EasyEdit, or the model's
            config.json is no JSON object.
        OSError: If a model cannot be downloaded.
    """
    directory = Path(ready_location(path))
    if not directory.is_dir():
        if _family_in(path) is not None:
            return path
        directory = Path(import_module("huggingface_hub").snapshot_download(path))
    directory = directory.absolute()
    family = _family_of_model(directory)
    if _family_in(str(directory)) == family:
        return str(directory)
    leaf = re.sub("|".join(map(re.escape, _FAMILIES)), "x", directory.name.lower())
    link = _safe_directory() / f"{family}-{leaf}"
    if _family_in(str(link)) != family:
        raise ValueError(
            f"the temporary directory {link.parent} has the name of a model family in its path, "
            f"by which EasyEdit would take {path!r} for another model: set TMPDIR to another one"
        )
    link.symlink_to(directory, target_is_directory=True)
    return str(link)


def _family_in(path: str) -> str | None:
    """Return the family that EasyEdit reads from a path."""
    return next((name for name in _FAMILIES if name in path.lower()), None)


def _family_of_model(directory: Path) -> str:
    """Return the family whose classes suit a model: its own, or `llama`, with the Auto classes."""
    file = directory / "config.json"
    text = read_regular(file) if file.is_file() else "{}"
    config = parse_object(text, str(file), is_strict=False)  # models have infinities in theirs
    own = {"t5": "t5", "gpt2": "gpt", "qwen2": "qwen2", "qwen3": "qwen3", "mistral": "mistral"}
    return own.get(str(config.get("model_type")), "llama")


def _safe_directory() -> Path:
    """Make a directory for the life of the process, whose name holds no family by chance."""
    while True:
        directory = Path(tempfile.mkdtemp(prefix="easyedit-"))
        atexit.register(shutil.rmtree, directory, ignore_errors=True)
        if _family_in(directory.name) is None:  # some names have a "t5" in their random part
            return directory
