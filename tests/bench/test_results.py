import json

import pytest
from synthetic import write_json, write_run

from baft_easyedit.bench.protocol import Protocol
from baft_easyedit.bench.results import gate_records, merge_results, read_run
from baft_easyedit.bench.scores import FIELD_SCORES

FEW = {"methods": ("BaFT", "+ss-w&lr"), "protocols": ("single", "batched-B2-T2"), "num_cases": 4}


@pytest.fixture
def run_dir(tmp_path):
    return write_run(tmp_path / "run", **FEW)


def test_run_is_read_with_its_results_and_their_protocols(run_dir):
    run = read_run(run_dir)
    assert run.info["seed"] == 0
    assert [(r.method, r.setting) for r in run.results] == [
        ("BaFT", Protocol(1, 1)),
        ("BaFT", Protocol(2, 2)),
        ("+ss-w&lr", Protocol(1, 1)),
        ("+ss-w&lr", Protocol(2, 2)),
    ]
    first = run.results[0]
    assert first.number("rewrite_acc") == first.values["rewrite_acc"]
    assert first.values["notes"] == ["scored in eval mode"]


def test_summary_of_before_lacks_the_fields_scores_and_is_read(run_dir):
    rows = json.loads((run_dir / "summary.json").read_text())
    new = [name for name in rows[0] if name.removesuffix("_se") in FIELD_SCORES]
    assert len(new) == 2 * len(FIELD_SCORES)
    kept = [{k: v for k, v in row.items() if k not in new and "harmonic" not in k} for row in rows]
    write_json(run_dir / "summary.json", kept)
    assert read_run(run_dir).results[0].number("specificity_acc") is None
    write_json(run_dir / "summary.json", [{**rows[0], "paraphrase_magnitude": -1.5}])
    with pytest.raises(ValueError, match=r"paraphrase_magnitude must be at least -1; got -1\.5"):
        read_run(run_dir)


def test_result_with_an_error_has_no_numbers(tmp_path):
    run_dir = write_run(tmp_path / "run", rows={"BaFT": {"error": "out of memory"}}, **FEW)
    failed, *_ = read_run(run_dir).results
    assert failed.error == "out of memory"
    assert failed.number("rewrite_acc") is None


@pytest.mark.parametrize("name", ["run.json", "summary.json", "config.yaml"])
def test_directory_that_is_no_finished_run_is_refused(run_dir, name):
    (run_dir / name).unlink()
    with pytest.raises(ValueError, match=rf"is not the directory of a finished run: .* {name}"):
        read_run(run_dir)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("run.json", [1], r"run\.json must be a mapping; got \[1\]; delete .*run"),
        ("run.json", {}, r"run\.json: schema must be given; got {} \(and 12 more .*; delete .*run"),
        ("run.json", {"schema": 99}, r"run\.json: schema must be 1; got 99 .*; delete .*run"),
        ("summary.json", {}, r"summary\.json must be a list; got {}; delete it"),
        ("summary.json", [], r"summary\.json must not be empty; got \[\]; delete it"),
        ("summary.json", ["BaFT"], r"summary\.json: 0 must be a mapping; got 'BaFT'; delete it"),
    ],
)
def test_files_of_another_form_are_refused(run_dir, name, content, message):
    write_json(run_dir / name, content)
    with pytest.raises(
        ValueError, match=f"{message}, and run the benchmark again, which makes it anew"
    ):
        read_run(run_dir)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": 3}, "method must be a text; got 3"),
        ({"n": None}, "n must be an integer; got None"),
        ({"rewrite_acc": 1.2}, "rewrite_acc must be at most 1; got 1.2"),
        ({"rewrite_acc_se": "x"}, "rewrite_acc_se must be a number; got 'x'"),
        ({"edit_time_s": -1}, "edit_time_s must be at least 0; got -1"),
        ({"locality_acc": float("nan")}, "locality_acc must be .*; got nan"),
    ],
)
def test_bad_row_is_refused(run_dir, fields, message):
    rows = json.loads((run_dir / "summary.json").read_text())
    write_json(run_dir / "summary.json", [rows[0], rows[1] | fields])
    with pytest.raises(ValueError, match=rf"summary\.json: 1\.{message}"):
        read_run(run_dir)
    if "rewrite_acc_se" in fields:  # which runs of before lack
        return
    del rows[1][next(iter(fields))]
    write_json(run_dir / "summary.json", rows)
    with pytest.raises(
        ValueError, match=rf"summary\.json: 1\.{next(iter(fields))} must be given; got"
    ):
        read_run(run_dir)


def test_cases_must_be_those_that_the_summary_counts(run_dir):
    first = read_run(run_dir).results[0]
    assert [case["index"] for case in first.cases()] == [0, 1, 2, 3]
    next(run_dir.glob("chunks/BaFT/single/*2.json")).unlink()
    with pytest.raises(
        ValueError, match=r"must count the cases of BaFT, single, .* 3 are there; got n 4"
    ):
        first.cases()


def test_same_results_count_once_and_contradictions_are_refused(tmp_path, run_dir):
    run, copy = read_run(run_dir), read_run(write_run(tmp_path / "copy", **FEW))
    assert len(merge_results([run, copy])) == 4
    other = read_run(write_run(tmp_path / "other", **FEW | {"seed": 1}))
    with pytest.raises(ValueError, match=r"run/summary\.json and .*other/summary\.json must not"):
        merge_results([run, other])


def test_gate_records_are_arrays_by_layer_of_the_cases_that_have_them():
    cases = [
        {"basis": {"rewrite": {"10": [0.2, 1.0], "9": [0.5, 0.5]}, "rephrase": None}},
        {"basis": {"rewrite": {"10": [0.4, 0.0]}, "locality": {"10": [0.1, 0.1]}}},
        {"basis": None},
        {},
    ]
    records = gate_records(cases, "basis", "rewrite")
    assert list(records) == [9, 10]  # by number, not by text
    assert records[10].tolist() == [[0.2, 1.0], [0.4, 0.0]]
    assert gate_records(cases, "basis", "rephrase") == {}
