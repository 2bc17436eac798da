import json

import pytest

from baft_easyedit.speed import SpeedOptions, SpeedReport, Sweep
from baft_easyedit.speed.measure import Sample
from baft_easyedit.speed.options import make_rows
from baft_easyedit.speed.report import RowResult

pytest.importorskip("matplotlib", reason="the charts need it")

HARDWARE = {"gpus": [], "torch_threads": 2}


def samples(edits, step_s, peak=None, edited=None):
    unedited = None if edited is None else 100.0
    return [Sample(s, 10, step_s, peak, edited, unedited) for s in edits]


@pytest.fixture
def report():
    options = SpeedOptions(methods=("BaFT", "ROME", "MEND"), repeats=3)
    rows = [RowResult(row) for row in make_rows(options)]
    replay, full, rome, mend = rows
    replay.samples, replay.step_bytes = samples([1.0, 9.0, 2.0], 0.1, 2 << 20, 95.0), 10**9
    replay.warm_up = Sample(50.0, peak_bytes=5 << 20)
    full.samples, full.step_bytes = samples([6.0, 8.0, 7.0], 0.4), 10**9
    rome.samples = [Sample(5.0), Sample(4.0), Sample(6.0)]
    rome.notes = ["ROME: a note"]
    mend.error = "ValueError: MEND cannot"
    return SpeedReport(options, {"hardware": HARDWARE}, rows, [1e10, 3e10, 2e10])


def test_summary_has_medians_and_ratios_to_the_default_engine(report):
    replay, full, rome, mend = map(report.summary, report.rows)
    assert (replay["edit_s"], replay["edit_ratio"], replay["step_ratio"]) == (2.0, 1.0, 1.0)
    assert (full["edit_ratio"], full["step_ratio"]) == (3.5, pytest.approx(4.0))
    assert (rome["edit_ratio"], rome["step_ratio"], rome["num_steps"]) == (2.5, None, None)
    assert set(mend.values()) == {None}


def test_bound_is_the_time_to_read_the_weights_at_the_median_bandwidth(report):
    replay, full, rome, _ = map(report.summary, report.rows)
    assert replay["bound_s"] == pytest.approx(1e9 / 2e10)
    assert replay["step_to_bound"] == pytest.approx(2.0)
    assert full["step_to_bound"] == pytest.approx(8.0)
    assert rome["step_to_bound"] is None


def test_memory_counts_the_warm_up_and_time_does_not(report):
    replay = report.summary(report.rows[0])
    assert replay["peak_bytes"] == 5 << 20
    assert replay["generation_ratio"] == pytest.approx(0.95)


def test_without_the_default_engine_there_are_no_ratios(report):
    report.rows.pop(0)
    assert report.summary(report.rows[0])["edit_ratio"] is None


def test_lines_show_rows_errors_and_notes(report):
    lines = report.lines()
    table = [" ".join(line.split()) for line in lines]
    assert "BaFT-replay 2.000 1.00 10 100.00 1.00 2.00 5 95.0 0.950" in table
    assert "BaFT-full 7.000 3.50 10 400.00 4.00 8.00 - - -" in table
    assert lines[-2:] == ["MEND: ValueError: MEND cannot", "ROME: a note"]
    assert "copy bandwidth 20.0 GB/s" in lines[2]


def test_lines_leave_out_columns_of_nothing(report):
    report.rows[0].samples = [Sample(1.0)]
    report.rows[0].warm_up = None
    header = next(line for line in report.lines() if "s/edit" in line)
    assert "x bound" in header
    assert "peak" not in header
    assert "tokens" not in header


def test_json_holds_every_sample_and_a_chart_lies_beside_it(report, tmp_path):
    report.write(tmp_path / "new" / "speed.json")
    files = report.files
    assert [file.name for file in files] == ["speed.json", "speed.png"]
    assert all(file.stat().st_size for file in files)
    content = json.loads(files[0].read_text(encoding="utf-8"))
    assert content["schema"] == 1
    assert content["bandwidth_bytes_per_s"] == {"median": 2e10, "samples": [1e10, 3e10, 2e10]}
    assert [s["edit_s"] for s in content["rows"][0]["samples"]] == [1.0, 9.0, 2.0]
    assert content["rows"][0]["summary"]["edit_s"] == 2.0
    assert content["rows"][3]["error"] == "ValueError: MEND cannot"
    assert content["options"]["methods"] == ["BaFT", "ROME", "MEND"]


def test_sweep_is_drawn_once_for_each_setting(tmp_path):
    options = SpeedOptions(sweeps=(Sweep("rank", (4, 8)), Sweep("batch", (1, 2))))
    rows = [RowResult(row, samples([1.0], 0.1)) for row in make_rows(options)]
    report = SpeedReport(options, {"hardware": HARDWARE}, rows)
    report.write(tmp_path / "speed.json")
    assert [f.name for f in report.files] == ["speed.json", "speed-rank.png", "speed-batch.png"]
    assert {report.summary(r)["edit_ratio"] for r in rows} == {1.0}
    assert report.bandwidth is None
