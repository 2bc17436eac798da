import pytest

from baft_easyedit import BaFTHyperParams
from baft_easyedit.demo import (
    DEMO_METHODS,
    bundled_presets,
    check_methods,
    compare,
    show_edits,
    table,
)
from baft_easyedit.easyedit.host import find_host
from baft_easyedit.easyedit.records import RunResult
from baft_easyedit.hparams import read_hparams


@pytest.fixture(scope="module")
def bundled_hparams():
    return BaFTHyperParams.from_hparams("BaFT/facts-llama")


@pytest.fixture
def _host():
    try:
        find_host()
    except ImportError as error:
        pytest.skip(f"no EasyEdit: {error}")


def test_edits_are_shown_with_their_rephrasings_and_neighbours(bundled_hparams):
    lines = list(show_edits(bundled_hparams))
    edited = [line for line in lines if line.startswith("  edited")]
    assert len(edited) == 3
    for headline, line in zip(lines[::5], edited, strict=True):
        old, _, new = headline.split(": ", 1)[1].split("   ")[0].partition(" -> ")
        assert line.endswith(f"... {old} -> {new}")
    assert sum(line.endswith("(as before)") for line in lines if "neighbour" in line) >= 2


@pytest.mark.easyedit
@pytest.mark.usefixtures("_host")
def test_comparison_runs_methods_through_easyedit_and_keeps_failures_as_rows(bundled_hparams):
    lines = list(compare(bundled_hparams, ["BaFT", "EMMET"], num_cases=2, num_jobs=2))
    assert "2 single edits" in lines[0]
    assert "10 edits in a row, scored after the last" in lines[5]
    rows = [line for line in lines if line.startswith("| BaFT")]
    assert len(rows) == 2
    assert rows[0].split("|")[2].strip() == "1.00"
    assert "28,464" in rows[0]
    assert sum("EMMET" in line and "not run: " in line for line in lines) == 2


def test_table_shows_missing_scores_and_errors_as_such():
    done = RunResult("BaFT", "single", 3, 1.0, 0.5, 0.987, None, 0.25, 0.3, 28464)
    failed = RunResult("WISE", "single", error="ValueError: " + "x" * 200 + "\nmore")
    lines = list(table([done, failed]))
    assert lines[2] == "| BaFT   | 1.00 | 0.50 | 0.99 |   -  |   0.25 |     28,464 |"
    assert lines[3].startswith("| WISE   | not run: ValueError: xxx")
    assert "more" not in lines[3]
    assert len(lines[3]) < 130


def test_bundled_settings_depend_on_the_protocol():
    single, in_a_row = bundled_presets(None), bundled_presets(10)
    assert single["BaFT"] != in_a_row["BaFT"]
    for presets in (single, in_a_row):
        assert [read_hparams(presets[m]).alg_name for m in ("BaFT", "ReFT")] == ["BaFT", "ReFT"]


def test_methods_are_checked():
    assert check_methods(()) == DEMO_METHODS
    assert check_methods(["BaFT", "GRACE"]) == ("BaFT", "GRACE")
    with pytest.raises(ValueError, match=r"methods must be among BaFT, ReFT, .*; got 'EMMET'"):
        check_methods(["EMMET"])


@pytest.mark.parametrize(("cases", "jobs", "name"), [(0, 1, "cases"), (1, 0, "jobs")])
def test_numbers_below_one_are_refused(bundled_hparams, cases, jobs, name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1; got 0"):
        next(compare(bundled_hparams, ["BaFT"], cases, jobs))
