import re

import pytest
from synthetic import write_json, write_run

from baft_easyedit.bench.report import write_report
from baft_easyedit.bench.store import read_json

FEW = {"methods": ("BaFT", "ROME"), "num_cases": 20, "protocols": ("single",)}
EVERYTHING = {
    "methods": ("BaFT", "ReFT", "+ss-w&lr", "ROME"),
    "num_cases": 20,
    "protocols": ("single", "continual-T10", "batched-B2-T1", "batched-B2-T10"),
    "rows": {
        "ROME": {"error": "killed | after 600 s"},
        "ReFT": {"notes": ["scored in eval mode", "lr scaled by 2"]},
        ("BaFT", "continual-T10"): {"downstream_acc": 0.5, "downstream_pre_acc": 0.6},
    },
}
FIGURES = [
    *("figure1-reft-update", "figure2-baft-weights", "figure3-batch-size-T1"),
    *("figure3-batch-size-T10", "retention-T10"),
]


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    root = tmp_path_factory.mktemp("everything")
    files = write_report([write_run(root / "run", **EVERYTHING)], root / "new" / "out")
    return root / "new" / "out", files


def test_report_tables_and_figures_are_written(everything):
    out, files = everything
    figures = [f"{name}-llama-zsre-zsre.{kind}" for name in FIGURES for kind in ("png", "pdf")]
    assert [file.name for file in files] == ["report.md", "tables.tex", *figures]
    assert sorted(out.iterdir()) == sorted(files)
    assert files[2].read_bytes().startswith(b"\x89PNG")
    assert files[3].read_bytes().startswith(b"%PDF")


def test_markdown_has_all_tables_figures_notes_and_sources(everything):
    text = (everything[0] / "report.md").read_text(encoding="utf-8")
    for number in (1, 2, 3, 4, 8):
        assert f"as the paper's Table {number}" in text
    for name in FIGURES:
        assert f"({name}-llama-zsre-zsre.png)\n\n" in text
    assert r"not run: killed \| after 600 s" in text
    assert "- All rows: scored in eval mode\n- ReFT: lr scaled by 2" in text
    assert "run: baft-easyedit bench zsre_continual.yaml" in text
    assert "2026-01-02T03:04:05+00:00, status success, seed 0, code 0123456789abcdef" in text
    assert "EasyEdit generation current, version 14cea82" in text
    assert f"zsre_mend_edit.json, 12,345 bytes, sha256 {'ab' * 32}" in text
    tables = re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)
    for table in tables:  # has the same number of cells in each row
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1


def test_latex_has_the_same_tables(everything):
    markdown, latex = (
        (everything[0] / name).read_text(encoding="utf-8") for name in ("report.md", "tables.tex")
    )
    captions = re.findall(r"^\*\*(.*)\*\*$", markdown, flags=re.MULTILINE)
    in_latex = re.findall(r"^\\caption{(.*)}$", latex, flags=re.MULTILINE)
    assert [caption.replace(r"\_", "_") for caption in in_latex] == captions
    assert latex.startswith("% The tables need these lines")
    assert latex.count(r"\begin{table}") == latex.count(r"\end{table}") == len(captions) >= 10
    assert "ReFT: lr scaled by 2\\par" in latex
    assert "% run: baft-easyedit bench zsre_continual.yaml" in latex


def test_run_in_which_nothing_worked_is_reported_as_such(tmp_path):
    rows = {name: {"error": "no memory"} for name in FEW["methods"]}
    assert len(write_report([write_run(tmp_path / "run", **FEW, rows=rows)], tmp_path / "out")) == 2
    text = (tmp_path / "out" / "report.md").read_text("utf-8")
    assert "n = 0 records" in text
    assert "- All rows: not run: no memory" in text


def test_a_rows_name_is_no_mathematics_in_a_figure(tmp_path):
    run = write_run(
        tmp_path / "run",
        **{**FEW, "methods": ("$x|<_%_$", "_y"), "protocols": ("continual-T10",), "num_cases": 10},
    )
    files = write_report([run], tmp_path / "out")
    assert any(file.name.startswith("retention") for file in files)


def test_runs_of_different_records_are_told(tmp_path):
    one, other = (
        write_run(tmp_path / name, **{**FEW, "methods": (name,)}) for name in ("BaFT", "ReFT")
    )
    told = "These runs have different records"
    write_report([one, other], tmp_path / "same")
    assert told not in (tmp_path / "same" / "report.md").read_text("utf-8")
    info = read_json(other / "run.json")
    write_json(other / "run.json", {**info, "data": {**info["data"], "sha256": "0" * 64}})
    write_report([one, other], tmp_path / "out")
    assert told in (tmp_path / "out" / "report.md").read_text("utf-8")
    assert told in (tmp_path / "out" / "tables.tex").read_text("utf-8")


def test_each_model_and_data_set_has_a_chapter_with_its_own_sources(tmp_path):
    first = write_run(tmp_path / "first", **FEW)
    command = ["/home/me/baft_easyedit/__main__.py", "bench", "b.yaml", "--data", "/home/me/zsre"]
    write_json(first / "run.json", {**read_json(first / "run.json"), "command": command})
    second = write_run(tmp_path / "second", **FEW, model="gpt2", dataset="wikibio")
    write_json(second / "run.json", {**read_json(second / "run.json"), "git": None})
    write_report([first, second], tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text("utf-8")
    _, one, two = re.split(r"^## ", text, flags=re.MULTILINE)
    assert one.startswith("llama-zsre on zsre")
    assert two.startswith("gpt2 on wikibio")
    assert "- first: baft-easyedit bench b.yaml --data zsre\n" in one
    assert "- second: " not in one
    assert "- second: baft-easyedit bench zsre_continual.yaml\n" in two
    assert "seed 0, code installed\n" in two
    assert (tmp_path / "out" / "figure2-baft-weights-gpt2-wikibio.png").is_file()
