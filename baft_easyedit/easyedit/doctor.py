"""The check of `baft-easyedit doctor`: which EasyEdit is found, what works, what is missing."""

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
from pathlib import Path

import torch

import baft_easyedit
from baft_easyedit.easyedit.host import COMMIT, HOME_VARIABLE, URL, Host
from baft_easyedit.easyedit.plugin import register
from baft_easyedit.hparams import OUR_METHODS, BaFTHyperParams


def doctor() -> tuple[str, bool]:
    """Inspect the installation, and make one edit of the bundled model through EasyEdit.

    Returns:
        A report for people; and whether EasyEdit was found and the edit worked.
    """
    devices = torch.cuda.device_count()
    found = {"baft_easyedit": baft_easyedit.__version__, "python": platform.python_version()}
    for name in ("torch", "transformers", "peft"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    found["cuda"] = f"{devices} device(s)" if devices else "not available"
    works = False
    try:
        found |= _described(register())
        found["test edit"], works = _edited(), True
    except ImportError as error:
        found["EasyEdit"] = f"missing: {error}"
    # Any failure inside EasyEdit or its libraries is a finding, to be reported.
    except Exception as error:  # noqa: BLE001
        found["test edit"] = f"failed: {type(error).__name__}: {error}"
    return "\n".join(f"{name:<13} {value}" for name, value in found.items()), works


def _described(host: Host) -> dict[str, str]:
    """Describe an imported EasyEdit."""
    methods = importlib.import_module("easyeditor.editors.editor").ALG_DICT
    is_current = host.generation == "current"
    kind = "current, a clone" if is_current else "the release of 2023, from PyPI"
    last = "normal_edit" if is_current else "edit_dataset"
    found = {
        "EasyEdit": f"{kind}, version {host.version}",
        "  from": str(host.path),
        "  methods": ", ".join((*OUR_METHODS, *sorted(methods.keys() - set(OUR_METHODS)))),
        "  BaFT, ReFT": f"in edit, edit(sequential_edit=True), batch_edit, edit_requests, {last}",
    }
    if not is_current:
        found["  lacks"] = (
            "FT-M, WISE, GRACE, AlphaEdit, UltraEdit: for those, git clone "
            f"{URL} (tested: {COMMIT[:7]}) and set {HOME_VARIABLE}"
        )
    return found


def _edited() -> str:
    """Edit the bundled model through EasyEdit's `BaseEditor`, and say how it went."""
    from easyeditor import BaseEditor

    start, prompt = time.perf_counter(), "The capital of Malta is"
    hparams = BaFTHyperParams.from_hparams("BaFT/facts-llama", device="cpu")
    with _out_of_the_way():
        editor = BaseEditor.from_hparams(hparams)
        probe = editor.tok(prompt, return_tensors="pt")
        before = editor.model(**probe).logits
        metrics, _, _ = editor.edit_requests(
            [{"prompt": prompt, "target_new": "Oslo"}], verbose=False, sequential_edit=False
        )
        undone = torch.equal(editor.model(**probe).logits, before)
    pre, post = (float(metrics[0][phase]["rewrite_acc"][0]) for phase in ("pre", "post"))
    learned = f"token accuracy {pre:.2f} -> {post:.2f}"
    if post <= pre or not undone:
        raise RuntimeError(f"{learned}, undone: {undone}")
    seconds = time.perf_counter() - start
    return f"works: {learned} on the bundled model, then undone bit for bit ({seconds:.1f} s)"


@contextmanager
def _out_of_the_way() -> Iterator[None]:
    """Work in a temporary directory, without output: EasyEdit prints and writes ./logs."""
    log = logging.getLogger("easyeditor.editors.editor")
    handlers, here, sink = list(log.handlers), Path.cwd(), io.StringIO()
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
