import importlib.util
import json
from pathlib import Path

import pytest

from baft_easyedit.files.reading import parse_json, read_yaml, taken

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"{", "here must be JSON, and is not: Expecting"),
        (b"\xff", "here must be JSON, and is not: .*codec"),
        ("9" * 5000, "here must be JSON, and is not: Exceeds the limit"),
        ("[" * 100_000, "here must be JSON, and is not: maximum recursion"),
        ("[" * 101 + "]" * 101, "here must be nested at most 100 deep"),
    ],
)
def test_what_is_not_json_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_json(text, "here")


def test_nan_is_read_where_it_is_allowed():
    assert parse_json('[NaN, {"a": 1}]', "here")[1] == {"a": 1}
    with pytest.raises(ValueError, match="here must be JSON, and is not: NaN is no JSON number"):
        parse_json("[NaN]", "here", is_strict=True)


@pytest.mark.parametrize(
    "text",
    ["a: [", "a: !!timestamp x", "a: !!int ''", "a: !!bool x", "a: 2001-99-99", "a: *b", "{[]: 1}",
     "a: &a [*a]",
     "[" * 5000, "a: !!python/object/apply:os.system ['touch canary']", "a: !!python/module:os",
     "--- a\n--- b", "a: \x00", "a: 1\na: 2", "a: {b: [{c: 1, 'c': 2}]}", "a: 0x" + "f" * 6000,
     'a: "\\ud800"', '"\\ud800": 1', "a: *" + "long" * 9000, "a: !" + "long" * 9000 + " 1"],
)  # fmt: skip
def test_what_is_not_plain_yaml_is_refused_and_not_executed(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "it.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"it\.yaml must be plain YAML, and is not: "):
        read_yaml(tmp_path / "it.yaml", "settings")
    assert [file.name for file in tmp_path.iterdir()] == ["it.yaml"]


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        (b"\xff\xfe\x00", ValueError, "must be plain YAML"),
        (b"- 1", TypeError, r"must hold a mapping of settings; got \[1\]"),
        (b"1: 2", TypeError, r"must hold a mapping of settings; got \{1: 2\}"),
        (b"a: " + b"x" * 70_000, ValueError, "must have at most 65,536 bytes"),
    ],
)  # fmt: skip
def test_yaml_of_another_shape_is_refused(text, error, message, tmp_path):
    (tmp_path / "it.yaml").write_bytes(text)
    with pytest.raises(error, match=message):
        read_yaml(tmp_path / "it.yaml", "settings")


def test_doubled_key_is_refused_where_it_matters():
    with pytest.raises(ValueError, match="here must be JSON, and is not: the key 'b' comes twice"):
        parse_json('{"a": {"b": 1, "b": 2}}', "here", is_strict=True)
    assert parse_json('{"b": 1, "b": 2}', "here") == {"b": 2}


def test_message_about_yaml_is_short(tmp_path):
    for text in ("a: *" + "long" * 9000, "- " + "long" * 9000, "a: !" + "long" * 9000 + " 1"):
        (tmp_path / "it.yaml").write_text(text)
        with pytest.raises((ValueError, TypeError), match=r"it\.yaml") as error:
            read_yaml(tmp_path / "it.yaml", "settings")
        assert len(str(error.value)) < 1000


def test_values_are_taken_by_type():
    assert taken({"a": None}, "a", (int, type(None)), "here") is None
    with pytest.raises(ValueError, match="here must have the key 'a', and has not"):
        taken({}, "a", int, "here")
    with pytest.raises(ValueError, match="here must have a int or null as 'a'; got bool"):
        taken({"a": True}, "a", (int, type(None)), "here")


def test_damaged_files_are_read_rightly_or_refused():
    spec = importlib.util.spec_from_file_location("fuzz", ROOT / "scripts/fuzz_readers.py")
    fuzz = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fuzz)
    counts, findings = fuzz.run(170, seed=1)
    assert findings == []
    assert len(counts) == 17
    assert all(outcomes.total() == 10 for outcomes in counts.values())
    assert json.dumps(counts)
