import json
import logging
import os
from mmap import mmap
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch

from baft_easyedit.bench.process import WorkerError
from baft_easyedit.generation import load_model
from baft_easyedit.model.hooks import attached_edit
from baft_easyedit.speed import SpeedOptions, SpeedReport, run_speed
from baft_easyedit.speed.inputs import random_model, random_requests, shape_sizes
from baft_easyedit.speed.measure import (
    OurMethod,
    PeerMethod,
    Sample,
    bytes_per_step,
    copy_bandwidth,
    kernel_table,
    measure,
    profiled,
    step_times,
    with_peak,
)
from baft_easyedit.speed.report import RowResult
from baft_easyedit.speed.run import _jobs, _records, measurements
from tests.conftest import make_model, save_tiny_llama

CPU = torch.device("cpu")
SHAPE = "llama-4x64"


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"shape": "bert"}, "shape must be one of llama-2-7b, .*; got 'bert'"),
        ({"shape": "llama-2x65"}, "a multiple of 64 as width, .*; got 'llama-2x65'"),
        ({"methods": ()}, "methods must name at least one method"),
        ({"methods": ("BaFT", "BaFT-full")}, "methods must not name a row twice"),
        ({"methods": ("BaFT-fast",)}, "methods must have an engine of cached, full; got"),
        ({"methods": ("FT-X",)}, "method must be one of .*; got 'FT-X'"),
        ({"out": Path("speed.txt")}, "out must name a .json file"),
        ({"profile": True}, "out must be given with profile; got None"),
        ({"data": "zsre.json"}, "data must have the form KIND=PATH, with a kind of facts, zsre"),
    ],
)
def test_bad_option_is_named(options, match):
    with pytest.raises(ValueError, match=match):
        SpeedOptions(**options)


def test_baft_means_a_row_for_each_engine():
    rows = SpeedOptions(methods=("BaFT", "ReFT-full", "FT-M")).rows
    assert [row.name for row in rows] == ["BaFT-cached", "BaFT-full", "ReFT-full", "FT-M"]
    assert [row.engine for row in rows] == ["cached", "full", "full", None]


def test_rows_share_a_process_on_cuda_only():
    def sizes(device):
        options = SpeedOptions(model="bundled", methods=("BaFT", "FT-M"), device=device)
        return [len(rows) for rows, _ in _jobs(options, None)]

    assert sizes("cpu") == [1, 1, 1]
    assert sizes(0) == [2, 1]


def test_records_are_those_from_the_start_on():
    few = SpeedOptions(data="facts=", start=3, repeats=1, batch_size=2)
    more = SpeedOptions(data="facts=", start=0, repeats=6)
    assert _records(few) == _records(more)[3:]
    assert _records(SpeedOptions()) == []


@pytest.mark.parametrize(
    ("shape", "count"),
    [("llama-2-7b", 6_738_415_616), ("llama-3-8b", 8_030_261_248), ("gemma-7b", 8_537_680_896)],
)
def test_named_shape_has_the_size_of_its_model(shape, count):
    model, _ = random_model(shape, torch.device("meta"), torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) == count


def test_random_model_is_made_in_its_dtype_and_leaves_the_random_state():
    state = torch.get_rng_state()
    model, tokenizer = random_model("llama-2x64", CPU, torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.config.num_hidden_layers == shape_sizes("llama-2x64")["num_hidden_layers"] == 2
    assert not model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert len(tokenizer) <= model.config.vocab_size


@pytest.mark.parametrize("prompt_length", [4, 200])
def test_requests_have_exactly_the_wanted_tokens(prompt_length):
    tokenizer = load_model("bundled")[1]
    requests = random_requests(tokenizer, prompt_length, count=3, seed=1)
    for request in requests:
        prompt = len(tokenizer(request["prompt"])["input_ids"])
        text = f"{request['prompt']} {request['target_new']}"
        assert (prompt, len(tokenizer(text)["input_ids"])) == (prompt_length, prompt_length + 4)
        assert request["subject"] in request["prompt"]
    assert len({request["prompt"] for request in requests}) == 3
    assert random_requests(tokenizer, prompt_length, count=3, seed=1) == requests


def test_prompt_that_is_never_reached_is_refused():
    def two_a_word(text):
        return {"input_ids": [0] * 2 * len(text.split())}

    with pytest.raises(ValueError, match=r"prompt_length must be one that .*; got 9 tokens in all"):
        random_requests(two_a_word, 9, count=1, seed=0)


def test_bytes_per_step_are_those_of_later_layers_norm_and_head_twice():
    model = make_model()
    layers = sum(p.numel() for layer in model.model.layers[2:] for p in layer.parameters())
    outside = model.model.norm.weight.numel() + model.lm_head.weight.numel()
    assert bytes_per_step(model, 1) == 2 * 4 * (layers + outside)
    model.lm_head.weight = model.model.embed_tokens.weight  # counted once
    assert bytes_per_step(model, 3) == 2 * 4 * outside


def test_copy_bandwidth_is_that_of_a_computer():
    assert 1e8 < copy_bandwidth(CPU, num_bytes=8 << 20) < 1e13


def test_peak_of_memory_counts_what_is_freed_again(monkeypatch):
    def use():
        pages = mmap(-1, 64 << 20)  # new ones, whatever malloc has kept
        pages[::4096] = bytes(len(pages) // 4096)

    peak, _ = with_peak(use, CPU)
    assert peak is None or 60 << 20 < peak < 90 << 20
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert with_peak(lambda: 1, CPU) == (None, 1)


@pytest.mark.parametrize("steps", [1, 3])
def test_our_method_takes_all_steps_and_leaves_no_edit(steps):
    options = SpeedOptions(methods=("BaFT-cached",), steps=steps)
    method = OurMethod(*random_model(SHAPE, CPU, torch.float32), options.rows[0], options)
    before = [p.clone() for p in method.model.parameters()]
    requests = random_requests(method.tokenizer, 12, count=2, seed=0)
    sample = measure(method, requests, new_tokens=4 if steps > 1 else 0)
    assert sample.num_steps == steps
    assert sample.bound_s > 0
    speeds = (sample.edited_tokens_per_s, sample.unedited_tokens_per_s)
    if steps > 1:
        assert abs(sample.step_s) < sample.edit_s
        assert min(speeds) > 0
    else:
        assert {sample.step_s, *speeds} == {None}
    assert attached_edit(method.model) is None
    assert all(map(torch.equal, before, method.model.parameters()))


def test_steps_of_any_optimiser_are_timed_inside_the_context_only():
    p = torch.nn.Parameter(torch.ones(1))
    p.grad = torch.ones(1)
    optimizers = [torch.optim.SGD([p]), torch.optim.AdamW([p])]
    with step_times() as times:
        for optimizer in optimizers:
            optimizer.step()
    optimizers[0].step()
    assert len(times) == 2


@pytest.mark.easyedit
def test_peer_is_measured_and_restored(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # EasyEdit writes ./logs
    peer = PeerMethod("FT-L", str(save_tiny_llama(tmp_path)), SpeedOptions())
    before = [p.clone() for p in peer.model.parameters()]
    one, other = ({"prompt": f"{name} is", "target_new": "so"} for name in ("One", "Two"))
    sample = measure(peer, [one], new_tokens=3)
    assert sample.num_steps >= 2
    assert 0 < sample.step_s < sample.edit_s
    assert all(map(torch.equal, before, peer.model.parameters()))
    monkeypatch.setattr("baft_easyedit.speed.measure.batchable", lambda *_: False)
    with pytest.raises(ValueError, match=r"batch_size must be 1 for FT-L, .*; got 2"):
        peer.edit([one, other])


@pytest.mark.slow
def test_a_row_that_fails_leaves_the_others_of_its_process(monkeypatch):
    original = OurMethod.edit

    def edit(self, requests):
        if self._editor.hparams.engine == "full":
            raise ValueError("no memory")
        return original(self, requests)

    monkeypatch.setattr(OurMethod, "edit", edit)
    logger = logging.getLogger("baft_easyedit")
    monkeypatch.setattr(logger, "handlers", [*logger.handlers])
    monkeypatch.setattr(logging.Logger, "setLevel", lambda *_: None)
    small = {"steps": 2, "repeats": 1, "new_tokens": 0, "prompt_length": 8}
    options = SpeedOptions(shape=SHAPE, methods=("BaFT",), **small)
    found = [(bool(s), error) for s, error, *_ in measurements(options, options.rows, None, [])]
    assert found == [(True, None), (False, "ValueError: no memory"), (True, None)]


def test_model_or_device_that_is_none_is_refused(tmp_path, monkeypatch):
    with pytest.raises(OSError, match=r"has no config\.json"):
        run_speed(SpeedOptions(model=str(tmp_path)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"device must be on this machine.*no CUDA device; got 0"):
        run_speed(SpeedOptions(device=0))


@pytest.mark.slow
def test_run_fails_if_no_row_can_be_measured():
    with pytest.raises(WorkerError, match="no method could be measured: ValueError: SERAC needs"):
        run_speed(SpeedOptions(model="bundled", methods=("SERAC",), repeats=1))


@pytest.mark.slow
def test_run_measures_in_a_process_and_writes_files(tmp_path):
    moved, out = [], tmp_path / "new" / "speed.json"
    options = SpeedOptions(
        shape=SHAPE,
        methods=("BaFT-cached",),
        prompt_length=8,
        steps=3,
        repeats=2,
        threads=1,
        new_tokens=2,
        profile=True,
        out=out,
    )
    report = run_speed(options, lambda total, done: lambda n: moved.append((total, n)))
    assert moved == [(3, 1)] * 3
    assert [file.name for file in report.files] == ["speed.json", "speed-BaFT-cached-profile.txt"]
    assert "aten::mm" in report.files[1].read_text(encoding="utf-8")
    content = json.loads(out.read_text(encoding="utf-8"))
    (row,) = content["rows"]
    assert len(row["samples"]) == 2
    assert row["first"]["edit_s"] == row["summary"]["first_s"] > 0
    assert row["summary"]["num_steps"] == 3
    assert row["summary"]["step_to_bound"] is not None
    assert "profile" not in row
    assert content["options"]["methods"] == ["BaFT-cached"]


def test_profile_of_a_gpu_is_of_one_edit_and_sums_its_kernels_by_name(monkeypatch):
    """By a stand-in for torch's profiler."""
    kernel = {"cat": "kernel", "dur": 1500.0}
    events = [{**kernel, "name": name} for name in ("mm", "add", "mm", "mul")]
    copy = {"cat": "gpu_memcpy", "name": "Memcpy DtoD", "dur": 100.0}
    events += [copy, {"cat": "cpu_op", "name": "aten::mm", "dur": 9e9}, {"ph": "M", "name": "gone"}]
    seen, calls = MagicMock(), []
    entered = seen.return_value.__enter__.return_value
    entered.export_chrome_trace = lambda path: Path(path).write_text(
        json.dumps({"traceEvents": events})
    )
    monkeypatch.setattr("baft_easyedit.speed.measure.profile", seen)
    monkeypatch.setattr("baft_easyedit.speed.measure.synchronize", lambda device: None)
    run = lambda requests: calls.append(requests) or (lambda: calls.append("undone"))  # noqa: E731
    table = profiled(SimpleNamespace(device=torch.device("cuda"), run=run), "requests")
    assert calls == ["requests", "undone"]
    assert [a.name for a in seen.call_args.kwargs["activities"]] == ["CUDA"]
    lines = [["3.00", "2", "mm"], ["1.50", "1", "add"], ["1.50", "1", "mul"]]
    lines += [["0.10", "1", "Memcpy", "DtoD"], ["0.00", "0", "others"], ["6.10", "5", "all"]]
    assert [line.split() for line in table.splitlines()] == [["ms", "kernels"], *lines]
    assert ["1.60", "2", "others"] in [
        line.split() for line in kernel_table(events, 2).splitlines()
    ]


@pytest.fixture
def report():
    options = SpeedOptions(methods=("BaFT", "ROME", "MEND"), repeats=3, threads=2)
    rows = [RowResult(row) for row in options.rows]
    cached, full, rome, mend = rows
    cached.first = Sample(50.0, peak_bytes=5 << 20)
    cached.samples = [Sample(s, 10, 0.1, 2 << 20, 95.0, 100.0, 0.05) for s in (1.0, 9.0, 2.0)]
    full.samples = [Sample(s, 10, 0.4) for s in (6.0, 8.0, 7.0)]
    rome.samples, rome.notes = [Sample(5.0), Sample(4.0), Sample(6.0)], ["ROME: a note"]
    mend.error = "ValueError: MEND cannot"
    return SpeedReport(options, rows)


def test_summary_has_medians_of_warm_edits_and_ratios_to_the_default_engine(report):
    found = report.summary()
    cached, full, rome, mend = found.to_dict("index").values()
    assert (cached["first_s"], cached["edit_s"], cached["edit_ratio"]) == (50.0, 2.0, 1.0)
    assert cached["peak_bytes"] == 5 << 20  # of the first edit too
    assert cached["step_to_bound"] == pytest.approx(2.0)
    assert cached["generation_ratio"] == pytest.approx(0.95)
    assert (full["edit_ratio"], full["step_ratio"]) == (3.5, pytest.approx(4.0))
    assert rome["edit_ratio"] == 2.5
    assert found.loc["ROME", ["step_ratio", "num_steps"]].isna().all()
    assert found.loc["MEND"].isna().all()
    assert report.as_json()["rows"][-1]["summary"] == dict.fromkeys(mend)
    report.rows.pop(0)
    assert report.summary()["edit_ratio"].isna().all()


def test_lines_show_rows_errors_and_notes_and_no_columns_of_nothing(report):
    lines = report.lines()
    table = [" ".join(line.split()) for line in lines]
    assert "BaFT-cached 50.000 2.000 1.00 10 100.00 1.00 2.00 5 95.0 0.950" in table
    assert "BaFT-full - 7.000 3.50 10 400.00 4.00 - - - -" in table
    assert lines[-2:] == ["MEND: ValueError: MEND cannot", "ROME: a note"]
    report.rows[0].samples, report.rows[0].first = [Sample(1.0)], None
    header = next(line for line in report.lines() if "s/edit" in line)
    assert not {"first", "bound", "peak", "tokens/s"} & set(header.split())
