"""Find EasyEdit, say which generation it is, and import it with what that generation needs.

Two generations are supported: "current" (a clone of 2026) and "pypi" (easyeditor 0.0.1.dev0 of
2023). EasyEdit's files are never changed; the imported package is put right in memory only
(`compat.py`, `placeholders.py`).
"""

import importlib
import importlib.metadata
import importlib.util
import logging
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Literal

import numpy as np
import torch

from baft_easyedit.easyedit.compat import repair
from baft_easyedit.easyedit.placeholders import missing_vision_packages, vision_placeholders
from baft_easyedit.files.paths import read_text

logger = logging.getLogger(__name__)

HOME_VARIABLE = "EASYEDIT_HOME"
URL = "https://github.com/zjunlp/EasyEdit"
COMMIT = "14cea8245f06715684592ab55184939b99d70784"
"""The commit of the current generation that this package is tested with."""
WITH_IMPORTS = "pip install '.[easyedit]' in a checkout of baft_easyedit"
"""How to get what EasyEdit imports at top level, beside torch and transformers."""
HOW_TO_GET = (
    "Get it in one of two ways: (1) the current one: git clone "
    f"{URL} (tested: commit {COMMIT[:7]}) and set {HOME_VARIABLE} to that "
    "directory; (2) the old release: pip install --no-deps easyeditor==0.0.1.dev0. Both also need "
    f"what they import: {WITH_IMPORTS}"
)

Generation = Literal["current", "pypi"]


@dataclass(frozen=True)
class Host:
    """An EasyEdit that was found."""

    generation: Generation
    """`current`: restores edits itself, runs on a CPU; `pypi`: easyeditor 0.0.1.dev0."""
    path: Path
    """The `easyeditor` package directory."""
    version: str
    """Release, or git commit, or `unknown`."""


def find_host() -> Host:
    """Find EasyEdit without importing it.

    It is the clone named by the environment variable EASYEDIT_HOME; else the `easyeditor` that is
    imported already; else the one that can be imported.

    Raises:
        ImportError: If there is none, EASYEDIT_HOME names something else, another EasyEdit is
            imported already, or it is of neither supported generation.
    """
    imported = sys.modules.get("easyeditor")
    home = os.environ.get(HOME_VARIABLE)
    if home:
        package = Path(home).expanduser().resolve() / "easyeditor"
        if not (package / "__init__.py").is_file():
            raise ImportError(
                f"{HOME_VARIABLE} must name a clone of EasyEdit, a directory that holds "
                f"easyeditor/; got {home!r}. {HOW_TO_GET}"
            )
        if imported is not None and _package_directory(imported) != package:
            raise ImportError(
                f"{HOME_VARIABLE} is {home!r}, but another easyeditor is imported already, from "
                f"{_package_directory(imported)}: call register() before importing easyeditor"
            )
        return _describe(package)
    if imported is not None:
        return _describe(_package_directory(imported))
    spec = importlib.util.find_spec("easyeditor")
    if spec is None or spec.origin is None:
        raise ImportError(f"EasyEdit is not installed. {HOW_TO_GET}")
    return _describe(Path(spec.origin).parent.resolve())


def load_host() -> Host:
    """Import EasyEdit, once, and put right what does not work with the installed libraries.

    The state of the random number generators, environment variables and the logging set-up, which
    EasyEdit changes when it is imported, are put back.

    Raises:
        ImportError: As `find_host`; or if a package that EasyEdit needs is missing.
    """
    host = find_host()
    imported = sys.modules.get("easyeditor")
    if imported is not None and hasattr(imported, "_baft_host"):
        return imported._baft_host
    if imported is None:
        logger.info("importing EasyEdit (%s) from %s", host.generation, host.path)
        with _process_state_kept(), vision_placeholders(missing_vision_packages()):
            _import_easyeditor(host)
    repair(host.generation)
    sys.modules["easyeditor"].__dict__["_baft_host"] = host
    return host


def loaded_generation() -> Generation:
    """Return the generation of the imported EasyEdit; `current` if none is imported."""
    host: Host | None = getattr(sys.modules.get("easyeditor"), "_baft_host", None)
    return host.generation if host is not None else "current"


def _package_directory(module: ModuleType) -> Path:
    """Return the directory of an imported package."""
    return Path(module.__file__ or "").parent.resolve()


def _describe(package: Path) -> Host:
    """Tell generation and version of an `easyeditor` directory from its files."""
    editors = package / "editors"
    utils, editor = (
        read_text(file) if file.is_file() else ""
        for file in (editors / "utils.py", editors / "editor.py")
    )
    if "def restore_after_edit" in utils:
        return Host("current", package, _version(package))
    # The release passes `keep_original_weight` on to the methods; later commits dropped it, until
    # `restore_after_edit` came.
    if "keep_original_weight=keep_original_weight" in editor:
        return Host("pypi", package, _version(package))
    raise ImportError(
        f"EasyEdit at {package} is of a generation that is not supported: it has neither "
        "restore_after_edit (commits since 2026) nor the keep_original_weight of release "
        f"0.0.1.dev0. {HOW_TO_GET}"
    )


def _version(package: Path) -> str:
    """Return the git commit of a clone, or the version of an installed release."""
    if (package.parent / ".git").exists():
        return git(package.parent, "rev-parse", "--short", "HEAD") or "unknown"
    found = importlib.metadata.distributions(name="easyeditor", path=[str(package.parent)])
    return next((distribution.version for distribution in found), "unknown")


def git(directory: Path, *arguments: str) -> str | None:
    """Return the output of a git command in a directory; None if the command fails."""
    command = ["git", "-c", "safe.directory=*", "-C", str(directory), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _import_easyeditor(host: Host) -> None:
    """Import the package from its directory, leaving `sys.path` as it is."""
    sys.path.insert(0, str(host.path.parent))
    try:
        importlib.import_module("easyeditor")
    except ModuleNotFoundError as error:
        raise ImportError(
            f"EasyEdit at {host.path} needs the package {error.name!r}, which is not "
            f"installed: {WITH_IMPORTS}"
        ) from error
    finally:
        sys.path.remove(str(host.path.parent))


@contextmanager
def _process_state_kept() -> Iterator[None]:
    """Put back what importing EasyEdit changes: random states, environment, logging."""
    is_cuda_used = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    devices = range(torch.cuda.device_count() if is_cuda_used else 0)
    states = np.random.get_state(), random.getstate()
    environment = dict(os.environ)
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        np.random.set_state(states[0])
        random.setstate(states[1])
        os.environ.clear()
        os.environ.update(environment)
        root.setLevel(level)
        root.handlers[:] = handlers
        # EasyEdit relies on the root logger's level for its logs/run.log: give it to its loggers.
        logging.getLogger("easyeditor").setLevel(logging.INFO)
