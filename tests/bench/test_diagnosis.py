"""`diagnose` and the forms of what it finds, on made-up runs whose figures are known."""

import json
from dataclasses import asdict
from math import isnan, sqrt
from unittest.mock import ANY

import pytest
import yaml
from synthetic import write_json, write_run

from baft_easyedit.bench.diagnosis import diagnose, write_diagnosis

NO_LOCALITY = {"name": "no-loc", "method": "BaFT", "set": {"locality": False}}


def make_run(directory, methods=("BaFT",), protocols=("single",), num_cases=5, rows=None):
    """Write a run of these methods, given as in a configuration."""
    names = [method if isinstance(method, str) else method["name"] for method in methods]
    options = {"rows": rows, "methods": names, "protocols": protocols, "num_cases": num_cases}
    run = write_run(directory / "run", **options)
    config = {"model": "bundled", "data": {"kind": "facts"}, "methods": list(methods)}
    (run / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return run


def change(folder, key, values):
    """Replace one value in each record of a folder, in order."""
    for file, value in zip(sorted(folder.glob("*.json")), values, strict=True):
        write_json(file, {**json.loads(file.read_text(encoding="utf-8")), key: value})


def set_weights(run, layers):
    """Give each case weights: by layer, for each basis those on edits and on irrelevant texts."""

    def by_layer(kind, i):
        return {k: [basis[kind][i] for basis in bases] for k, bases in layers.items()}

    basis = [{"rewrite": by_layer(0, i), "locality": by_layer(1, i)} for i in range(5)]
    change(run / "cases" / "BaFT" / "single", "basis", basis)


def scores(rel, loc, loc_se=0.001):
    return {"rewrite_acc": rel, "locality_acc": loc, "locality_acc_se": loc_se}


def test_balance_is_the_mean_over_sequences_of_the_variation_over_bases(tmp_path):
    run = make_run(tmp_path, protocols=["continual-T2"], num_cases=6)
    folder = run / "chunks" / "BaFT" / "continual-T2"
    first = {"1": [0.1, 0.2, 0.3, 0.2], "3": [0.4, 0.0, 0.0, 0.0]}
    second = {"1": [0.2] * 4, "3": [0.1] * 4}
    change(folder, "basis_usage", [first, second, first])
    change(folder, "error", [None, None, "out of memory"])  # the last does not count
    (row,) = json.loads((run / "summary.json").read_text())
    write_json(run / "summary.json", [row | {"n": 4}])
    variation = sqrt(0.02 / 3) / 0.2
    assert diagnose(run).balance["BaFT, continual-T2"] == pytest.approx(
        {
            "sequences": 2,
            "layer 1": variation / 2,
            "layer 3": 1,
            "all layers": (variation + 2) / 4,  # by sequence, over layers: (0.408 + 2) / 2 and 0
            "±": (variation + 2) / 4,
            "share of the largest quarter": (0.375 + 1 + 0.25 + 0.25) / 4,
        }
    )


def test_weights_that_are_no_numbers_are_shown_as_such(tmp_path):
    run = make_run(tmp_path)
    usage = {layer: [float("inf"), 0.5, 0.5, 0.5] for layer in ("1", "3")}
    change(run / "chunks" / "BaFT" / "single", "basis_usage", [usage] * 5)
    assert isnan(diagnose(run).balance["BaFT, single"]["±"])


def test_imbalance_is_told(tmp_path):
    run = make_run(tmp_path)
    usage = {"1": [0.1] * 4, "3": [0.0, 0.93, 0.07, 0.0]}
    change(run / "chunks" / "BaFT" / "single", "basis_usage", [usage] * 5)
    (warning,) = diagnose(run).warnings
    assert warning.startswith("BaFT, single: imbalance in layer 3: 1 of 4 bases carry 93%")


def test_sweep_finds_the_rows_that_differ_in_the_locality_term_alone(tmp_path):
    methods = [
        "BaFT",
        {"name": "strong", "method": "BaFT", "set": {"locality_coef": 10.0}},
        {"name": "off", "method": "BaFT", "set": {"locality": False, "locality_coef": 3.0}},
        {"name": "twin", "method": "BaFT", "set": {"locality": False}},
        {"name": "failed", "method": "BaFT", "set": {"locality_coef": 5.0}},
        {"name": "other", "method": "BaFT", "set": {"locality_coef": 3.0, "rank": 4}},
        "ReFT",
    ]
    rows = {
        "BaFT": scores(0.8, 0.9),
        "strong": scores(0.7, 0.85),
        **dict.fromkeys(("off", "twin"), scores(0.9, 0.6, 0.02)),
        "failed": {"error": "out of memory"},
    }
    (sweep,) = diagnose(make_run(tmp_path, methods, rows=rows)).sweeps.values()
    assert {row: list(line.values()) for row, line in sweep.items()} == {
        "off": ["0", 0.9, ANY, 0.6, 0.02, "yes"],
        "twin": ["0", 0.9, ANY, 0.6, 0.02, "yes"],
        "strong": ["10", 0.7, ANY, 0.85, 0.001, "no"],
        "BaFT": ["preset", 0.8, ANY, 0.9, 0.001, "yes"],
    }


def test_sweeps_are_apart_by_protocol_and_by_other_settings(tmp_path):
    gate = {"gate": "subspace"}
    methods = [
        *("BaFT", NO_LOCALITY),
        {"name": "one", "method": "BaFT", "set": gate},
        {"name": "two", "method": "BaFT", "set": {**gate, "locality_coef": 2.0}},
        {"name": "three", "method": "BaFT", "set": {"rank": 4, "locality_coef": 3}},
        {"name": "as strong", "method": "BaFT", "set": {"rank": 4, "locality_coef": 3.0}},
    ]
    sweeps = diagnose(make_run(tmp_path, methods, protocols=["single", "continual-T2"])).sweeps
    names = {"single", "continual-T2", 'single, gate "subspace"', 'continual-T2, gate "subspace"'}
    assert set(sweeps) == names


APART = [0.60, 0.61, 0.62, 0.63, 0.64], [0.10, 0.11, 0.12, 0.13, 0.14]
MIXED = [0.10, 0.20, 0.30, 0.40, 0.50], [0.15, 0.25, 0.35, 0.45, 0.55]
EQUAL = [0.2] * 5, [0.2] * 5
BARELY = [0.206, 0.207, 0.208, 0.209, 0.2095], [0.200, 0.201, 0.202, 0.203, 0.204]


def test_separation_tests_each_basis(tmp_path):
    run = make_run(tmp_path)
    set_weights(run, {"1": [APART, EQUAL], "3": [APART[::-1], MIXED]})
    assert diagnose(run).separation["BaFT, single"] == {
        "edit prompts": 5,
        "irrelevant": 5,
        "edit weight": pytest.approx((0.62 + 0.2 + 0.12 + 0.3) / 4),
        "irrelevant weight": pytest.approx((0.12 + 0.2 + 0.62 + 0.35) / 4),
        "layer 1": pytest.approx((1 + 0.5) / 2),
        "layer 3": pytest.approx((0 + 0.4) / 2),  # 10 of the 25 pairs of MIXED
        "all layers": pytest.approx(1.9 / 4),
        "open": "1 of 4",
        "reversed": "1 of 4",
    }


@pytest.mark.parametrize(
    ("bases", "open_bases"),
    [
        ([APART, *[EQUAL] * 5], "1 of 6"),  # p is 2 of 252 orders, times 6 bases: 0.048
        ([APART, *[EQUAL] * 6], "0 of 7"),  # times 7: 0.056
        ([APART, APART, *[EQUAL] * 6], "2 of 8"),  # the second counts 8 / 2 times
        ([BARELY, BARELY[::-1]], "0 of 2"),  # beyond chance, and no more than rounding
    ],
)
def test_open_bases_are_so_beyond_chance_for_their_number_and_visibly(tmp_path, bases, open_bases):
    run = make_run(tmp_path)
    set_weights(run, {"1": bases})
    found = diagnose(run).separation["BaFT, single"]
    assert (found["open"], found["reversed"]) == (open_bases, f"0 of {len(bases)}")


@pytest.mark.parametrize(
    ("bases", "is_warned"),
    [
        ([EQUAL, MIXED], True),
        ([EQUAL, MIXED, MIXED, APART], False),  # one basis is enough, at a mean AUC of 0.575
        ([([0.1, 0.2, 0.3, 0.4, 0.5], [0.05, 0.15, 0.25, 0.35, 0.45])], False),  # AUC 0.6
    ],
)
def test_a_gate_that_does_not_separate_is_told(tmp_path, bases, is_warned):
    run = make_run(tmp_path)
    set_weights(run, {"1": bases})
    start = "BaFT, single: no separation (mean AUC 0.45)"
    assert [w.startswith(start) for w in diagnose(run).warnings] == [True] * is_warned


def test_rows_without_enough_weights_are_not_tested(tmp_path):
    run = make_run(tmp_path, num_cases=3)
    change(run / "cases" / "BaFT" / "single", "basis", [{"rewrite": {"1": [0.5, 0.2]}}] * 3)
    change(run / "chunks" / "BaFT" / "single", "basis_usage", [None] * 3)
    diagnosis = diagnose(run)
    assert not diagnosis.warnings  # one prompt a gate does not tell whether that is constant
    text = diagnosis.to_markdown()
    assert "No two scored rows of BaFT differ in R_loc alone" in text
    assert "No row of BaFT has recorded basis weights: run one, with `basis: true`." in text
    assert "Not tested: 4 edit prompts and as many irrelevant ones are needed." in text


def test_collapse_is_told_though_each_single_edit_has_another_gate(tmp_path):
    run = make_run(tmp_path)
    levels = [0.0, 0.2, 0.4, 0.6, 0.8]
    set_weights(run, {"1": [(levels, levels)], "3": [(levels, [w + 0.1 for w in levels])]})
    warnings = [warning for warning in diagnose(run).warnings if "collapse" in warning]
    assert len(warnings) == 1
    assert warnings[0].startswith("BaFT, single: gate collapse in layer 1: ")


@pytest.mark.parametrize(
    ("few", "many", "is_warned"),
    [
        (scores(1.0, 0.95), scores(1.0, 0.89), True),
        (scores(1.0, 0.95), scores(1.0, 0.91), False),  # no more than 0.05
        (scores(1.0, 0.95, 0.03), scores(1.0, 0.84, 0.04), True),  # 0.11, two errors are 0.10
        (scores(1.0, 0.95, 0.03), scores(1.0, 0.86, 0.04), False),
        (scores(1.0, 0.95, None), scores(1.0, 0.50), False),  # nobody knows how sure that is
        (scores(1.0, 0.80), scores(1.0, 0.95), False),
    ],
)
def test_locality_that_falls_is_told_of_edits_one_by_one(tmp_path, few, many, is_warned):
    slugs = ["continual-T4", "single", "continual-T2", "batched-B2-T4"]
    rows = {(name, slug): scores(1, 0.1) for name in ("BaFT", "LoRA") for slug in slugs[2:]}
    rows |= {("BaFT", "single"): few, ("BaFT", "continual-T4"): many}
    run = make_run(tmp_path, ["BaFT", "LoRA"], slugs, rows=rows)
    start = f"BaFT: Locality falls with T, from 0.95 at T 1 to {many['locality_acc']:.2f} at T 4."
    assert [w.startswith(start) for w in diagnose(run).warnings] == [True] * is_warned


def test_diagnosis_is_written_as_data_and_text(tmp_path):
    diagnosis = diagnose(make_run(tmp_path, ["BaFT", NO_LOCALITY, "ReFT"], num_cases=10))
    data, text = write_diagnosis(diagnosis, tmp_path / "out")
    assert json.loads(data.read_text(encoding="utf-8")) == asdict(diagnosis)
    assert list(diagnosis.sweeps["single"]) == ["no-loc", "BaFT"]
    lines = text.read_text(encoding="utf-8").splitlines()
    assert lines[:5:2] == ["# Diagnosis of run", "## Warnings", "No sign of failure was found."]
    titles = ["Warnings", "Load balance", "Reliability against Locality", "Gate separation"]
    assert [line[3:] for line in lines if line.startswith("## ")] == titles
    rows = [line.split("|")[1].strip() for line in lines if line.startswith("| ")]
    assert [row for row in rows if row[0] != ":"] == [
        *("method", "BaFT, single"),
        *("method", "no-loc", "BaFT"),
        *("method", "BaFT, single"),
    ]
