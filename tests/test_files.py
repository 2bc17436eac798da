"""Files that users name: what is no file, or no JSON or YAML, is refused in a short message."""

import errno
import importlib
import os
import re
import stat
from pathlib import Path

import pytest

from baft_easyedit import BaFTHyperParams
from baft_easyedit.bench import store
from baft_easyedit.bench.config import read_config
from baft_easyedit.bench.data import load_dataset
from baft_easyedit.files.messages import MAX_MESSAGE, cut, short
from baft_easyedit.files.paths import check_own, expanded, open_regular, read_regular, read_text
from baft_easyedit.files.reading import parse_json, read_yaml, taken
from baft_easyedit.files.resources import model_location
from baft_easyedit.files.writing import directory_made_whole, written_whole
from baft_easyedit.hparams import read_hparams
from baft_easyedit.storage.journal import read_lines
from baft_easyedit.storage.lock import LOCK, DirectoryLock
from baft_easyedit.storage.state import read_state
from baft_easyedit.training.requests import EditRequest, as_requests
from tests.special_files import make_special

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "baft_easyedit"
READERS = {
    "state": read_state,
    "journal": read_lines,
    "hparams": read_hparams,
    "bench": read_config,
    "record of a run": store.read_json,
    "texts": read_text,
    "requests": lambda file: load_dataset("requests", file),
}

# ---- paths


@pytest.mark.usefixtures("limited")
@pytest.mark.parametrize("kind", ["FIFO", "socket", "directory", "device"])
@pytest.mark.parametrize("reader", READERS)
def test_every_reader_refuses_what_is_no_file(tmp_path, kind, reader):
    file = tmp_path / "it.yaml"
    make_special(kind, file)
    with pytest.raises((ValueError, OSError), match=r"/it\.yaml"):
        READERS[reader](file)


def test_only_one_module_opens_files_that_others_wrote():
    own = {  # scratch files and files of the package or the system
        "bench/layouts.py", "bench/process.py", "speed/measure.py",
        "files/paths.py", "files/writing.py", "storage/directory.py",
    }  # fmt: skip
    opens = re.compile(
        r"\.read_text\(|\.read_bytes\(|(?<![\w.])open\(|\.open\((?!model)|json\.load\("
    )
    found = {
        file.relative_to(PACKAGE).as_posix()
        for file in PACKAGE.rglob("*.py")
        for line in file.read_text().splitlines()
        if opens.search(code := re.sub(r'"[^"]*"', '""', line))
        and not re.search(r"os\.open|`|log\.open|_history\.open|def open", code)
    }
    assert found <= own


def test_size_is_bounded(tmp_path):
    file = tmp_path / "it"
    file.write_bytes(b"x" * 11)
    assert read_regular(file, 11) == b"x" * 11
    with pytest.raises(ValueError, match="it must have at most 10 bytes; it has 11"):
        read_regular(file, 10)
    with pytest.raises(ValueError, match="must have the 0 bytes that it says; it has others"):
        read_regular("/proc/self/status")


def test_error_of_a_read_names_the_file(tmp_path):
    (tmp_path / "it").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="it must be UTF-8 text, and is not: "):
        read_text(tmp_path / "it")
    with pytest.raises(OSError, match=r"Input/output error: '.*it'"), open_regular(tmp_path / "it"):
        raise OSError(5, "Input/output error")


def test_link_is_not_written_through(tmp_path):
    (tmp_path / "victim").write_text("of value")
    (tmp_path / "it").symlink_to("victim")
    with pytest.raises(ValueError, match="it is a symbolic link, through which nothing is writ"):
        check_own(tmp_path / "it")
    check_own(tmp_path / "free")
    with written_whole(tmp_path / "it") as stream:
        stream.write(b"new")
    assert (tmp_path / "victim").read_text() == "of value"


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert expanded("~/a") == expanded("a") == tmp_path / "a"
    with pytest.raises(ValueError, match="a path must not be empty: name a file or directory"):
        expanded("")
    assert model_location("~/a") == str(tmp_path / "a")
    assert model_location("me/a-model") == "me/a-model"
    (tmp_path / "h.yaml").write_text("{model_name: '~/m', layers: [1]}")
    assert read_hparams("~/h.yaml").model_name == str(tmp_path / "m")
    (tmp_path / "r.json").write_text('[{"prompt": "a", "target_new": "b"}]')
    assert len(load_dataset("requests", "~/r.json").requests) == 1


# ---- writing


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_new_files_have_the_mode_of_any_new_file(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        store.write_json(tmp_path / "run/record.json", {})
        DirectoryLock(tmp_path).release()
    finally:
        os.umask(before)
    files = [tmp_path / "run/record.json", tmp_path / LOCK]
    assert [file.stat().st_mode & 0o777 for file in files] == [mode] * 2


def test_a_file_is_there_as_a_whole_or_not_at_all(tmp_path):
    file = tmp_path / "a/b"
    with written_whole(file) as stream:
        stream.write(b"first")
    with pytest.raises(OSError, match="disk full"), written_whole(file) as stream:  # noqa: PT012
        stream.write(b"half of the sec")
        raise OSError("disk full")
    assert file.read_bytes() == b"first"
    assert os.listdir(file.parent) == ["b"]


def test_directory_is_on_the_disk_with_all_that_is_in_it(tmp_path, monkeypatch):
    flushed, fsync = [], os.fsync

    def noted(descriptor):
        flushed.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    with directory_made_whole(tmp_path / "it", 1) as unfinished:
        (unfinished / "a").mkdir()
        (unfinished / "a/b").write_text("c")
    assert os.listdir(tmp_path) == ["it"]
    expected = [tmp_path / name for name in ("it", "it/a", "it/a/b")]
    assert sorted(flushed[:-1]) == sorted(path.stat().st_ino for path in expected)
    assert flushed[-1] == tmp_path.stat().st_ino  # last, after the rename


def test_directories_that_cannot_be_flushed_are_made_all_the_same(tmp_path, monkeypatch):
    fsync = os.fsync

    def refused(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refused)
    with directory_made_whole(tmp_path / "it", 1) as unfinished:
        (unfinished / "a").write_text("b")
    assert (tmp_path / "it/a").read_text() == "b"


# ---- JSON and YAML


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"{", "here must be JSON, and is not: Expecting"),
        (b"\xff", "here must be JSON, and is not: .*codec"),
        ("9" * 5000, "here must be JSON, and is not: Exceeds the limit"),
        ("[" * 100_000, "here must be JSON, and is not: maximum recursion"),
        ("[" * 101 + "]" * 101, "here must be nested at most 100 deep"),
        ("[NaN]", "here must be JSON, and is not: NaN is no JSON number"),
        ('{"a": {"b": 1, "b": 2}}', "here must be JSON, and is not: the key 'b' comes twice"),
    ],
)
def test_what_is_not_json_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_json(text, "here", is_strict=True)
    assert parse_json('[NaN, {"a": 1}]', "here")[1] == {"a": 1}
    assert parse_json("[" * 100 + "]" * 100, "here")


@pytest.mark.parametrize(
    "text",
    ["a: [", "a: !!timestamp x", "a: !!int ''", "a: !!bool x", "a: 2001-99-99", "a: *b", "{[]: 1}",
     "a: &a [*a]", "b: &b 1\na: *b", "a: *" + "long" * 9000, "a: !" + "long" * 9000 + " 1",
     "[" * 5000, "a: !!python/object/apply:os.system ['touch canary']", "a: !!python/module:os",
     "--- a\n--- b", "a: \x00", "a: 1\na: 2", "a: {b: [{c: 1, 'c': 2}]}", "a: 0x" + "f" * 6000,
     'a: "\\ud800"', '"\\ud800": 1', b"\xff\xfe\x00"],
)  # fmt: skip
def test_what_is_not_plain_yaml_is_refused_and_not_executed(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "it.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=r"it\.yaml must be plain YAML, and is not: ") as error:
        read_yaml(tmp_path / "it.yaml", "settings")
    assert len(str(error.value)) < 1000
    assert [file.name for file in tmp_path.iterdir()] == ["it.yaml"]


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("- 1", TypeError, r"must hold a mapping of settings; got \[1\]"),
        ("1: 2", TypeError, r"must hold a mapping of settings; got \{1: 2\}"),
        ("a: " + "[" * 100 + "]" * 100, ValueError, "must be nested at most 100 deep"),
        ("a: " + "x" * 70_000, ValueError, "must have at most 65,536 bytes"),
    ],
)
def test_yaml_of_another_shape_is_refused(text, error, message, tmp_path):
    (tmp_path / "it.yaml").write_text(text)
    with pytest.raises(error, match=message):
        read_yaml(tmp_path / "it.yaml", "settings")


def test_values_are_taken_by_type():
    assert taken({"a": None}, "a", (int, type(None)), "here") is None
    with pytest.raises(ValueError, match="here must have the key 'a', and has not"):
        taken({}, "a", int, "here")
    with pytest.raises(ValueError, match="here must have a int or null as 'a'; got bool"):
        taken({"a": True}, "a", (int, type(None)), "here")


def test_damaged_files_are_read_rightly_or_refused(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    counts, findings = importlib.import_module("fuzz_readers").run(220, seed=1)
    assert findings == []
    assert len(counts) == 22
    assert all(outcomes.total() == 10 for outcomes in counts.values())


# ---- messages

LONG = "long" * 20_000


@pytest.mark.parametrize(
    "value",
    [LONG, LONG.encode(), [LONG] * 1000, {LONG: [[[LONG]]] * 9}, 10**5000, -(10**5000), "\ud800"],
    ids=lambda value: type(value).__name__,
)
def test_value_is_shown_in_short(value):
    text = short(value)
    assert 0 < len(text) <= 200
    text.encode()
    for value in ("a", 3, None, [1, 2], {"a": 0.5}, (), b"x"):
        assert short(value) == repr(value)
    assert cut("a" * 50 + "b" * 50, 25) == "a" * 10 + " ... " + "b" * 10
    assert len(cut(LONG)) <= MAX_MESSAGE


@pytest.mark.parametrize(
    "use",
    [
        lambda: EditRequest(LONG, "b", subject=f"{LONG}s"),
        lambda: as_requests({LONG: 1}),
        lambda: as_requests({"prompt": [LONG] * 100, "target_new": "b"}),
        lambda: as_requests({"prompt": "a", "target_new": " " * 80_000}),
        lambda: BaFTHyperParams.from_dict({LONG: 1}),
        lambda: BaFTHyperParams("m", [1], gate=LONG),
        lambda: BaFTHyperParams("m", [1], rank=LONG),
        lambda: BaFTHyperParams("m", [1], seed=-(10**5000)),
        lambda: BaFTHyperParams.from_hparams(LONG),
    ],
)
def test_messages_are_short(use):
    with pytest.raises((ValueError, TypeError, FileNotFoundError)) as error:
        use()
    assert len(str(error.value)) <= MAX_MESSAGE
