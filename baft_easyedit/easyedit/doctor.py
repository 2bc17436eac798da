"""Say which EasyEdit is there, what works with it, and how to get what is missing."""

import contextlib
import importlib
import importlib.metadata
import io
import logging
import os
import platform
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

import baft_easyedit
from baft_easyedit.easyedit.base_editor import OUR_METHODS
from baft_easyedit.easyedit.host import COMMIT, HOME_VARIABLE, URL, Host
from baft_easyedit.easyedit.plugin import register
from baft_easyedit.hparams import BaFTHyperParams


@dataclass(frozen=True)
class DoctorReport:
    """What the doctor found; `str()` is for people."""

    lines: tuple[str, ...]
    is_usable: bool
    """Whether EasyEdit is there, and an edit through it worked."""

    def __str__(self) -> str:
        return "\n".join(self.lines)


def doctor(with_edit: bool = True) -> DoctorReport:
    """Look at the installation, and make one edit of the bundled model through EasyEdit.

    Args:
        with_edit: Make that edit; without, EasyEdit is only imported.
    """
    devices = torch.cuda.device_count()
    lines = [
        f"baft_easyedit {baft_easyedit.__version__}",
        f"python        {platform.python_version()}",
        *map(_version_line, ("torch", "transformers", "peft")),
        f"cuda          {f'{devices} device(s)' if devices else 'not available'}",
    ]
    try:
        host = register()
    except ImportError as error:
        return DoctorReport((*lines, f"EasyEdit      missing: {error}"), is_usable=False)
    lines += _host_lines(host)
    if not with_edit:
        return DoctorReport(tuple(lines), is_usable=True)
    try:
        outcome, works = _edit_line(), True
    # Whatever fails inside EasyEdit or its libraries is the finding that is asked for.
    except Exception as error:  # noqa: BLE001
        outcome, works = f"failed: {type(error).__name__}: {error}", False
    return DoctorReport((*lines, f"test edit     {outcome}"), is_usable=works)


def _version_line(name: str) -> str:
    """Return a library's name and version."""
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        version = "not installed"
    return f"{name:<13} {version}"


def _host_lines(host: Host) -> list[str]:
    """Describe an imported EasyEdit."""
    editor = importlib.import_module("easyeditor.editors.editor")
    methods = sorted(editor.ALG_DICT, key=lambda name: (name not in OUR_METHODS, name))
    is_current = host.generation == "current"
    kind = "current, a clone" if is_current else "the release of 2023, from PyPI"
    last = "normal_edit" if is_current else "edit_dataset"
    lines = [
        f"EasyEdit      {kind}, version {host.version}",
        f"  from        {host.path}",
        f"  methods     {', '.join(methods)}",
        f"  BaFT, ReFT  in edit, edit(sequential_edit=True), batch_edit, edit_requests, {last}",
        f"  stood in    {', '.join(host.standins) or 'nothing'} (vision; not needed for text)",
    ]
    if not is_current:
        lines.append(
            "  lacks       FT-M, WISE, GRACE, AlphaEdit, UltraEdit: for those, git clone "
            f"{URL} (tested: {COMMIT[:7]}) and set {HOME_VARIABLE}"
        )
    return lines


def _edit_line() -> str:
    """Edit the bundled model through EasyEdit's `BaseEditor`, and say how it went.

    Raises:
        RuntimeError: If the edit was not learned, or not undone exactly.
    """
    from easyeditor import BaseEditor

    start, prompt = time.perf_counter(), "The capital of Malta is"
    hparams = BaFTHyperParams.from_hparams("BaFT/facts-llama", device="cpu")
    with _out_of_the_way():
        editor = BaseEditor.from_hparams(hparams)
        probe = editor.tok(prompt, return_tensors="pt")
        with torch.no_grad():
            before = editor.model(**probe).logits
        metrics, _, _ = editor.edit_requests(
            [{"prompt": prompt, "target_new": "Oslo"}], verbose=False, sequential_edit=False
        )
        with torch.no_grad():
            undone = torch.equal(editor.model(**probe).logits, before)
    scores = [float(metrics[0][phase]["rewrite_acc"][0]) for phase in ("pre", "post")]
    learned = f"token accuracy {scores[0]:.2f} -> {scores[1]:.2f}"
    if scores[1] <= scores[0] or not undone:
        raise RuntimeError(f"{learned}, undone: {undone}")
    return (
        f"works: {learned} on the bundled model, then undone bit for bit "
        f"({time.perf_counter() - start:.1f} s)"
    )


@contextmanager
def _out_of_the_way() -> Iterator[None]:
    """Work in a temporary directory, without output: EasyEdit prints and writes ./logs."""
    log = logging.getLogger("easyeditor.editors.editor")
    handlers, here = list(log.handlers), Path.cwd()
    sink = io.StringIO()
    with (
        tempfile.TemporaryDirectory(prefix="easyedit-") as directory,
        contextlib.redirect_stdout(sink),
        contextlib.redirect_stderr(sink),
    ):
        os.chdir(directory)
        try:
            yield
        finally:
            os.chdir(here)
            for handler in set(log.handlers) - set(handlers):
                handler.close()
            log.handlers[:] = handlers
