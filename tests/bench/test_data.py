"""What holds for every kind of benchmark file: selection, notes, hashes, errors."""

import copy
import hashlib
import re
from random import Random

import pytest
from dataset_files import RECORDS, knowedit, records_of, request, write_records

from baft_easyedit.bench.data import load_dataset
from baft_easyedit.bench.data.files import FileHash
from baft_easyedit.training.requests import as_requests

JUNK = (None, "", "  ", 3, 1.5, True, [], [[]], [""], ["x"], {}, {"x": 1}, "x", "{}{}")


@pytest.fixture
def write(tmp_path):
    return lambda records, name="records.json": write_records(tmp_path, records, name)


@pytest.fixture
def load(write):
    """Load records given as Python values."""
    return lambda kind, records, **arguments: load_dataset(kind, write(records), **arguments)


def texts_of(requests):
    """All texts that EasyEdit joins or compares."""
    for r in requests:
        irrelevant = r.get("loc_prompt", [])
        yield from [r["prompt"], r["target_new"], r.get("rephrase_prompt", "x")]
        yield from [irrelevant] if isinstance(irrelevant, str) else irrelevant
        for probe in [*r["locality"].values(), *r["portability"].values()]:
            yield from [*probe["prompt"], *probe["ground_truth"]]


def is_well_formed(requests):
    """Whether requests have the promised shape, and the editor takes them."""
    as_requests(requests)
    probes = [p for r in requests for k in ("locality", "portability") for p in r[k].values()]
    return all(text and text == text.strip() for text in texts_of(requests)) and all(
        probe["prompt"]
        and len(probe["prompt"]) == len(probe["ground_truth"]) == len(probe["aliases"])
        and [aliases[0] for aliases in probe["aliases"]] == probe["ground_truth"]
        for probe in probes
    )


@pytest.mark.parametrize("kind", RECORDS)
def test_written_requests_are_read_back_equal(kind, load):
    requests = load(kind, records_of(kind)).requests
    assert load("requests", requests).requests == requests


@pytest.mark.parametrize("kind", RECORDS)
def test_any_change_of_a_record_is_read_or_refused_with_a_reason(kind, write):
    rng = Random(kind)
    reasons = []
    for _ in range(150):
        records = records_of(kind)
        _spoil(records, rng)
        path = write(records)
        try:
            requests = load_dataset(kind, path).requests
        except (ValueError, TypeError) as error:
            reasons.append(str(error))
        else:
            assert is_well_formed(requests)
    assert 0 < len(reasons) < 150
    assert all("records.json" in reason for reason in reasons)


def _spoil(node, rng):
    """Replace or delete one value somewhere inside nested records."""
    while True:
        key = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
        if not isinstance(node[key], dict | list) or not node[key] or rng.random() < 0.2:
            break
        node = node[key]
    if isinstance(node, dict) and rng.random() < 0.2:
        del node[key]
    else:
        node[key] = copy.deepcopy(rng.choice(JUNK))


def test_start_and_limit_select_records(load):
    records = [request(name) for name in ("France", "Spain", "Italy", "Malta")]
    chosen = load("requests", records, start=1, limit=2).requests
    assert [r["subject"] for r in chosen] == ["Spain", "Italy"]
    assert [r["case_id"] for r in chosen] == [1, 2]
    assert len(load("requests", records, start=1).requests) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"start": 2}, r"start must be in \[0, 1\] for requests; got 2"),
        ({"start": -1}, r"start must be in \[0, 1\] for requests; got -1"),
        ({"limit": 3}, r"limit must be in \[1, 2\] for requests from 0 on.*got 3"),
        ({"start": 1, "limit": 2}, r"limit must be in \[1, 1\] for requests from 1 on.*got 2"),
        ({"limit": 0}, r"limit must be in \[1, 2\].*got 0"),
    ],
)
def test_asking_for_records_that_are_not_there_is_an_error(load, arguments, message):
    with pytest.raises(ValueError, match=message):
        load("requests", records_of("requests"), **arguments)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("knowedit-zsre", "ZsRE-test-all.json"),
        ("wikidata-recent", "recent_test.json"),
        ("wikidata-counterfact", "test_cf.json"),
        ("wikibio", "wikibio-test-all.json"),
        ("convsent", "blender_test.json"),
    ],
)
def test_a_directory_stands_for_the_file_of_its_kind(kind, name, write, tmp_path):
    content = write(records_of(kind), name).read_bytes()
    (file,) = load_dataset(kind, tmp_path).files
    assert file == FileHash(name, hashlib.sha256(content).hexdigest(), len(content))


def test_missing_file_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"recent_test\.json; there is none at .*nowhere"):
        load_dataset("wikidata-recent", tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"a file; there is none at"):
        load_dataset("requests", tmp_path)


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (b"[{]", ValueError, r"bad\.json must be JSON, and is not: Expecting property name"),
        (b'["\xff\xfe"]', ValueError, r"bad\.json must be JSON, and is not: .*codec can't decode"),
        (b'{"prompt": "x"}', TypeError, r"bad\.json must hold a list of records; got dict"),
        (b"[]", ValueError, r"bad\.json must hold at least one record; got an empty list"),
        (b'["x"]', ValueError, r"bad\.json, record 0: Input should be .*; got 'x'"),
    ],
)
def test_files_of_another_shape_are_errors(tmp_path, content, error, message):
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    with pytest.raises(error, match=message):
        load_dataset("requests", path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"locality": {"Forgetfulness": [{"prompt": "x"}]}},
            r"locality\.Forgetfulness\.0\.ground_truth: Field required; got \{'prompt': 'x'\}",
        ),
        (
            {"portability": {"Reasoning": [{"prompt": "x", "ground_truth": [[]]}]}},
            r"portability\.Reasoning\.0\.ground_truth: a list of answers must not be empty; got",
        ),
        ({"prompt": "", "subject": None}, r"got .* \(and 1 more problems\)"),
    ],
)
def test_bad_records_are_errors_that_name_place_rule_and_value(load, change, message):
    records = [knowedit("France"), {**knowedit("Spain"), **change}]
    with pytest.raises(ValueError, match=r"^records\.json, record 1: .*" + message):
        load("wikidata-recent", records)


def test_answers_keep_the_first_alias_for_easyedit_and_all_for_us(load):
    portability = load("wikidata-recent", [knowedit("France")]).requests[0]["portability"]
    assert portability["reasoning"]["ground_truth"] == ["Italian", "Gualtieri"]
    assert portability["reasoning"]["aliases"] == [["Italian"], ["Gualtieri"]]
    assert portability["Logical_Generalization"]["ground_truth"] == ["yes"]
    assert portability["Logical_Generalization"]["aliases"] == [["yes", "it is"]]


def test_subject_outside_the_prompt_is_left_out_and_noted(load):
    records = [knowedit("France"), {**knowedit("Spain"), "subject": "Kingdom of Spain"}]
    dataset = load("wikidata-recent", records)
    assert [r.get("subject") for r in dataset.requests] == ["France", None]
    assert "subject left out, for it is not in the prompt: records [1]" in dataset.notes
    assert "no subject in 1 of 2 records" in dataset.notes


def test_repeated_prompts_are_noted_and_conflicts_told_apart(load):
    names = ("France", "Spain", "Italy", "France", "Spain", "France")
    targets = ("Rome", "Rome", "Rome", "Oslo", "Rome", "Bern")
    dataset = load("wikidata-recent", list(map(knowedit, names, targets)))
    assert [note for note in dataset.notes if "several" in note] == [
        "1 prompts are in several records with different targets: records 0, 3, 5",
        "1 prompts are in several records with the same target: records 1, 4",
    ]
    assert not any("several" in note for note in load("convsent", records_of("convsent")).notes)


def test_parts_that_records_lack_are_counted(load):
    bare = {**knowedit("Spain"), "portability": {"Reasoning": []}}
    del bare["rephrase"]
    dataset = load("wikidata-recent", [knowedit("France"), bare, bare])
    assert "rephrase_prompt" not in dataset.requests[1]
    assert dataset.requests[1]["portability"] == {}
    assert [note for note in dataset.notes if note.startswith("no ")] == [
        "no loc_prompt in 3 of 3 records",
        "no portability in 2 of 3 records",
        "no rephrase_prompt in 2 of 3 records",
    ]
    less = {**knowedit("Italy"), "portability": {"Subject_Aliasing": []}, "locality": {}}
    notes = load("wikidata-recent", [knowedit("France"), knowedit("Spain"), less]).notes
    assert "no locality in 1 of 3 records" in notes
    assert not any(re.search(r"portability\.|locality\.", note) for note in notes)
