import os
import re
import signal
from pathlib import Path

import pytest

from baft_easyedit import BaFTHyperParams
from baft_easyedit.bench import store
from baft_easyedit.bench.config import read_config
from baft_easyedit.bench.data import load_dataset
from baft_easyedit.bench.piqa import load_piqa
from baft_easyedit.files.paths import (
    check_own,
    expanded,
    open_own,
    open_regular,
    read_regular,
    read_text,
)
from baft_easyedit.files.reading import read_yaml
from baft_easyedit.files.resources import model_location
from baft_easyedit.hparams import read_hparams
from baft_easyedit.storage.journal import read_lines
from baft_easyedit.storage.state import read_entries, read_state
from tests.special_files import make_special

PACKAGE = Path(__file__).parent.parent / "baft_easyedit"
READERS = {
    "state": read_state,
    "entries": read_entries,
    "journal": read_lines,
    "yaml": lambda file: read_yaml(file, "settings"),
    "hparams": read_hparams,
    "hparams of BaFT": BaFTHyperParams.from_hparams,
    "bench": read_config,
    "record of a run": store.read_json,
    "texts": read_text,
    "requests": lambda file: load_dataset("requests", file),
    "zsre": lambda file: load_dataset("zsre", file),
    "piqa": load_piqa,
}


@pytest.fixture
def limited():
    """Ends a test that waits for ever."""
    signal.alarm(60)
    yield
    signal.alarm(0)


@pytest.mark.usefixtures("limited")
@pytest.mark.parametrize("kind", ["FIFO", "socket", "directory", "device"])
@pytest.mark.parametrize("reader", READERS)
def test_every_reader_refuses_what_is_no_file(tmp_path, kind, reader):
    file = tmp_path / "it.yaml"
    make_special(kind, file)
    if (kind, reader) == ("directory", "piqa"):
        pytest.skip("a directory is where its files are")
    with pytest.raises((ValueError, OSError), match=r"/it(\.yaml|-labels)"):
        READERS[reader](file)


@pytest.mark.usefixtures("limited")
def test_something_that_comes_in_the_place_of_a_file_is_refused(tmp_path, monkeypatch):
    file, regular = tmp_path / "it.yaml", os.stat(__file__)
    make_special("FIFO", file)
    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", lambda path: regular)
        with (
            pytest.raises(ValueError, match=r"it\.yaml must be a regular file; it is a FIFO"),
            open_regular(file),
        ):
            pass


def test_only_one_module_opens_files_that_others_wrote():
    # Scratch files, and files of the package or the system.
    own = {"bench/paper.py", "bench/process.py", "speed/measure.py"}
    opens = re.compile(
        r"\.read_text\(|\.read_bytes\(|(?<![\w.])open\(|\.open\((?!model)|json\.load\("
    )
    found = {
        file.relative_to(PACKAGE).as_posix()
        for file in PACKAGE.rglob("*.py")
        for line in file.read_text().splitlines()
        if opens.search(line)
        and not re.search(r"os\.open|\"|`|log\.open|_history\.open|def open", line)
    }
    assert found <= own


def test_size_is_bounded(tmp_path):
    file = tmp_path / "it"
    file.write_bytes(b"x" * 11)
    assert read_regular(file, 11) == b"x" * 11
    with pytest.raises(ValueError, match="it must have at most 10 bytes; it has 11"):
        read_regular(file, 10)
    os.truncate(file, 2**40)  # takes no room
    with pytest.raises(ValueError, match="it must have at most 536,870,912 bytes; it has 1,099,"):
        read_regular(file)
    with pytest.raises(ValueError, match="must have the 0 bytes that it says; it has others"):
        read_regular("/proc/self/status")


def test_text_that_is_not_utf8_is_refused(tmp_path):
    (tmp_path / "it").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="it must be UTF-8 text, and is not: "):
        read_text(tmp_path / "it")


def test_error_of_a_read_names_the_file(tmp_path):
    (tmp_path / "it").touch()
    with pytest.raises(OSError, match=r"Input/output error: '.*it'"), open_regular(tmp_path / "it"):
        raise OSError(5, "Input/output error")


def test_link_is_not_written_through(tmp_path):
    (tmp_path / "victim").write_text("of value")
    (tmp_path / "it").symlink_to("victim")
    for use in (check_own, lambda file: open_own(file, os.O_WRONLY)):
        with pytest.raises(ValueError, match="it is a symbolic link, through which nothing is wri"):
            use(tmp_path / "it")
    check_own(tmp_path / "free")
    os.close(open_own(tmp_path / "free", os.O_WRONLY | os.O_CREAT))


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert expanded("~/a") == expanded("a") == tmp_path / "a"
    assert model_location("~/a") == str(tmp_path / "a")
    assert model_location("me/a-model") == "me/a-model"
    (tmp_path / "h.yaml").write_text("{model_name: ~/m, layers: [1]}".replace("~/m", "'~/m'"))
    assert read_hparams("~/h.yaml").model_name == str(tmp_path / "m")
    (tmp_path / "r.json").write_text('[{"prompt": "a", "target_new": "b"}]')
    assert len(load_dataset("requests", "~/r.json").requests) == 1
