from itertools import groupby

import pytest
from synthetic import write_run

from baft_easyedit.bench.layouts import PaperNumbers, make_notes, make_tables, summary_table
from baft_easyedit.bench.protocol import Protocol
from baft_easyedit.bench.results import Result, read_run
from baft_easyedit.bench.tables import to_markdown

SCORES = ["Rel", "Gen", "Loc", "Por"]
PAPER = PaperNumbers()


@pytest.fixture
def results(tmp_path):
    def make(**options):
        options = {"methods": ("BaFT", "ReFT"), "num_cases": 4, "protocols": ("single",)} | options
        return read_run(write_run(tmp_path / "run", **options)).results

    return make


@pytest.fixture
def titled(results):
    def make(*parts, **options):
        """Return the only table of a run whose caption has all parts."""
        tables = make_tables(results(**options), PAPER)
        (found,) = [table for table in tables if all(part in table.caption for part in parts)]
        return found

    return make


def headings(table):
    return [
        (heading, [column.title for column in columns])
        for heading, columns in groupby(table.columns, lambda column: column.heading)
    ]


def values(table, label="BaFT"):
    return [cell.value for cell in table.rows[label]]


def test_teacher_forced_and_generated_scores_never_share_a_table(results):
    row = (made := results())[0].values
    forced, generated, *_ = make_tables(made, PAPER)
    assert forced.caption == (
        "llama-zsre on zsre: single edits, each of the unedited model; teacher forced; as the "
        "paper's Table 1; n = 4 records"
    )
    assert "generated text: greedy, natural stop, exact match" in generated.caption
    assert headings(forced) == headings(generated) == [("", SCORES)]
    names = ("rewrite_acc", "rephrase_acc", "locality_acc", "portability_acc")
    assert values(forced) == [row[name] for name in names]
    assert [cell.se for cell in forced.rows["BaFT"]] == [row[f"{name}_se"] for name in names]
    assert values(generated) == [row[f"gen_{name}"] for name in names]


def test_score_that_no_record_asks_for_has_no_column(titled):
    assert headings(titled("teacher forced", portability=False)) == [("", SCORES[:3])]


@pytest.mark.parametrize(
    ("caption", "protocols", "above", "titles"),
    [
        ("Table 2", ("continual-T4", "single"), ["T = 1", "T = 4"], SCORES),
        (
            "records each, all scored after the T-th; teacher",
            ("batched-B2-T2", "batched-B2-T1"),
            ["B = 2, T = 1", "B = 2, T = 2"],
            SCORES,
        ),
        ("each scored right after itself", ("single", "continual-T2"), ["T = 2"], SCORES[:2]),
        ("the best of all listed answers", ("continual-T2",), ["T = 2"], ["Por"]),
    ],
)
def test_columns_stand_below_their_protocols(titled, caption, protocols, above, titles):
    table = titled(caption, protocols=protocols)
    assert headings(table) == [(heading, titles) for heading in above]


def test_ablation_stands_between_reft_and_baft_and_only_there(titled):
    options = {"methods": ("BaFT", "+ss-w", "FT-L", "ReFT"), "protocols": ("continual-T2",)}
    assert list(titled("Table 2", **options).rows) == ["BaFT", "FT-L", "ReFT"]
    assert list(titled("Table 4", "T edits in a row", **options).rows) == ["ReFT", "+ss-w", "BaFT"]


def test_number_of_the_paper_stands_beside_ours(titled):
    options = {
        "model": "Llama-2-7b-hf",
        "methods": ("BaFT", "+ba-w", "LoRA"),
        "protocols": ("continual-T100",),
    }

    def printed(*parts, label="BaFT"):
        return [cell.paper for cell in titled(*parts, **options).rows[label]]

    assert printed("Table 2", "forced") == ["0.75", "0.70", "0.98", ""]
    assert printed("Table 2", "forced", label="LoRA") == [""] * 4
    assert printed("Table 4", "forced") == ["0.73", "0.67", "0.98", ""]
    assert printed("cost:") == ["606,256", "13.5", ""]
    assert printed("ablation", "generated text") == [""] * 4


def test_cost_table_has_parameters_seconds_and_memory(titled):
    table = titled("cost:", "Table 3", protocols=("single", "continual-T2"))
    columns = ["parameters", "s/edit", "MiB"]
    assert headings(table) == [("T = 1", columns), ("T = 2", columns)]
    parameters, seconds, _, *_ = values(table)
    assert parameters == 28464
    assert 0.3 < seconds < 1
    assert " 381 |" in to_markdown(table)  # of 400,000,000 bytes


def test_downstream_table_has_the_protocols_after_which_the_task_was_asked(titled):
    piqa = {"downstream_pre_acc": 0.6, "downstream_acc": 0.5}
    rows = {("BaFT", "continual-T2"): piqa, ("ReFT", "continual-T2"): {"error": "killed"}}
    table = titled("PIQA", "Table 8", rows=rows, protocols=("single", "continual-T2"))
    assert headings(table) == [("T = 2", ["before", "after"])]
    assert values(table) == [0.6, 0.5]
    assert table.rows["ReFT"] == "killed"


def test_counterfacts_scores_and_specificity_have_tables_of_their_own(titled):
    scores = {"harmonic_success": 0.6, "rewrite_success": 0.9, "neighborhood_magnitude": -0.25}
    texts = {"ngram_entropy": 6.25, "pre_ngram_entropy": 6.5}
    rows = {("BaFT", "single"): {**scores, **texts}}
    table = titled("by probability", "after the edits", rows=rows)
    assert headings(table) == [("", ["S", "ES", "NM", "GE"])]
    assert values(table) == [0.6, 0.9, -0.25, 6.25]
    assert values(titled("by probability", "before the edits", rows=rows)) == [6.5]
    spe = {("BaFT", "single"): {"pre_specificity_acc": 0.5, "specificity_acc": 0.25}}
    assert values(titled("against the gold answers", rows=spe)) == [0.5, 0.25]
    made = titled("teacher forced", "Table 1", rows=rows | spe)
    assert headings(made) == [("", SCORES)]


def test_method_that_did_not_run_says_so_in_every_table_and_in_a_note(results):
    made = results(methods=("BaFT", "WISE"), rows={"WISE": {"error": "no memory"}})
    assert {table.rows["WISE"] for table in make_tables(made, PAPER)} == {"no memory"}
    assert "WISE: not run: no memory" in make_notes(made)


def test_protocol_that_did_not_run_says_so_in_its_columns(results):
    rows = {("ReFT", "continual-T4"): {"error": "timeout"}}
    made = results(rows=rows, protocols=("single", "continual-T4"))
    (table,) = [t for t in make_tables(made, PAPER) if "Table 2" in t.caption]
    assert values(table, "ReFT")[4:] == ["not run", None, None, None]
    assert values(table, "ReFT")[0] is not None
    assert "ReFT (T = 4): not run: timeout" in make_notes(made)


def test_notes_name_their_rows(results):
    rows = {
        "ReFT": {"notes": ["scored in eval mode", "lr scaled"]},
        ("BaFT", "continual-T2"): {"notes": ["scored in eval mode", "1 of 2 runs failed"]},
    }
    assert make_notes(results(rows=rows, protocols=("single", "continual-T2"))) == [
        "All rows: scored in eval mode",
        "BaFT (T = 2): 1 of 2 runs failed",
        "ReFT: lr scaled",
    ]


def test_caption_says_of_how_many_records_each_protocol_is_a_mean(titled):
    rows = {(name, "continual-T2"): {"n": 2} for name in ("BaFT", "ReFT")}
    table = titled("Table 2", rows=rows, protocols=("single", "continual-T2"))
    assert table.caption.endswith("n = 4 (T = 1), 2 (T = 2) records")


def test_caption_names_rows_of_fewer_records(titled, results):
    fewer = titled("Table 1", rows={"ReFT": {"n": 1}})
    assert fewer.caption.endswith("n = 4 records, but ReFT 1")
    rows = {("ReFT", "continual-T2"): {"n": 2}}
    table = titled("Table 2", rows=rows, protocols=("single", "continual-T2"))
    assert table.caption.endswith("n = 4 records, but ReFT 2 (T = 2)")
    printed = summary_table("edits", [{**r.values} for r in results(rows={"ReFT": {"n": 1}})])
    assert printed.caption == "edits; n = 4 records, but ReFT 1"


def test_the_table_after_a_run_has_scores_and_cost(results):
    baft, _ = (result.values for result in results(portability=False))
    failed = {"method": "WISE", "error": "no memory"}
    title, *_, made, other = to_markdown(summary_table("edits", [baft, failed])).splitlines()
    assert title == "**edits; n = 4 records**"
    cells = [cell.strip() for cell in made.split("|")[1:-1]]
    assert cells[::4] == ["BaFT", "–"]
    assert cells[6] == "28,464"
    assert "not run: no memory" in other


def test_scores_that_only_some_records_have_get_tables_of_their_own(results):
    more = {"forced.Por: a": 1.0, "forced.Por: b": 0.5, "exact.Por: a": 0.5, "exact.Loc: c": 1.0}
    more |= {"wild.Gen EM": 0.0, "wild.Rel EM": 0.5, "wild.Rel EM_se": 0.1, "probes.yes": 0.25}
    made = results(rows={"BaFT": {"more": more}})
    tables = {t.caption: t for t in make_tables(made, PAPER)}
    (kinds,) = [t for caption, t in tables.items() if "by kind of probe; teacher" in caption]
    assert headings(kinds) == [("", ["Por: a", "Por: b"])]
    assert (values(kinds), values(kinds, "ReFT")) == ([1.0, 0.5], [None, None])
    # One kind of each says what the other table says already.
    assert not any("by kind of probe; generated" in caption for caption in tables)
    (wild,) = [t for caption, t in tables.items() if "as WILD scores it" in caption]
    assert headings(wild) == [("", ["Rel EM", "Gen EM"])]
    assert wild.rows["BaFT"][0].se == 0.1
    assert sum("further probes by kind" in caption for caption in tables) == 1


def of_paper(method="BaFT", model="Llama-2-7b-hf", dataset="zsre", T=100, batch_size=1):
    return Result(method, model, dataset, Protocol(T, batch_size), None, {}, None)


@pytest.mark.parametrize(
    ("cell", "printed"),
    [
        ({"T": 1000}, ("0.63", "0.60", "0.98")),
        ({"T": 1, "model": "gemma-1.1-7b-it"}, ("1.00", "0.84", "0.94")),
        ({"model": "meta-llama/Llama-2-7b-chat-hf"}, ("0.75", "0.70", "0.98")),
        ({"model": "Meta-Llama-3-8B-Instruct", "T": 10}, ("0.89", "0.82", "0.95")),
        ({"model": "Meta-Llama-3-8B"}, ("", "", "")),
        ({"dataset": "wikibio"}, ("", "", "")),
        ({"T": 20}, ("", "", "")),
        ({"batch_size": 10}, ("", "", "")),
    ],
)
def test_scores_are_those_that_the_paper_prints_for_the_cell(cell, printed):
    names = ("rewrite_acc", "rephrase_acc", "locality_acc", "portability_acc")
    found = tuple(PAPER.score(of_paper(**cell), name, (1, 2)) for name in names)
    assert found == (*printed, "")


@pytest.mark.parametrize(
    ("model", "hidden"),
    [("llama-2-7b", 4096), ("llama-3-8b-instruct", 4096), ("gemma-1.1-7b-it", 3072)],
)
def test_parameters_follow_from_the_method(model, hidden):
    # Table 6 prints Gemma's number for LLaMA-3: the formula tells them apart.
    reft = 4 * (2 * 12 * hidden + 12)
    for method, count in (("ReFT", reft), ("BaFT", reft + 4 * 13 * hidden)):
        assert PAPER.cost(of_paper(method, model), "trainable_parameters") == f"{count:,}"
