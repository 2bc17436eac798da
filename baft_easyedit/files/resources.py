"""Find the files that come with the package, in a checkout and once installed; merge settings."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from baft_easyedit.files.messages import cut, short
from baft_easyedit.files.paths import expanded
from baft_easyedit.files.reading import did_you_mean

BUNDLED_MODEL = "bundled"
REAL_MODEL = "smollm2"
"""Name of the model that `gguf.smollm2` converts into the user's cache."""
REAL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
"""SHA-256 of the GGUF file that `smollm2` is converted from."""
_REAL_FORM = 1
"""Version of the converted files; a new version gets a new directory."""


def hparams_root() -> Path:
    """Return the directory of the presets: `presets` once installed, `hparams` in a checkout."""
    package = Path(__file__).parent.parent
    installed = package / "presets"
    return installed if installed.is_dir() else package.parent / "hparams"


def hparams_file(path: str | Path) -> Path:
    """Find a YAML file of hyper-parameters.

    Args:
        path: A file, with or without `.yaml`; or the name of one that comes with the package,
            such as `BaFT/llama-2-7b` or `hparams/BaFT/llama-2-7b.yaml`.

    Raises:
        FileNotFoundError: If there is no such file; the message lists the package's own.
    """
    name = str(path) if str(path).endswith((".yaml", ".yml")) else f"{path}.yaml"
    root = hparams_root()
    own = (expanded(path), expanded(name))
    for candidate in (*own, root / name, root / name.removeprefix("hparams/")):
        if os.path.exists(candidate) and not os.path.isdir(candidate):
            return candidate
    known = presets()
    hint, names = did_you_mean(name.removesuffix(".yaml"), known), cut(", ".join(known), 1500)
    raise FileNotFoundError(
        f"no hyper-parameter file {short(str(path))}{hint}; the package brings: {names}"
    )


def presets() -> list[str]:
    """Return the names of the package's YAML files: settings for edits, and benchmarks."""
    root = hparams_root()
    return sorted(p.relative_to(root).with_suffix("").as_posix() for p in root.rglob("*.yaml"))


def has_hparams(name: str) -> bool:
    """Tell whether a YAML file of that name, such as `BaFT/llama-2-7b`, comes with the package."""
    return (hparams_root() / f"{name}.yaml").is_file()


def own_preset(model: str) -> str | None:
    """Return the preset made for the model `bundled` or `smollm2`; None for another model."""
    return {BUNDLED_MODEL: "facts-llama", REAL_MODEL: "smollm2"}.get(model)


def bundled_model_path() -> Path:
    """Return the directory of the bundled model and its tokenizer, for `from_pretrained`."""
    return Path(__file__).parent.parent / "facts" / "assets" / "facts-llama"


def cache_root() -> Path:
    """Return the package's directory in the user's cache, for files that can be made again."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
    return expanded(root) / "baft_easyedit"


def real_model_path() -> Path:
    """Return the directory of the model `smollm2`, which may not exist yet."""
    return cache_root() / f"smollm2-135m-instruct-llama-{REAL_SHA256[:12]}-{_REAL_FORM}"


def model_location(name: str) -> str:
    """Return the directory of the model for `bundled` or `smollm2`; any other name as it is.

    `~` at the beginning stands for the user's home.
    """
    own = {BUNDLED_MODEL: bundled_model_path, REAL_MODEL: real_model_path}
    return str(own[name]()) if name in own else os.path.expanduser(name)


def merged_settings(settings: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with some values replaced; nested mappings are merged key by key."""
    merged = dict(settings)
    for key, value in overrides.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merged_settings(merged[key], value) if both else value
    return merged
