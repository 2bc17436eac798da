import pytest

from baft_easyedit.demo import compare, demo_config, show_edits, tables


def test_edits_are_shown_with_their_rephrasings_and_neighbours():
    lines = list(show_edits("cpu"))
    edited = [line for line in lines if line.startswith("  edited")]
    assert len(edited) == 3
    for headline, line in zip(lines[::5], edited, strict=True):
        prompt, _, new = headline.strip().split("   ")[0].partition(" -> ")
        assert line.startswith(f"  edited     {prompt} ... ")
        assert line.endswith(f" -> {new}")
    assert sum(line.endswith("(as before)") for line in lines if "neighbour" in line) >= 2


@pytest.mark.easyedit
@pytest.mark.usefixtures("worker_here")
def test_comparison_runs_methods_through_easyedit_and_keeps_failures_as_rows():
    config = demo_config(["BaFT", "SERAC"], 2, 1, "cpu")
    lines = "\n".join(tables(config, compare(config))).splitlines()
    assert lines[1] == "**single edits; n = 2 records**"
    assert lines[8] == "**the same, 2 edits in a row, scored after the last; n = 2 records**"
    rows = [line for line in lines if line.startswith("| BaFT")]
    assert len(rows) == 2
    assert rows[0].split("|")[2].strip() == "1.00"
    assert "3,080" in rows[0]
    assert sum("SERAC" in line and "not run: " in line for line in lines) == 2


def test_methods_and_numbers_are_checked():
    whole = demo_config([], 30, 2, "cpu")
    names = ["BaFT", "BaFT as in the paper", "ReFT"]
    assert [row.name for row in whole.methods][:3] == names
    assert (whole.T, demo_config(["GRACE"], 1, 1, "cpu").T) == ((1, 10), (1,))
    with pytest.raises(ValueError, match=r"method must be one of .*; got 'EDIT'"):
        demo_config(["EDIT"], 30, 2, "cpu")
    with pytest.raises(ValueError, match="jobs must be at least 1; got 0"):
        demo_config([], 30, 0, "cpu")
