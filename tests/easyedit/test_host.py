"""Finding and importing EasyEdit, and what it says when there is none."""

import importlib.util
import logging
import os
import random
import sys

import numpy as np
import pytest
import torch

from baft_easyedit.easyedit.host import HOME_VARIABLE, find_host, load_host, loaded_generation
from baft_easyedit.easyedit.placeholders import missing_vision_packages


def make_clone(directory, init="", utils="", editor=""):
    """Write a directory that looks like a clone of EasyEdit."""
    package = directory / "easyeditor"
    (package / "editors").mkdir(parents=True)
    (package / "__init__.py").write_text(init)
    (package / "editors" / "utils.py").write_text(utils)
    (package / "editors" / "editor.py").write_text(editor)
    return package


CURRENT = "def restore_after_edit(): ..."


def test_a_missing_easyedit_is_told_how_to_get(without_easyeditor, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="EasyEdit is not installed") as caught:
        find_host()
    for way in (HOME_VARIABLE, "git clone", "pip install --no-deps easyeditor==0.0.1.dev0"):
        assert way in str(caught.value)


def test_generations_are_told_by_their_files(without_easyeditor, monkeypatch, tmp_path):
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path))
    package = make_clone(tmp_path, utils=CURRENT)
    found = find_host()
    assert (found.generation, found.path, found.version) == ("current", package, "unknown")
    (package / "editors" / "utils.py").write_text("")
    (package / "editors" / "editor.py").write_text("f(keep_original_weight=keep_original_weight)")
    assert find_host().generation == "pypi"
    (package / "editors" / "editor.py").unlink()
    with pytest.raises(ImportError, match="of a generation that is not supported"):
        find_host()


def test_another_easyedit_imported_before_is_refused(without_easyeditor, monkeypatch, tmp_path):
    other = make_clone(tmp_path / "other", utils=CURRENT)
    make_clone(tmp_path / "home", utils=CURRENT)
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path / "home"))
    module = type(os)("easyeditor")
    module.__file__ = str(other / "__init__.py")
    sys.modules["easyeditor"] = module  # the fixture takes it away again
    with pytest.raises(ImportError, match="another easyeditor is imported already"):
        find_host()
    monkeypatch.delenv(HOME_VARIABLE)
    assert find_host().path == other


def test_a_package_that_easyedit_lacks_is_named(without_easyeditor, monkeypatch, tmp_path):
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path))
    make_clone(tmp_path, init="import no_such_package", utils=CURRENT)
    with pytest.raises(ImportError, match=r"needs the package 'no_such_package'.*pip install"):
        load_host()
    assert "easyeditor" not in sys.modules


def test_importing_keeps_random_states_and_environment(without_easyeditor, monkeypatch, tmp_path):
    init = (
        "import os, random, logging, numpy, torch\n"
        "random.seed(42); numpy.random.seed(42); torch.manual_seed(42)\n"
        "os.environ['CUDA_LAUNCH_BLOCKING'] = '1'\n"
        "logging.getLogger().setLevel(5)\n"
        "raise RuntimeError('stop here')"
    )
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path))
    monkeypatch.delenv("CUDA_LAUNCH_BLOCKING", raising=False)
    make_clone(tmp_path, init=init, utils=CURRENT)
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    with pytest.raises(RuntimeError, match="stop here"):
        load_host()
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == states[1:]
    assert "CUDA_LAUNCH_BLOCKING" not in os.environ
    assert logging.getLogger().level != 5


@pytest.mark.easyedit
def test_loading_twice_gives_the_same_host(host):
    assert load_host() is host
    assert loaded_generation() == host.generation
    assert not set(missing_vision_packages()) & set(sys.modules)
    assert importlib.util.find_spec("easyeditor") is not None
