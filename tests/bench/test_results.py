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


@pytest.mark.parametrize("name", ["run.json", "summary.json", "config.yaml"])
def test_directory_that_is_no_finished_run_is_refused(run_dir, name):
    (run_dir / name).unlink()
    with pytest.raises(ValueError, match=rf"is not the directory of a finished run: .* {name}"):
        read_run(run_dir)


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
