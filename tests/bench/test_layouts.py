import pytest
from synthetic import write_run

from baft_easyedit.bench.layouts import Section
from baft_easyedit.bench.paper import read_paper_numbers
from baft_easyedit.bench.results import read_run


@pytest.fixture
def section(tmp_path):
    def make(paper_model=None, **options):
        options = {"methods": ("BaFT", "ReFT"), "num_cases": 4, "protocols": ("single",)} | options
        run = read_run(write_run(tmp_path / "run", **options))
        return Section(run.results, read_paper_numbers(), paper_model)

    return make


def titled(tables, *parts):
    """Return the only table whose caption has all parts."""
    (found,) = [table for table in tables if all(part in table.caption for part in parts)]
    return found


def row_of(table, label):
    (row,) = [row for row in table.rows if row.label == label]
    return row


def texts(table):
    return [(group.title, [c.title for c in group.columns]) for group in table.header]


SCORES = ["Rel", "Gen", "Loc", "Por"]


def test_teacher_forced_and_generated_scores_never_share_a_table(section):
    made = section()
    (result, _), tables = made.results, made.tables()
    forced = titled(
        tables, "single edits", "teacher forced", "the paper's Table 1", "n = 4 records"
    )
    generated = titled(tables, "single edits", "generated text: greedy, natural stop, exact match")
    assert texts(forced) == texts(generated) == [("", SCORES)]
    names = ("rewrite_acc", "rephrase_acc", "locality_acc", "portability_acc")
    assert [c.value for c in row_of(forced, "BaFT").cells] == [result.values[n] for n in names]
    assert [c.se for c in row_of(forced, "BaFT").cells] == [result.values[n + "_se"] for n in names]
    assert [c.value for c in row_of(generated, "BaFT").cells] == [
        result.values["gen_" + n] for n in names
    ]


def test_portability_has_no_column_where_no_record_asks_for_it(section):
    made = section(portability=False)
    assert texts(titled(made.tables(), "teacher forced", "Table 1")) == [("", SCORES[:3])]
    assert not [table for table in made.tables() if "portability" in table.caption]


def test_score_without_probes_stays_as_a_missing_cell(section):
    made = section(rows={"BaFT": {"rephrase_acc": None}, "ReFT": {"rephrase_acc": None}})
    table = titled(made.tables(), "teacher forced", "Table 1")
    assert texts(table) == [("", SCORES)]
    assert row_of(table, "BaFT").cells[1].value is None


def test_continual_table_begins_with_single_edits(section):
    made = section(protocols=("continual-T4", "single", "continual-T2"))
    table = titled(made.tables(), "T edits in a row, all scored after the T-th", "teacher forced")
    assert "the paper's Table 2" in table.caption
    assert texts(table) == [("T = 1", SCORES), ("T = 2", SCORES), ("T = 4", SCORES)]
    immediate = titled(made.tables(), "each scored right after itself")
    assert texts(immediate) == [("T = 2", SCORES[:2]), ("T = 4", SCORES[:2])]


def test_batched_table_has_columns_for_each_protocol(section):
    made = section(protocols=("batched-B2-T2", "batched-B2-T1"))
    table = titled(made.tables(), "T edit calls in a row of B records each", "teacher forced")
    assert [group.title for group in table.header] == ["B = 2, T = 1", "B = 2, T = 2"]


def test_ablation_stands_between_reft_and_baft_and_only_there(section):
    made = section(
        methods=("BaFT", "+ss-w", "FT-L", "ReFT"),
        protocols=("single", "continual-T2"),
        rows={("+ss-w", "single"): {"error": "no"}},
    )
    main = titled(made.tables(), "Table 2")
    assert [row.label for row in main.rows] == ["BaFT", "FT-L", "ReFT"]
    ablation = titled(made.tables(), "Table 4", "T edits in a row", "teacher forced")
    assert [row.label for row in ablation.rows] == ["ReFT", "+ss-w", "BaFT"]


def test_number_of_the_paper_stands_beside_ours(section):
    made = section(
        model="Llama-2-7b-hf",
        methods=("BaFT", "+ba-w", "LoRA"),
        protocols=("continual-T100",),
    )
    main = titled(made.tables(), "Table 2", "teacher forced")
    assert [c.paper for c in row_of(main, "BaFT").cells] == ["0.75", "0.70", "0.98", None]
    assert [c.paper for c in row_of(main, "LoRA").cells] == [None] * 4
    ablation = titled(made.tables(), "Table 4", "teacher forced")
    assert [c.paper for c in row_of(ablation, "BaFT").cells] == ["0.73", "0.67", "0.98", None]
    cost = titled(made.tables(), "cost:")
    assert [c.paper for c in row_of(cost, "BaFT").cells] == ["606,256", "13.5", None]
    generated = [table for table in made.tables() if "generated text" in table.caption]
    assert {c.paper for table in generated for row in table.rows for c in row.cells} == {None}


def test_other_model_of_the_paper_is_shown_in_rows_of_its_own_if_asked_for(section):
    made = section(paper_model="llama-2-7b", protocols=("single", "continual-T10"))
    main = titled(made.tables(), "Table 2", "teacher forced")
    row = row_of(main, "BaFT: paper, llama-2-7b")
    assert [c.text for c in row.cells] == [
        "1.00",
        "0.94",
        "0.97",
        None,
        "0.89",
        "0.84",
        "0.97",
        None,
    ]
    assert {c.paper for c in row_of(main, "BaFT").cells} == {None}
    cost = titled(made.tables(), "cost:")
    row = row_of(cost, "WISE_light: paper, llama-2-7b")
    assert [c.text for c in row.cells] == [None, "58", None, None, None]


def test_model_of_the_paper_has_no_second_row_of_its_own_numbers(section):
    made = section(paper_model="llama-2-7b", model="Llama-2-7b-hf")
    assert {row.label for table in made.tables() for row in table.rows} == {"BaFT", "ReFT"}


def test_cost_table_has_parameters_seconds_and_memory(section):
    made = section(protocols=("single", "continual-T2"))
    table = titled(made.tables(), "cost:", "the paper's Table 3")
    assert texts(table) == [
        ("", ["parameters"]),
        ("T = 1", ["s/edit", "MiB"]),
        ("T = 2", ["s/edit", "MiB"]),
    ]
    parameters, seconds, memory, *_ = row_of(table, "BaFT").cells
    assert (parameters.value, parameters.style) == (28464, "second")  # fewer are better
    assert seconds.value == made.results[0].values["edit_time_s"]
    assert memory.value == 400_000_000 / 2**20


def test_parameters_that_differ_between_protocols_are_a_range(section):
    rows = {("BaFT", "continual-T2"): {"trainable_parameters": 1234567}}
    made = section(rows=rows, protocols=("single", "continual-T2"))
    cell = row_of(titled(made.tables(), "cost:"), "BaFT").cells[0]
    assert cell.text == "28,464 to 1,234,567"


def test_downstream_table_has_the_protocols_after_which_the_task_was_asked(section):
    piqa = {"downstream_pre_acc": 0.6, "downstream_acc": 0.5}
    rows = {("BaFT", "continual-T2"): piqa, ("ReFT", "continual-T2"): {"error": "killed"}}
    made = section(rows=rows, protocols=("single", "continual-T2"))
    table = titled(made.tables(), "PIQA", "Table 8")
    assert texts(table) == [("T = 2", ["before", "after"])]
    assert [c.value for c in row_of(table, "BaFT").cells] == [0.6, 0.5]
    assert row_of(table, "ReFT").error == "killed"


def test_method_that_did_not_run_says_so_in_every_table(section):
    reason = "ValueError: WISE is not in the release 0.0.1.dev0 of EasyEdit, use a clone"
    made = section(methods=("BaFT", "ReFT", "WISE"), rows={"WISE": {"error": reason}})
    for table in made.tables():
        row = row_of(table, "WISE")
        assert row.error == "ValueError: WISE is not in the release 0.0.1.dev0…"
        assert made.notes[row.marks[0] - 1] == f"not run: {reason}"


def test_protocol_that_did_not_run_says_so_in_its_columns(section):
    rows = {("ReFT", "continual-T4"): {"error": "timeout"}}
    made = section(rows=rows, protocols=("single", "continual-T4"))
    cells = row_of(titled(made.tables(), "Table 2"), "ReFT").cells
    assert cells[0].value is not None
    assert (cells[4].text, [c.value for c in cells[4:]]) == ("not run", [None] * 4)
    assert made.notes[cells[4].marks[0] - 1] == "not run: timeout"


def test_notes_are_numbered_through_the_tables_and_common_ones_told_once(section):
    eval_mode = "scored in eval mode"
    rows = {
        "ReFT": {"notes": [eval_mode, "lr scaled"]},
        ("BaFT", "continual-T2"): {"notes": [eval_mode, "1 of 2 runs failed"]},
    }
    made = section(rows=rows, protocols=("single", "continual-T2"))
    main = titled(made.tables(), "Table 2", "teacher forced")
    assert made.common_notes == [eval_mode]
    assert sorted(made.notes) == ["T = 2: 1 of 2 runs failed", "lr scaled"]
    assert [made.notes[mark - 1] for mark in row_of(main, "ReFT").marks] == ["lr scaled"]
    assert [made.notes[mark - 1] for mark in row_of(main, "BaFT").marks] == [
        "T = 2: 1 of 2 runs failed"
    ]


def test_caption_says_of_how_many_records_each_protocol_is_a_mean(section):
    rows = {("BaFT", "continual-T2"): {"n": 2}, ("ReFT", "continual-T2"): {"n": 2}}
    made = section(rows=rows, protocols=("single", "continual-T2"))
    assert "n = 4 (T = 1), 2 (T = 2) records" in titled(made.tables(), "Table 2").caption


def test_gaps_name_the_tables_that_the_run_cannot_give(section):
    gaps = section(generation=False).gaps()
    assert [gap.split(":")[0] for gap in gaps] == [
        "Table 2, edits in a row",
        "Batched edits",
        "Table 4, the ablation",
        "Scores of generated text",
        "Table 8, PIQA after the edits",
    ]


def test_gaps_tell_when_the_paper_has_no_scores_to_compare_with(section):
    unknown = (
        "Scores of llama-2-7b from the paper: none are known for wikibio under these protocols"
    )
    assert section(paper_model="llama-2-7b", dataset="wikibio").gaps()[-1] == unknown


def test_gaps_are_silent_when_the_paper_has_scores(section):
    assert not [gap for gap in section(paper_model="llama-2-7b").gaps() if "the paper:" in gap]
