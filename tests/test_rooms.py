"""Rooms of the package import downwards only, and only the bridge imports EasyEdit."""

import ast
from pathlib import Path

import pytest

import baft_easyedit

ROOMS = [
    "files",
    "method",
    "model",
    "hparams",
    "gguf",
    "generation",
    "facts",
    "training",
    "storage",
    "engines",
    "editor",
    "theorem",
    "harness",
    "easyedit",
    "bench",
    "demo",
    "speed",
    "serving",
    "page",
    "cli",
    "__main__",
]
"""The lowest first."""

PACKAGE = Path(baft_easyedit.__file__).parent


def imports(file):
    """The names of all modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room_of(parts):
    return Path(parts[0]).stem if parts else ""


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_downwards_only(room):
    files = [f for f in PACKAGE.rglob("*.py") if room_of(f.relative_to(PACKAGE).parts) == room]
    assert files
    above = set(ROOMS[ROOMS.index(room) + 1 :])
    for file in files:
        for name in imports(file):
            if name.startswith("baft_easyedit."):
                assert name.split(".")[1] not in above, f"{file.name} imports {name}"


def test_every_module_is_in_a_room():
    found = {room_of(f.relative_to(PACKAGE).parts) for f in PACKAGE.rglob("*.py")}
    assert found - {"__init__"} == set(ROOMS)


def test_only_the_bridge_imports_easyedit():
    for file in PACKAGE.rglob("*.py"):
        if room_of(file.relative_to(PACKAGE).parts) != "easyedit":
            assert not any(name.split(".")[0] == "easyeditor" for name in imports(file)), file
