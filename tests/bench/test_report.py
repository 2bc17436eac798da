import re

import pytest
from synthetic import write_json, write_run

from baft_easyedit.bench.report import write_report

FEW = {"methods": ("BaFT", "ReFT", "ROME"), "num_cases": 20, "protocols": ("single",)}
FAILED = FEW | {"rows": {name: {"error": "no memory"} for name in FEW["methods"]}}
EVERYTHING = FEW | {
    "methods": ("BaFT", "ReFT", "+ss-w&lr", "ROME"),
    "protocols": ("single", "continual-T10", "batched-B2-T1", "batched-B2-T10"),
    "rows": {
        "ROME": {"error": "killed | after 600 s"},
        "ReFT": {"notes": ["scored in eval mode", "lr scaled by 2"]},
        ("BaFT", "continual-T10"): {"downstream_acc": 0.5, "downstream_pre_acc": 0.6},
    },
}
FIGURES = (
    "figure1-reft-update",
    "figure2-baft-weights",
    "figure3-batch-size-T1",
    "figure3-batch-size-T10",
    "retention-T10",
    "cost-quality",
)


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    root = tmp_path_factory.mktemp("everything")
    files = write_report([write_run(root / "run", **EVERYTHING)], root / "new" / "out")
    return root / "new" / "out", files


def test_report_tables_and_figures_are_written(everything):
    out, files = everything
    assert [file.name for file in files] == [
        "report.md",
        "tables.tex",
        *(f"{name}-llama-zsre-zsre.{kind}" for name in FIGURES for kind in ("png", "pdf")),
    ]
    assert sorted(out.iterdir()) == sorted(files)


def test_markdown_has_all_tables_figures_notes_and_sources(everything):
    text = (everything[0] / "report.md").read_text(encoding="utf-8")
    for number in (1, 2, 3, 4, 8):
        assert f"as the paper's Table {number}" in text
    for name in FIGURES:
        assert f"({name}-llama-zsre-zsre.png)\n\n" in text
    assert r"not run: killed \| after 600 s" in text
    assert "1. lr scaled by 2\n- All rows: scored in eval mode" in text
    assert "<sup>1</sup>" in text
    assert "run: baft-easyedit bench zsre_continual.yaml" in text
    assert "2026-01-02T03:04:05+00:00, status success, seed 0, code 0123456789abcdef" in text
    assert "EasyEdit generation current, version 14cea82" in text
    assert f"zsre_mend_edit.json, 12,345 bytes, sha256 {'ab' * 32}" in text
    assert "Not here" not in text


def test_rows_of_a_markdown_table_have_the_same_number_of_cells(everything):
    text = (everything[0] / "report.md").read_text(encoding="utf-8")
    tables = re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)
    assert len(tables) >= 10
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1


def test_latex_has_the_same_tables(everything):
    markdown, latex = (
        (everything[0] / name).read_text(encoding="utf-8") for name in ("report.md", "tables.tex")
    )
    captions = re.findall(r"^\*\*(.*)\*\*$", markdown, flags=re.MULTILINE)
    in_latex = re.findall(r"^\\caption{(.*)}$", latex, flags=re.MULTILINE)
    assert [caption.replace(r"\_", "_") for caption in in_latex] == captions
    assert latex.startswith("% The tables need these lines")
    assert r"\usepackage{booktabs,graphicx}" in latex
    assert latex.count(r"\begin{table}") == latex.count(r"\end{table}") == len(captions)
    assert r"+ss-w\&lr" in latex
    assert r"\textsuperscript{1} lr scaled by 2\par" in latex
    assert "% run: baft-easyedit bench zsre_continual.yaml" in latex


def test_what_is_missing_is_named_with_what_it_needs(tmp_path):
    run_dir = write_run(tmp_path / "run", **FEW | {"methods": ("ROME",)})
    files = write_report([run_dir], tmp_path / "out")
    assert [file.stem for file in files[2:]] == ["cost-quality-llama-zsre-zsre"] * 2
    _, _, missing = (tmp_path / "out" / "report.md").read_text("utf-8").partition("### Not here")
    for need in (
        "Table 2, edits in a row: T above 1",
        "Figure 1, the bases of a ReFT update: a row ReFT, and `basis: true`",
        "Figure 2, the basis weights of BaFT: a row BaFT, and `basis: true`",
        "Figure 3, scores against batch size: two batch sizes or more",
        "Retention of old edits: T of 10 or more",
    ):
        assert f"- {need}" in missing


def test_run_in_which_nothing_worked_is_reported_as_such(tmp_path):
    run_dir = write_run(tmp_path / "run", **FAILED)
    assert len(write_report([run_dir], tmp_path / "out")) == 2
    text = (tmp_path / "out" / "report.md").read_text("utf-8")
    assert "n = 0 records" in text
    assert text.count("not run: no memory") == 2 * 3  # scores and cost
    assert "Quality against time: rows with scores and edit times" in text


def test_each_model_and_data_set_has_a_section_with_its_own_sources(tmp_path):
    options = FEW | {"methods": ("ROME",)}
    first = write_run(tmp_path / "first", **options)
    second = write_run(tmp_path / "second", **options, model="gpt2", dataset="wikibio")
    write_report([first, second], tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text("utf-8")
    _, one, two = re.split(r"^## ", text, flags=re.MULTILINE)
    assert one.startswith("llama-zsre on zsre")
    assert two.startswith("gpt2 on wikibio")
    assert ("- first: " in one, "- second: " in one) == (True, False)
    assert ("- first: " in two, "- second: " in two) == (False, True)
    assert (tmp_path / "out" / "cost-quality-gpt2-wikibio.png").is_file()


def test_paper_model_adds_rows_of_the_paper(tmp_path):
    run_dir = write_run(tmp_path / "run", **FAILED | {"protocols": ("continual-T10",)})
    write_report([run_dir], tmp_path / "plain")
    write_report([run_dir], tmp_path / "compared", paper_model="meta-llama/Llama-2-7b-hf")
    plain, compared = (
        (tmp_path / name / "report.md").read_text("utf-8") for name in ("plain", "compared")
    )
    assert "paper, llama-2-7b" not in plain
    assert re.search(r"\| BaFT: paper, llama-2-7b \| +0\.89 \| +0\.84 \| +0\.97 \|", compared)


def test_run_that_recorded_little_is_still_reported(tmp_path):
    run_dir = write_run(tmp_path / "run", **FAILED)
    write_json(run_dir / "run.json", {"schema": 1, "git": None})
    write_report([run_dir], tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text("utf-8")
    assert "- run: 'command not recorded'" in text
    assert "EasyEdit not recorded" in text


def test_report_needs_a_run(tmp_path):
    with pytest.raises(ValueError, match="run_dirs must name at least one run directory"):
        write_report([], tmp_path / "out")


def test_bad_input_leaves_nothing_behind(tmp_path):
    run_dir = write_run(tmp_path / "run", **FEW)
    with pytest.raises(ValueError, match="paper_model must be a model of the paper"):
        write_report([run_dir], tmp_path / "out", paper_model="gpt2")
    with pytest.raises(ValueError, match="is not the directory of a finished run"):
        write_report([tmp_path], tmp_path / "out")
    assert not (tmp_path / "out").exists()
