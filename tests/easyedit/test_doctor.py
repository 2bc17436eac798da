"""What `baft-easyedit doctor` says."""

import os
from pathlib import Path

import pytest

from baft_easyedit import BaFTHyperParams
from baft_easyedit.easyedit.doctor import doctor


@pytest.mark.easyedit
def test_the_doctor_edits_and_leaves_nothing(host, capsys):
    report, is_usable = doctor()
    assert is_usable, report
    for part in (str(host.path), host.version, "BaFT, ReFT, ", "test edit     works"):
        assert part in report
    assert not Path("logs").exists()
    assert capsys.readouterr().out == ""


@pytest.mark.easyedit
def test_an_edit_that_is_not_learned_fails(host, monkeypatch):
    hparams = BaFTHyperParams.from_hparams("BaFT/facts-llama", device="cpu", lr=1e-9)
    monkeypatch.setattr(BaFTHyperParams, "from_hparams", lambda *args, **kwargs: hparams)
    assert "RuntimeError: token accuracy" in doctor()[0]


def test_a_missing_easyedit_is_told(without_easyeditor, monkeypatch, tmp_path):
    monkeypatch.setenv("EASYEDIT_HOME", str(tmp_path))
    report, is_usable = doctor()
    assert not is_usable
    assert "EasyEdit      missing: EASYEDIT_HOME must name a clone" in report
    assert os.environ["EASYEDIT_HOME"]
