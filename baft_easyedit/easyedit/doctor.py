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
from baft_easyedit.easyedit.model_path import host_model_path
from baft_easyedit.easyedit.plugin import register
from baft_easyedit.easyedit.tiny import DEPTH, save_tiny_llama
from baft_easyedit.hparams import BaFTHyperParams, scaled_layers

_LIBRARIES = ("torch", "transformers", "peft")


@dataclass(frozen=True)
class DoctorReport:
    """What the doctor found; `str()` is for people."""

    lines: tuple[str, ...]
    is_usable: bool
    """Whether EasyEdit is there, and an edit through it worked."""

    def __str__(self) -> str:
        return "\n".join(self.lines)


def doctor(with_edit: bool = True) -> DoctorReport:
    """Look at the installation, and make one edit of a tiny random model through EasyEdit.

    Args:
        with_edit: Make that edit; without, EasyEdit is only imported.
    """
    lines = [
        f"baft_easyedit {baft_easyedit.__version__}",
        f"python        {platform.python_version()}",
        *map(_version_line, _LIBRARIES),
    ]
    devices = torch.cuda.device_count()
    lines.append(f"cuda          {f'{devices} device(s)' if devices else 'not available'}")
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
    kind = "current, a clone" if host.generation == "current" else "the release of 2023, from PyPI"
    entry_points = "edit, edit(sequential_edit=True), batch_edit, edit_requests" + (
        ", normal_edit" if host.generation == "current" else ", edit_dataset"
    )
    lines = [
        f"EasyEdit      {kind}, version {host.version}",
        f"  from        {host.path}",
        f"  methods     {', '.join(methods)}",
        f"  BaFT, ReFT  in {entry_points}",
        f"  stood in    {', '.join(host.standins) or 'nothing'} (vision; not needed for text)",
    ]
    if host.generation == "pypi":
        lines.append(
            "  lacks       FT-M, WISE, GRACE, AlphaEdit, UltraEdit: for those, git clone "
            f"{URL} (tested: {COMMIT[:7]}) and set {HOME_VARIABLE}"
        )
    return lines


def _edit_line() -> str:
    """Edit a tiny random model through EasyEdit's `BaseEditor`, and say how it went.

    Raises:
        RuntimeError: If the edit was not learned, or not undone exactly.
    """
    from easyeditor import BaseEditor

    start = time.perf_counter()
    with _out_of_the_way() as directory:
        path = host_model_path(str(save_tiny_llama(directory)))
        hparams = BaFTHyperParams(
            model_name=path, layers=scaled_layers(DEPTH), device="cpu", lr=5e-2, num_steps=80
        )
        editor = BaseEditor.from_hparams(hparams)
        probe = editor.tok("The capital of Freedonia is", return_tensors="pt")
        with torch.no_grad():
            before = editor.model(**probe).logits
        metrics, _, _ = editor.edit_requests(
            [
                {
                    "prompt": "The capital of Freedonia is",
                    "target_new": "Oslo",
                    "ground_truth": "",
                    "locality": {},
                    "portability": {},
                }
            ],
            verbose=False,
            sequential_edit=False,
        )
        with torch.no_grad():
            undone = torch.equal(editor.model(**probe).logits, before)
    scores = [float(metrics[0][phase]["rewrite_acc"][0]) for phase in ("pre", "post")]
    if scores[1] <= scores[0] or not undone:
        raise RuntimeError(f"token accuracy {scores[0]:.2f} -> {scores[1]:.2f}, undone: {undone}")
    return (
        f"works: token accuracy {scores[0]:.2f} -> {scores[1]:.2f} on a tiny random Llama, then "
        f"undone bit for bit ({time.perf_counter() - start:.1f} s)"
    )


@contextmanager
def _out_of_the_way() -> Iterator[Path]:
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
            yield Path(directory)
        finally:
            os.chdir(here)
            for handler in log.handlers:
                if handler not in handlers:
                    handler.close()
            log.handlers[:] = handlers
