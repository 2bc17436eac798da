"""Types of options for argparse, which calls them on a value; their errors name the option."""

import argparse
import os
from argparse import ArgumentTypeError
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from baft_easyedit.files.paths import expanded
from baft_easyedit.model.devices import check_device

DTYPES = ("float32", "float16", "bfloat16")


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Print the error, and exit with status 2."""
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def names(text: str) -> list[str]:
    """Read a comma-separated list."""
    found = [name.strip() for name in text.split(",") if name.strip()]
    if not found:
        raise ArgumentTypeError(f"must be a comma-separated list; got {text!r}")
    return found


def whole(least: int) -> Callable[[str], int]:
    """Return a function that reads a whole number of at least `least`."""

    def read(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least:
            raise ArgumentTypeError(f"must be a whole number of at least {least}; got {text!r}")
        return number

    return read


def counts(text: str) -> list[int]:
    """Read a comma-separated list of whole numbers of at least 1."""
    return [whole(1)(number) for number in names(text)]


def positive(text: str) -> float:
    """Read a number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise ArgumentTypeError(f"must be a number above 0; got {text!r}")
    return number


def device(text: str) -> int | str:
    """Read a CUDA device number or a device name; the device must be on this machine."""
    read = int(text) if text.isdecimal() else text
    try:
        check_device(read)
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from None
    return read


def existing(kind: str = "file or directory") -> Callable[[str], Path]:
    """Return a function that reads the path of an existing, readable `file` or `directory`."""

    def read(text: str) -> Path:
        path = _path(text, kind)
        if not path.exists():
            raise ArgumentTypeError(f"must be a {kind}; there is none at {text!r}")
        if not os.access(path, os.R_OK):
            raise ArgumentTypeError(f"must be readable; {text!r} is not: check its permissions")
        return path

    return read


def new(kind: str) -> Callable[[str], Path]:
    """Return a function that reads the path of a `file` or `directory` to write; it may exist."""

    def read(text: str) -> Path:
        found = path = _path(text, kind)
        while not os.path.lexists(found):
            found = found.parent
        if found != path and not found.is_dir():
            raise ArgumentTypeError(f"must lie in a directory; {str(found)!r} is a file")
        if not os.access(found, os.W_OK):
            raise ArgumentTypeError(
                f"must be a place to write to; got {text!r}, and {str(found)!r} cannot be "
                "written: give another"
            )
        return path

    return read


def _path(text: str, kind: str) -> Path:
    """Read a path; ArgumentTypeError if it is empty, or exists and is of another kind."""
    if not text:
        raise ArgumentTypeError(f"must be a {kind}, and is empty: name one")
    path = expanded(text)
    is_there = "directory" if path.is_dir() else "file"
    if path.exists() and is_there not in kind:
        raise ArgumentTypeError(f"must be a {kind}; {text!r} is a {is_there}")
    return path
