"""`diagnose` and the forms of what it finds, on made-up runs whose figures are known."""

import json
from itertools import combinations
from math import sqrt

import pytest
import yaml
from synthetic import write_json, write_run

from baft_easyedit.bench.diagnosis import BasisTest, write_diagnosis
from baft_easyedit.bench.diagnostics import diagnose

NO_LOCALITY = {"name": "no-loc", "method": "BaFT", "set": {"locality": False}}


def make_run(directory, methods, protocols=("single",), num_cases=4, rows=None):
    """Write a run of these methods, given as in a configuration."""
    names = [method if isinstance(method, str) else method["name"] for method in methods]
    run = write_run(
        directory / "run", rows=rows, methods=names, protocols=protocols, num_cases=num_cases
    )
    config = {"model": "bundled", "data": {"kind": "facts"}, "methods": methods}
    (run / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return run


def change(folder, key, values):
    """Replace one value in each record of a folder, in order."""
    files = sorted(folder.glob("*.json"))
    assert len(files) == len(values)
    for file, value in zip(files, values, strict=True):
        write_json(file, {**json.loads(file.read_text(encoding="utf-8")), key: value})


def set_weights(run, edit, irrelevant, row="BaFT/single"):
    """Give each case basis weights by layer, on its prompt and on its locality probe."""
    pairs = zip(edit, irrelevant, strict=True)
    basis = [{"rewrite": a, "rephrase": None, "locality": b} for a, b in pairs]
    change(run / "cases" / row, "basis", basis)


def set_usage(run, usages, row="BaFT/single"):
    """Give each chunk its mean basis weights by layer."""
    change(run / "chunks" / row, "basis_usage", usages)


def scores(rel, loc, loc_se=0.001):
    return {"rewrite_acc": rel, "locality_acc": loc, "locality_acc_se": loc_se}


# Load balance


def test_balance_is_the_mean_over_sequences_of_the_variation_over_bases(tmp_path):
    run = make_run(tmp_path, ["BaFT"], protocols=["continual-T2"])
    row = "BaFT/continual-T2"
    first = {"1": [0.1, 0.2, 0.3, 0.2], "3": [0.4, 0.0, 0.0, 0.0]}  # 0.4082, 2
    second = {"1": [0.2] * 4, "3": [0.1] * 4}
    set_usage(run, [first, second], row)
    (balance,) = diagnose(run).balance
    first_cv = sqrt(0.02 / 3) / 0.2
    assert (balance.method, balance.protocol, balance.num_chunks) == ("BaFT", "continual-T2", 2)
    assert [layer.layer for layer in balance.layers] == [1, 3]
    assert balance.layers[0].coefficient_of_variation == pytest.approx(first_cv / 2)
    assert balance.layers[1].coefficient_of_variation == pytest.approx(1)
    assert balance.layers[0].usage == pytest.approx((0.15, 0.2, 0.25, 0.2))
    assert balance.layers[1].entropy == pytest.approx(0.5)
    assert balance.layers[1].top_share == pytest.approx((1 + 0.25) / 2)
    # by sequence, over layers: (0.408 + 2) / 2 and 0
    assert balance.coefficient_of_variation == pytest.approx((first_cv + 2) / 4)
    assert balance.coefficient_of_variation_se == pytest.approx((first_cv + 2) / 4)


def test_ablation_of_load_balance_stands_side_by_side(tmp_path):
    without = {"name": "no-bal", "method": "BaFT", "set": {"balance": False}}
    run = make_run(tmp_path, ["BaFT", without], protocols=["single", "continual-T4"])
    set_usage(run, [{"1": [0.2] * 4}], "BaFT/continual-T4")
    set_usage(run, [{"1": [0.8, 0.0, 0.0, 0.0]}], "no-bal/continual-T4")
    # the made-up runs have gates for rows called BaFT and ReFT only
    set_weights(run, [{"1": [0.5] * 4}] * 4, [{"1": [0.1] * 4}] * 4, "no-bal/continual-T4")
    lines = diagnose(run).to_markdown().splitlines()
    rows = [line.split("|")[1:4] for line in lines if line.startswith("|") and "-T4" in line]
    values = [[cell.strip() for cell in row] for row in rows]
    assert values[:2] == [
        ["BaFT, continual-T4", "1", "0.00"],
        ["no-bal, continual-T4", "1", "2.00"],
    ]


def test_failed_chunks_do_not_count(tmp_path):
    run = make_run(tmp_path, ["BaFT"], protocols=["continual-T2"])
    change(run / "chunks" / "BaFT" / "continual-T2", "error", [None, "out of memory"])
    diagnosis = diagnose(run)
    assert diagnosis.balance[0].num_chunks == 1
    assert diagnosis.remarks["separation"] == (
        "BaFT, continual-T2: not tested, with weights of 2 edit and 2 irrelevant prompts; 4 of "
        "each are needed.",
    )


def test_missing_usage_is_remarked_upon(tmp_path):
    run = make_run(tmp_path, ["BaFT"])
    set_usage(run, [None] * 4)
    diagnosis = diagnose(run)
    assert diagnosis.balance == ()
    assert diagnosis.remarks["balance"] == ("BaFT, single: its chunks have no basis_usage.",)


def test_rows_without_a_gate_are_skipped_with_a_remark(tmp_path):
    diagnosis = diagnose(make_run(tmp_path, ["FT-L", "ReFT"]))
    assert diagnosis.balance == diagnosis.separation == ()
    skipped = "Skipped, because all weights are 1 and ReFT has no gate: ReFT, single."
    for section in ("balance", "separation"):
        assert diagnosis.remarks[section][0] == skipped
        assert "run BaFT, with `basis: true`" in diagnosis.remarks[section][1]


# Reliability against Locality


def sweep_row(name, settings, method="BaFT"):
    return {"name": name, "method": method, "set": settings}


def test_sweep_finds_the_rows_that_differ_in_the_locality_term_alone(tmp_path):
    methods = [
        "BaFT",
        sweep_row("strong", {"locality_coef": 10.0}),
        sweep_row("off", {"locality": False, "locality_coef": 3.0}),
        sweep_row("other", {"locality_coef": 3.0, "rank": 4}),
        sweep_row("ReFT", {}, "ReFT"),
    ]
    rows = {
        "BaFT": scores(0.8, 0.9),
        "strong": scores(0.7, 0.85),
        "off": scores(0.9, 0.6, 0.02),
    }
    (sweep,) = diagnose(make_run(tmp_path, methods, rows=rows)).sweeps
    assert (sweep.protocol, sweep.settings) == ("single", "")
    found = [(p.method, p.strength, p.rewrite_acc, p.locality_acc) for p in sweep.points]
    assert found == [
        ("off", 0.0, 0.9, 0.6),
        ("strong", 10.0, 0.7, 0.85),
        ("BaFT", None, 0.8, 0.9),
    ]
    assert [point.is_on_front for point in sweep.points] == [True, False, True]
    assert sweep.points[0].locality_acc_se == 0.02


def test_sweeps_are_apart_by_protocol_and_by_other_settings(tmp_path):
    methods = [
        "BaFT",
        NO_LOCALITY,
        sweep_row("one", {"gate": "subspace"}),
        sweep_row("two", {"gate": "subspace", "locality_coef": 2.0}),
    ]
    sweeps = diagnose(make_run(tmp_path, methods, protocols=["single", "continual-T2"])).sweeps
    assert [sweep.title for sweep in sweeps] == [
        "single",
        "continual-T2",
        'single, gate "subspace"',
        'continual-T2, gate "subspace"',
    ]


def test_rows_of_equal_strength_are_no_sweep(tmp_path):
    methods = [sweep_row("a", {"locality_coef": 3}), sweep_row("b", {"locality_coef": 3.0})]
    assert diagnose(make_run(tmp_path, methods)).sweeps == ()


def test_equal_rows_are_both_on_the_front(tmp_path):
    rows = {"BaFT": scores(0.8, 0.9), "no-loc": scores(0.8, 0.9)}
    (sweep,) = diagnose(make_run(tmp_path, ["BaFT", NO_LOCALITY], rows=rows)).sweeps
    assert [point.is_on_front for point in sweep.points] == [True, True]


@pytest.mark.parametrize(
    "change", [{"error": "out of memory"}, {"locality_acc": None}, {"rewrite_acc": None}]
)
def test_rows_without_scores_make_no_sweep(tmp_path, change):
    run = make_run(tmp_path, ["BaFT", NO_LOCALITY], rows={"no-loc": change})
    diagnosis = diagnose(run)
    assert diagnosis.sweeps == ()
    assert diagnosis.remarks["sweeps"][0].startswith("No two scored rows of BaFT differ in R_loc")


# Gate separation

APART = [0.60, 0.61, 0.62, 0.63, 0.64], [0.10, 0.11, 0.12, 0.13, 0.14]
MIXED = [0.10, 0.20, 0.30, 0.40, 0.50], [0.15, 0.25, 0.35, 0.45, 0.55]
EQUAL = [0.2] * 5, [0.2] * 5
BARELY = [0.206, 0.207, 0.208, 0.209, 0.2095], [0.200, 0.201, 0.202, 0.203, 0.204]


def set_columns(run, layers):
    """Give five cases weights: by layer, for each basis those on edits and on irrelevant texts."""

    def by_case(kind):
        return [
            {layer: [basis[kind][i] for basis in bases] for layer, bases in layers.items()}
            for i in range(5)
        ]

    set_weights(run, by_case(0), by_case(1))


def exact_p_value(a, b):
    """Two-sided p-value of Mann-Whitney's U, over all ways to deal the values out."""

    def wins(x, y):
        return sum(i > j for i in x for j in y)

    values = [*a, *b]
    deals = [wins(x, [v for v in values if v not in x]) for x in combinations(values, len(a))]
    u = wins(a, b)
    tails = sum(d <= u for d in deals), sum(d >= u for d in deals)
    return min(1.0, 2 * min(tails) / len(deals))


def test_separation_tests_each_basis_and_corrects_for_their_number(tmp_path):
    run = make_run(tmp_path, ["BaFT"], num_cases=5)
    set_columns(run, {"1": [APART, EQUAL], "3": [APART[::-1], MIXED]})
    (row,) = diagnose(run).separation
    assert (row.method, row.protocol, row.num_edit, row.num_irrelevant) == ("BaFT", "single", 5, 5)
    assert [layer.layer for layer in row.layers] == [1, 3]
    assert row.bases[0].edit_weight == pytest.approx(0.62)
    assert row.bases[0].irrelevant_weight == pytest.approx(0.12)
    # 10 of the 25 pairs of MIXED have the larger weight on the edit
    assert [basis.auc for basis in row.bases] == pytest.approx([1, 0.5, 0, 0.4])
    p = exact_p_value(*MIXED)
    assert exact_p_value(*APART) == pytest.approx(2 / 252)
    assert [basis.p_value for basis in row.bases] == pytest.approx([2 / 252, 1, 2 / 252, p])
    # of four p-values in order, the first two count 4 / 2 times, the third 4 / 3, the last once
    adjusted = [4 / 252, 1, 4 / 252, min(1, p * 4 / 3)]
    assert [basis.adjusted_p_value for basis in row.bases] == pytest.approx(adjusted)
    assert [basis.is_open for basis in row.bases] == [True, False, False, False]
    assert [basis.is_reversed for basis in row.bases] == [False, False, True, False]
    assert row.mean_auc == pytest.approx(1.9 / 4)


def test_separation_needs_a_gap_that_is_more_than_rounding(tmp_path):
    run = make_run(tmp_path, ["BaFT"], num_cases=5)
    set_columns(run, {"1": [BARELY, BARELY[::-1]]})
    bases = diagnose(run).separation[0].bases
    assert all(basis.adjusted_p_value < 0.05 for basis in bases)
    assert not any(basis.is_open or basis.is_reversed for basis in bases)


def test_a_basis_whose_mean_and_ranks_disagree_is_neither_open_nor_reversed():
    for edit, irrelevant, auc in ((0.6, 0.5, 0.3), (0.5, 0.6, 0.7)):
        basis = BasisTest(edit, irrelevant, auc, p_value=0.001, adjusted_p_value=0.001)
        assert not basis.is_open
        assert not basis.is_reversed


def test_separation_table_has_layers_and_all(tmp_path):
    run = make_run(tmp_path, ["BaFT"], num_cases=5)
    set_columns(run, {"1": [APART, EQUAL], "3": [APART[::-1], EQUAL]})
    text = diagnose(run).to_markdown()
    (line,) = [li for li in text.splitlines() if li.startswith("| BaFT, single") and "(" in li]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[1:3] == ["5", "5"]
    assert cells[-4:] == ["0.75 (1 of 2)", "0.25 (0 of 2)", "0.50 (1 of 4)", "1 of 4"]


def test_cases_without_irrelevant_prompts_are_not_tested(tmp_path):
    run = make_run(tmp_path, ["BaFT"])
    set_weights(run, [{"1": [0.5, 0.2]}] * 4, [None] * 4)
    diagnosis = diagnose(run)
    assert diagnosis.separation == ()
    assert diagnosis.warnings == ()  # one prompt a gate does not tell whether that is constant
    assert "4 edit and 0 irrelevant prompts" in diagnosis.remarks["separation"][0]


# Signs of failure


def warnings_of(run, start):
    return [warning for warning in diagnose(run).warnings if start in warning]


def test_collapse_is_told_though_each_single_edit_has_another_gate(tmp_path):
    run = make_run(tmp_path, ["BaFT"])
    weights = [{"1": [0.2 * i] * 4, "3": [0.2 * i] * 4} for i in range(4)]
    moved = [{"1": w["1"], "3": [v + 0.1 for v in w["3"]]} for w in weights]
    set_weights(run, weights, moved)
    (warning,) = warnings_of(run, "collapse")
    assert warning.startswith("BaFT, single: gate collapse in layer 1: ")


def test_imbalance_is_told(tmp_path):
    run = make_run(tmp_path, ["BaFT"])
    set_usage(run, [{"1": [0.1] * 4, "3": [0.0, 0.93, 0.07, 0.0]}] * 4)
    (warning,) = warnings_of(run, "imbalance")
    assert warning.startswith("BaFT, single: imbalance in layer 3: 1 of 4 bases carry 93%")


@pytest.mark.parametrize(
    ("bases", "is_warned"),
    [
        ([EQUAL, MIXED], True),
        ([EQUAL, MIXED, MIXED, APART], False),  # one basis is enough, at a mean AUC of 0.575
        ([([0.1, 0.2, 0.3, 0.4, 0.5], [0.05, 0.15, 0.25, 0.35, 0.45])], False),  # AUC 0.6
    ],
)
def test_a_gate_that_does_not_separate_is_told(tmp_path, bases, is_warned):
    run = make_run(tmp_path, ["BaFT"], num_cases=5)
    set_columns(run, {"1": bases})
    assert bool(warnings_of(run, "no separation in BaFT, single (mean AUC 0.45)")) is is_warned
    assert bool(warnings_of(run, "no separation")) is is_warned


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
def test_locality_that_falls_is_told(tmp_path, few, many, is_warned):
    rows = {
        ("BaFT", "single"): few,
        ("BaFT", "continual-T2"): scores(1.0, 0.1),
        ("BaFT", "continual-T4"): many,
    }
    run = make_run(
        tmp_path, ["BaFT"], protocols=["continual-T4", "single", "continual-T2"], rows=rows
    )
    warnings = warnings_of(run, "Locality falls with T")
    assert bool(warnings) is is_warned
    if is_warned:
        end = f"{many['locality_acc']:.2f} at T 4."
        assert f"with T: BaFT from 0.95 at T 1 to {end}" in warnings[0]


def test_peers_are_not_diagnosed(tmp_path):
    rows = {("LoRA", "single"): scores(1, 0.9), ("LoRA", "continual-T4"): scores(1, 0.1)}
    diagnosis = diagnose(
        make_run(tmp_path, ["LoRA"], protocols=["single", "continual-T4"], rows=rows)
    )
    assert diagnosis.warnings == ()
    assert diagnosis.remarks["warnings"][0].startswith("Locality over T: no row of BaFT or ReFT")


def test_locality_is_compared_over_edits_one_by_one(tmp_path):
    rows = {("BaFT", "single"): scores(1, 0.9), ("BaFT", "batched-B2-T2"): scores(1, 0.1)}
    run = make_run(tmp_path, ["BaFT"], protocols=["single", "batched-B2-T2"], rows=rows)
    diagnosis = diagnose(run)
    assert diagnosis.warnings == ()
    assert diagnosis.remarks["warnings"][0].startswith("Locality over T: no row of BaFT or ReFT")
    assert "- Locality over T: no row of BaFT" in diagnosis.to_markdown()


# Reading and writing


@pytest.mark.parametrize("missing", ["run.json", "summary.json", "config.yaml"])
def test_a_directory_that_is_no_run_is_refused(tmp_path, missing):
    run = make_run(tmp_path, ["BaFT"])
    (run / missing).unlink()
    with pytest.raises(ValueError, match=rf"has no {missing}; give .*`baft-easyedit bench` wrote"):
        diagnose(run)


def test_diagnosis_is_written_as_data_text_and_figure(tmp_path):
    rows = {"BaFT": scores(0.8, 0.9), "no-loc": scores(0.9, 0.6)}
    diagnosis = diagnose(
        make_run(
            tmp_path,
            ["BaFT", NO_LOCALITY],
            protocols=["single", "continual-T2", "continual-T3", "continual-T4"],
            rows=rows,
        )
    )
    assert len(diagnosis.sweeps) == 4  # panels of the last line stay empty
    files = write_diagnosis(diagnosis, tmp_path / "out")
    names = ["diagnosis.json", "diagnosis.md", "locality.png", "locality.pdf"]
    assert [file.name for file in files] == names
    assert json.loads(files[0].read_text(encoding="utf-8")) == diagnosis.to_dict()
    assert diagnosis.to_dict()["sweeps"][0]["points"][0]["locality_acc"] == 0.6
    assert files[1].read_text(encoding="utf-8") == diagnosis.to_markdown()
    assert files[2].read_bytes().startswith(b"\x89PNG")
    assert files[3].read_bytes().startswith(b"%PDF")


def test_without_a_sweep_there_is_no_figure(tmp_path):
    files = write_diagnosis(diagnose(make_run(tmp_path, ["BaFT"])), tmp_path / "out")
    assert [file.suffix for file in files] == [".json", ".md"]


def test_a_healthy_run_has_no_warnings(tmp_path):
    diagnosis = diagnose(make_run(tmp_path, ["BaFT", "ReFT"], num_cases=10))
    text = diagnosis.to_markdown()
    assert diagnosis.warnings == ()
    assert "No sign of failure was found." in text
    sections = [line for line in text.splitlines() if line.startswith("## ")]
    assert sections == [
        "## Warnings",
        "## Load balance",
        "## Reliability against Locality",
        "## Gate separation",
    ]
