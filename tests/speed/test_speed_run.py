import sys
from pathlib import Path

import pytest
import torch

from baft_easyedit.model.hooks import attached_edit
from baft_easyedit.speed import SpeedOptions, Sweep, run_speed
from baft_easyedit.speed.hardware import (
    MemoryMeter,
    _highest_resident,
    _reset_is_possible,
    bytes_per_step,
    copy_bandwidth,
)
from baft_easyedit.speed.measure import Sample, measure
from baft_easyedit.speed.options import make_rows
from baft_easyedit.speed.ours import OurMethod, hparams_of, load
from baft_easyedit.speed.peers import PeerMethod, step_times
from baft_easyedit.speed.process import Worker, WorkerError
from baft_easyedit.speed.prompts import PromptMaker
from baft_easyedit.speed.run import _groups, _job
from baft_easyedit.speed.shapes import word_tokenizer
from baft_easyedit.speed.worker import Bench
from tests.conftest import make_model
from tests.tiny import save_tiny_llama

CPU = torch.device("cpu")
SHAPE = "llama-4x64"
JOB = {
    "rows": [],
    "model": None,
    "shape": SHAPE,
    "device": "cpu",
    "dtype": "float32",
    "threads": 1,
    "steps": 3,
    "early_stop": False,
    "new_tokens": 0,
    "meters": True,
    "requests": [],
}


def job(**options):
    rows = make_rows(SpeedOptions(shape=SHAPE, **options))
    return {**JOB, "rows": [vars(row) for row in rows]}


@pytest.fixture
def loaded():
    return load(None, SHAPE, CPU, torch.float32)


def make_method(loaded, num_steps=3):
    row = make_rows(SpeedOptions())[0]
    hparams = hparams_of(row, loaded[0], num_steps, early_stop=False)
    return OurMethod(*loaded, hparams, CPU)


def test_bytes_per_step_are_those_of_later_layers_norm_and_head_twice():
    model = make_model()
    layers = sum(p.numel() for layer in model.model.layers[2:] for p in layer.parameters())
    outside = model.model.norm.weight.numel() + model.lm_head.weight.numel()
    assert bytes_per_step(model, 1) == 2 * 4 * (layers + outside)
    assert bytes_per_step(model.to(torch.bfloat16), 3) == 2 * 2 * outside


def test_tied_output_layer_is_counted_once():
    model = make_model()
    model.lm_head.weight = model.model.embed_tokens.weight
    assert bytes_per_step(model, 3) == 8 * (model.lm_head.weight.numel() + 32)


def test_copy_bandwidth_is_that_of_a_computer():
    assert 1e8 < copy_bandwidth(CPU, num_bytes=8 << 20, tries=3) < 1e13


@pytest.mark.skipif(not _reset_is_possible(), reason="no peak of memory to start anew")
def test_memory_meter_sees_a_tensor_until_it_starts_anew():
    meter = MemoryMeter(CPU)
    meter.start()
    before = meter.peak()
    torch.ones(64 << 20, dtype=torch.uint8)
    assert 60 << 20 < meter.peak() - before < 80 << 20
    meter.start()
    assert meter.peak() < 60 << 20


def test_memory_meter_falls_back_to_the_peak_of_the_process(monkeypatch):
    monkeypatch.setattr("baft_easyedit.speed.hardware._reset_is_possible", lambda: False)
    meter = MemoryMeter(CPU)
    assert 50 << 20 < _highest_resident() < 1 << 40
    meter.start()
    assert 0 <= meter.peak() < 1 << 30


def test_our_method_takes_all_steps_and_leaves_no_edit(loaded):
    method = make_method(loaded)
    before = [p.clone() for p in loaded[0].parameters()]
    requests = PromptMaker(loaded[1]).requests(12, 2, count=2, seed=0)
    sample = measure(method, requests, new_tokens=4, meter=MemoryMeter(CPU))
    assert sample.num_steps == 3
    assert 0 < sample.edit_s < 60
    assert abs(sample.step_s) < sample.edit_s
    assert sample.peak_bytes >= 0
    assert sample.edited_tokens_per_s > 0
    assert sample.unedited_tokens_per_s > 0
    assert attached_edit(loaded[0]) is None
    assert all(map(torch.equal, before, loaded[0].parameters()))


def test_steps_are_fixed_unless_early_stop_is_wanted(loaded):
    row = make_rows(SpeedOptions())[0]
    assert hparams_of(row, loaded[0], 40, early_stop=False).early_stop_loss == 0
    assert hparams_of(row, loaded[0], 40, early_stop=True).early_stop_loss > 0


def test_a_single_step_has_no_time_of_its_own(loaded):
    requests = PromptMaker(loaded[1]).requests(12, 1, count=1, seed=0)
    cost = make_method(loaded, num_steps=1).edit(requests)
    assert (cost.num_steps, cost.step_s) == (1, None)


def test_generation_is_left_out_for_no_tokens(loaded):
    requests = PromptMaker(loaded[1]).requests(12, 1, count=1, seed=0)
    sample = measure(make_method(loaded), requests, new_tokens=0)
    assert sample.edited_tokens_per_s is sample.unedited_tokens_per_s is sample.peak_bytes is None


def test_steps_of_any_optimiser_are_timed_inside_the_context_only():
    p = torch.nn.Parameter(torch.ones(1))
    p.grad = torch.ones(1)
    optimizers = [torch.optim.SGD([p]), torch.optim.AdamW([p])]
    with step_times() as times:
        for optimizer in optimizers:
            optimizer.step()
    optimizers[0].step()
    assert len(times) == 2
    assert times[0] <= times[1]


def test_bench_measures_each_row_on_one_model():
    bench = Bench(job(methods=("BaFT", "ReFT"), prompt_length=8), ["a message"])
    described = bench.answer(["describe"])
    assert described["notes"] == ["a message"]
    assert len(set(described["step_bytes"].values())) == 1
    for name in ("BaFT-replay", "BaFT-full", "ReFT"):
        assert Sample(**bench.answer(["measure", name, 1])).num_steps == 3
    assert bench.answer(["bandwidth"])["bytes_per_s"] > 0


def test_bench_edits_records_in_turn():
    requests = [{"prompt": f"Number {i} is", "target_new": "so"} for i in range(4)]
    bench = Bench(job(methods=("ReFT",), batch_size=2) | {"requests": requests})
    row = bench.rows["ReFT"]
    assert bench._requests(row, 1) == requests[2:]
    assert Sample(**bench.answer(["measure", "ReFT", 0])).num_steps == 3


def test_rows_share_a_process_on_cuda_and_in_sweeps_only():
    def sizes(**options):
        chosen = SpeedOptions(methods=("BaFT", "FT-M"), **options)
        return [len(group) for group in _groups(chosen, make_rows(chosen))]

    assert sizes() == [1, 1, 1]
    assert sizes(device=0) == [2, 1]
    assert sizes(sweeps=(Sweep("rank", (4, 8)),)) == [6]


@pytest.fixture
def fake_worker(tmp_path, monkeypatch):
    """Make processes that run a shell script."""
    script = tmp_path / "python"
    monkeypatch.setattr(sys, "executable", str(script))

    def make(commands):
        script.write_text(f"#!/bin/sh\n{commands}\n", encoding="utf-8")
        script.chmod(0o755)
        return Worker({"rows": [], "threads": None})

    return make


def test_error_of_a_process_is_raised(fake_worker):
    with (
        fake_worker("""read line; echo '{"error": "ValueError: no"}'; sleep 1""") as worker,
        pytest.raises(WorkerError, match="ValueError: no"),
    ):
        worker.ask("describe")


def test_process_that_ends_is_told_with_its_last_words(fake_worker):
    with fake_worker("read line; echo gone >&2; exit 3") as worker:
        for _ in range(2):
            with pytest.raises(WorkerError, match="ended with exit code 3: gone"):
                worker.ask("describe")


def test_run_fails_if_no_row_can_be_measured(fake_worker):
    fake_worker("exit 3")
    with pytest.raises(WorkerError, match="no method could be measured: its process ended"):
        run_speed(SpeedOptions(methods=("BaFT-replay",)))


def test_model_is_found_from_any_directory_or_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m").mkdir()
    options = SpeedOptions(model="m", methods=("ReFT",))
    assert _job(options, make_rows(options), None)["model"] == str(tmp_path / "m")
    with pytest.raises(OSError, match=r"'m' has no config\.json"):
        run_speed(options)


def test_device_must_be_on_this_machine(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"device must be on this machine.*no CUDA device; got 0"):
        run_speed(SpeedOptions(device=0))


def test_run_needs_matplotlib_for_files_before_it_measures(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="matplotlib"):
        run_speed(SpeedOptions(out=Path("speed.json")))


def test_run_measures_in_a_process_and_writes_files(tmp_path):
    pytest.importorskip("matplotlib", reason="the chart needs it")
    moved = []
    out = tmp_path / "speed.json"
    options = SpeedOptions(
        shape=SHAPE,
        methods=("BaFT-replay",),
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
    summary = report.summary(report.rows[0])
    assert len(report.rows[0].samples) == 2
    assert summary["num_steps"] == 3
    assert summary["peak_bytes"] is not None
    assert summary["step_to_bound"] is not None
    assert len(report.bandwidths) == 3
    assert out.is_file()
    assert out.with_suffix(".png").is_file()
    assert "aten::mm" in (tmp_path / "speed-BaFT-replay-profile.txt").read_text(encoding="utf-8")
    assert "aten::mm" not in out.read_text(encoding="utf-8")


@pytest.fixture
def peer(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # EasyEdit writes ./logs
    path = save_tiny_llama(tmp_path)
    word_tokenizer(258).save_pretrained(path)
    return PeerMethod("FT-L", str(path), "cpu", half=False, workdir=tmp_path)


@pytest.mark.easyedit
def test_peer_is_measured_and_restored(peer):
    before = [p.clone() for p in peer.model.parameters()]
    requests = PromptMaker(peer.tokenizer).requests(12, 2, count=1, seed=0)
    sample = measure(peer, requests, new_tokens=3)
    assert sample.num_steps >= 2
    assert 0 < sample.step_s < sample.edit_s
    assert sample.edited_tokens_per_s > 0
    assert all(map(torch.equal, before, peer.model.parameters()))


@pytest.mark.easyedit
def test_peer_that_edits_one_request_at_a_time_says_so(peer, monkeypatch):
    monkeypatch.setattr("baft_easyedit.speed.peers.batchable", lambda *_: False)
    requests = PromptMaker(peer.tokenizer).requests(12, 2, count=2, seed=0)
    with pytest.raises(ValueError, match=r"batch_size must be 1 for FT-L, .*; got 2"):
        peer.edit(requests)
