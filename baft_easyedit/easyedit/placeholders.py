"""Placeholders for vision packages, which EasyEdit imports but text editing never uses.

While EasyEdit is being imported, an import hook (`_Finder`) makes stand-in modules for missing
packages; afterwards, importing these fails as it did before. The names that EasyEdit imports from
a stand-in are classes that can be inherited from, and raise ImportError when they are called.
"""

import importlib.util
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import Any, NoReturn

VISION_PACKAGES = ("av", "cv2", "fairscale", "iopath", "qwen_vl_utils", "timm", "torchvision")
"""Packages that EasyEdit imports for its multimodal editors, by import name."""

_ASKED_BEFORE = ("transformers", "datasets", "peft", "accelerate", "sentence_transformers")
"""Libraries that look for vision packages themselves, and remember the answer."""

_MOVED_NAMES = (
    "apply_chunking_to_forward",
    "find_pruneable_heads_and_indices",
    "prune_linear_layer",
)


class _Unusable(type):
    """Metaclass of a stand-in module's attributes: classes to inherit from and nothing more."""

    def __call__(cls, *args: Any, **kwargs: Any) -> NoReturn:  # noqa: ARG002
        origin = cls.__mro__[-2]
        raise ImportError(
            f"{origin.__qualname__} needs the package {origin.__module__!r}, which is not "
            "installed. EasyEdit imports it for multimodal editors; text editing never needs it."
        )

    def __getattr__(cls, name: str) -> "_Unusable":
        return _unusable(f"{cls.__qualname__}.{name}")


def _unusable(path: str) -> _Unusable:
    """Make the stand-in of one attribute of a missing package.

    Raises:
        AttributeError: If it is a special one (`__x__`), by which libraries probe an object.
    """
    name = path.rpartition(".")[2]
    if name.startswith("__"):
        raise AttributeError(name)
    return _Unusable(name, (), {"__qualname__": path, "__module__": path.partition(".")[0]})


class _Finder(MetaPathFinder, Loader):
    """Import hook that makes stand-ins for all modules of some packages.

    Every attribute of a stand-in exists, and none can be used.
    """

    def __init__(self, packages: Sequence[str]) -> None:
        self.packages = packages

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:  # noqa: ARG002
        is_missing = name.split(".")[0] in self.packages
        return ModuleSpec(name, self, is_package=True) if is_missing else None

    def exec_module(self, module: Any) -> None:
        module.__getattr__ = lambda name: _unusable(f"{module.__name__}.{name}")


def missing_vision_packages() -> tuple[str, ...]:
    """Return the vision packages that are really not installed."""
    return tuple(name for name in VISION_PACKAGES if importlib.util.find_spec(name) is None)


def _ask_before() -> None:
    """Let other libraries look for the vision packages before there are stand-ins for them.

    They keep the answer for the life of the process; a stand-in must never count as the package.
    """
    for name in _ASKED_BEFORE:
        if importlib.util.find_spec(name) is not None:
            importlib.import_module(name)
    from transformers.utils import import_utils

    for name in dir(import_utils):
        words = name.split("_")
        if words[0] == "is" and words[-1] == "available" and set(words) & set(VISION_PACKAGES):
            getattr(import_utils, name)()


@contextmanager
def vision_placeholders(packages: Sequence[str]) -> Iterator[None]:
    """Let imports of missing vision packages, and of names that moved, succeed in this context.

    The release imports, for its vision models, names of `transformers.modeling_utils` that version
    5 moved to `transformers.pytorch_utils`, or dropped.
    """
    _ask_before()
    from transformers import modeling_utils, pytorch_utils

    lent = [name for name in _MOVED_NAMES if not hasattr(modeling_utils, name)]
    for name in lent:
        gone = _unusable(f"transformers.{name}")
        setattr(modeling_utils, name, getattr(pytorch_utils, name, gone))
    finder = _Finder(packages)
    sys.meta_path.append(finder)  # last: a real package always wins
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [n for n in sys.modules if n.split(".")[0] in packages]:
            del sys.modules[name]
        for name in lent:
            delattr(modeling_utils, name)
