"""Benchmarks on a tiny model through the real EasyEdit: run, stop, go on, fail, share."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
from dataset_files import rome, unke, write_records

from baft_easyedit.bench import config as config_module
from baft_easyedit.bench import process, provenance, run
from baft_easyedit.bench.config import make_config
from baft_easyedit.bench.protocol import Chunk, Protocol
from baft_easyedit.bench.report import write_report
from baft_easyedit.bench.results import read_run
from baft_easyedit.bench.run import run_bench
from baft_easyedit.bench.scores import FIELD_SCORES
from baft_easyedit.bench.store import RunDirectory, read_json
from baft_easyedit.bench.worker import _MethodRun
from baft_easyedit.files import resources
from tests.conftest import WorkerHere, save_tiny_llama

ROOT = Path(__file__).parents[2]
CITIES = {"Freedonia": "Oslo", "Osterlich": "Rome", "Fenwick": "Bern", "Ruritania": "Kiel"}
MEASURED = ("edit_time_s", "peak_memory_bytes")
BAFT = {"layers": [1, 2], "rank": 4, "lr": 5.0e-2, "num_steps": 30}


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    return str(save_tiny_llama(tmp_path_factory.mktemp("models")))


@pytest.fixture(scope="module")
def settings(tmp_path_factory, model_path):
    """A benchmark of four records: what `make_config` takes."""
    requests = [
        {
            "prompt": f"The capital of {country} is",
            "target_new": city,
            "subject": country,
            "rephrase_prompt": f"{country} has the capital",
            "locality": {"nq": {"prompt": "The sky is", "ground_truth": "blue"}},
            "portability": {
                "hop": {
                    "prompt": f"People of {country} vote in",
                    "ground_truth": [[city, city.lower()]],
                }
            },
        }
        for country, city in CITIES.items()
    ]
    file = tmp_path_factory.mktemp("data") / "requests.json"
    file.write_text(json.dumps(requests))
    return {
        "model": model_path,
        "data": {"kind": "requests", "path": str(file)},
        "methods": [{"name": "BaFT", "set": BAFT}, {"name": "FT-L", "set": {"num_steps": 3}}],
        "T": [1, 2],
    }


@pytest.fixture(scope="module")
def whole(settings, tmp_path_factory):
    """The benchmark's directory, run without a stop; with the calls that moved the bar."""
    directory = tmp_path_factory.mktemp("whole")
    moves = []

    def start(total, done):
        moves.append((total, done))
        return moves.append

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "Worker", WorkerHere)
        run_bench(make_config(settings), directory / "run", start)
    return directory / "run", moves


def changed_records(settings, tmp_path, change):
    """Settings with the same records, changed."""
    records = json.loads(Path(settings["data"]["path"]).read_text())
    change(records)
    file = tmp_path / "changed.json"
    file.write_text(json.dumps(records))
    return {**settings, "data": {"kind": "requests", "path": str(file)}}


def scores(rows):
    """Rows without what is measured anew in each run."""
    return [{k: v for k, v in row.items() if k not in MEASURED} for row in rows]


def forced(rows):
    """Scores that need no generated text."""
    return [
        {k: v for k, v in row.items() if k != "more" and not k.startswith("gen_")}
        for row in scores(rows)
    ]


pytestmark = pytest.mark.easyedit


def test_a_run_scores_every_method_under_every_protocol(whole):
    directory, moves = whole
    rows = read_json(directory / "summary.json")
    assert [(r["method"], r["protocol"], r["T"], r["n"]) for r in rows] == [
        ("BaFT", "single", 1, 4),
        ("BaFT", "continual", 2, 4),
        ("FT-L", "single", 1, 4),
        ("FT-L", "continual", 2, 4),
    ]
    baft, continual = rows[:2]
    assert (baft["rewrite_acc"], baft["error"]) == (1.0, None)
    assert baft["gen_rewrite_acc"] == 0.0  # the model never stops by itself
    assert (baft["num_restored"], baft["num_restores"]) == (4, 4)
    assert baft["any_alias_portability_acc"] >= baft["portability_acc"]
    assert baft["immediate_rewrite_acc"] is None
    assert continual["immediate_rewrite_acc"] == 1.0
    assert moves[0] == (16, 0)
    assert sum(moves[1:]) == 16
    case = read_json(directory / "cases/BaFT/continual-T2/00003.json")
    assert (case["chunk"], case["position"], case["chunk_length"]) == (1, 1, 2)
    assert len(case["basis"]["rewrite"]["1"]) == 4
    assert read_json(directory / "cases/FT-L/single/00000.json")["basis"] is None
    assert read_json(directory / "run.json")["status"] == "success"


@pytest.mark.slow
def test_a_run_goes_on_where_it_stopped_in_processes_of_its_own(
    settings, whole, tmp_path, monkeypatch
):
    shutil.copytree(whole[0], tmp_path / "run")
    for gone in ("chunks/BaFT/single/00002.json", "chunks/FT-L/continual-T2/00001.json"):
        (tmp_path / "run" / gone).unlink()
    seen, moves, original = [], [], run._Share.run
    monkeypatch.setattr(run._Share, "run", lambda w, c: seen.append(c) or original(w, c))
    start = lambda total, done: moves.append((total, done)) or moves.append  # noqa: E731
    again = run_bench(make_config(settings), tmp_path / "run", start)
    assert seen == [
        [Chunk("BaFT", Protocol(1, 1), 2, range(2, 3))],
        [Chunk("FT-L", Protocol(2, 1), 1, range(2, 4))],
    ]
    assert moves == [(16, 13), 0, 1, 0, 1, 1]
    assert scores(again) == scores(read_json(whole[0] / "summary.json"))


def as_command(settings, tmp_path, *launcher):
    """The benchmark as a command to be started elsewhere: its arguments and environment."""
    file = tmp_path / "bench.yaml"
    file.write_text(json.dumps(settings))
    root = str(Path(process.__file__).parents[2])
    command = [sys.executable, *launcher, "-m", "baft_easyedit", "bench", str(file), "--out"]
    return [*command, str(tmp_path / "run")], {**os.environ, "PYTHONPATH": root}


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_numbers(settings, whole, tmp_path):
    command, environment = as_command(settings, tmp_path)
    stopped = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    while len(list(tmp_path.glob("run/chunks/BaFT/single/*"))) < 2:
        assert stopped.poll() is None
        time.sleep(0.05)
    stopped.send_signal(signal.SIGKILL)
    stopped.wait()
    assert not (tmp_path / "run/summary.json").exists()
    rows = run_bench(make_config(settings), tmp_path / "run")
    assert scores(rows) == scores(read_json(whole[0] / "summary.json"))


@pytest.mark.slow
def test_two_processes_give_the_summary_of_one(settings, whole, tmp_path):
    launch = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2")
    only_baft = {**settings, "methods": settings["methods"][:1]}
    command, environment = as_command(only_baft, tmp_path, *launch)
    subprocess.run(command, env=environment, check=True, capture_output=True)
    rows = read_json(tmp_path / "run/summary.json")
    assert scores(rows) == scores(read_json(whole[0] / "summary.json"))[:2]


@pytest.mark.slow
def test_cases_scored_one_by_one_score_the_same(settings, whole, tmp_path):
    change = {"methods": settings["methods"][:1], "T": [2], "scoring_batch_size": 1}
    rows = run_bench(make_config({**settings, **change}), tmp_path / "run")
    assert scores(rows) == scores(read_json(whole[0] / "summary.json"))[1:2]
    assert len(list(whole[0].glob("pre_edit/*.json"))) == 4 + 2  # of each chunk, for all methods


@pytest.mark.usefixtures("worker_here")
def test_failures_are_rows_and_are_tried_again(settings, tmp_path):
    # ROME needs a subject: one record has none.
    changed = changed_records(settings, tmp_path, lambda records: records[1].pop("subject"))
    methods = ["MEND", {"name": "ROME", "set": {"v_num_grad_steps": 2}}]
    config = make_config({**changed, "methods": methods, "T": [1], "generation": False})
    mend, rome = run_bench(config, tmp_path / "run")
    assert (mend["n"], mend["num_failed"]) == (0, 4)
    assert mend["error"].startswith("MEND needs a hypernetwork")
    assert (rome["n"], rome["num_failed"], rome["error"]) == (3, 1, None)
    assert any("1 of 4 runs failed: KeyError" in note for note in rome["notes"])
    assert (rome["num_restored"], rome["num_restores"]) == (3, 3)
    assert rome["gen_rewrite_acc"] is None
    again = run_bench(config, tmp_path / "run")[1]
    assert scores([again]) == scores([rome])


@pytest.mark.slow
def test_batches_are_edited_together_or_say_that_they_cannot_be(settings, tmp_path):
    change = {"T": [2], "batch_size": [2], "methods": [settings["methods"][0], "ROME"]}
    config = make_config({**settings, **change})
    baft, rome = run_bench(config, tmp_path / "run")
    assert (baft["protocol"], baft["n"], baft["error"]) == ("batched", 4, None)
    chunk = read_json(tmp_path / "run/chunks/BaFT/batched-B2-T2/00000.json")
    assert len(chunk["edit_times_s"]) == 2
    assert chunk["downstream"] is None
    assert rome["error"] == "ValueError: ROME edits one request at a time in EasyEdit"


@pytest.mark.slow
def test_a_downstream_task_is_asked_before_and_after_the_edits(settings, tmp_path):
    pytest.importorskip("lm_eval")
    questions = [{"goal": "Open a jar", "sol1": "turn the lid", "sol2": "eat it"}] * 2
    (tmp_path / "piqa").mkdir()
    (tmp_path / "piqa/valid.jsonl").write_text("\n".join(map(json.dumps, questions)))
    (tmp_path / "piqa/valid-labels.lst").write_text("0\n1\n")
    command = [sys.executable, ROOT / "scripts/piqa_task.py", tmp_path / "piqa", tmp_path / "task"]
    subprocess.run(command, check=True)
    downstream = {"include_path": str(tmp_path / "task")}
    change = {"T": [2], "methods": [settings["methods"][0], "FT-L"], "downstream": downstream}
    rows = run_bench(make_config({**settings, **change}), tmp_path / "run")
    assert [(row["downstream_acc"], row["downstream_pre_acc"]) for row in rows] == [(0.5, 0.5)] * 2
    (tmp_path / "task/piqa.jsonl").open("a").write("\n")
    with pytest.raises(ValueError, match="other content under the same name: the downstream task"):
        run_bench(make_config({**settings, **change}), tmp_path / "run")


@pytest.mark.usefixtures("worker_here")
def test_counterfact_has_its_scores_before_and_after_the_edits(settings, tmp_path):
    file = write_records(tmp_path, [rome("Asha", 3)])
    change = {"T": [1], "methods": [settings["methods"][0]], "basis": False}
    config = make_config({**settings, **change, "data": {"kind": "counterfact", "path": str(file)}})
    (row,) = run_bench(config, tmp_path / "run")
    assert row["rewrite_success"] == 1.0
    assert row["rewrite_magnitude"] > 0.5 > row["pre_rewrite_magnitude"]
    assert 1 < row["ngram_entropy"] < 10
    without = {name for name in FIELD_SCORES if row[name] is None}
    assert without == {"reference_score", "pre_reference_score"}  # need ROME's reference texts
    write_report([tmp_path / "run"], tmp_path)
    report = (tmp_path / "report.md").read_text()
    columns = ["method", "S", "ES", "EM", "PS", "PM", "NS", "NM", "GE"]
    assert [re.findall(r"\w+", line) for line in report.splitlines()].count(columns) == 2
    (tmp_path / "run/chunks/BaFT/single/00000.json").unlink()
    assert scores(run_bench(config, tmp_path / "run")) == scores([row])


def test_a_long_run_says_beforehand_how_long_it_takes(settings, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "Worker", WorkerHere)
    monkeypatch.setattr(run, "_LONG", 6)
    clock = iter(range(0, 10**6, 30))
    monkeypatch.setattr(run, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    told, config = [], make_config({**settings, "jobs": 1, "generation": False})
    rows = run_bench(config, tmp_path / "run", tell=told.append)
    assert forced(rows) == forced(read_json(whole[0] / "summary.json"))
    # Of each method the first single edit; 7 records are to go in 3 single edits and 2 pairs.
    each = "BaFT 4 min, FT-L 4 min"
    assert told == [f"about 7 min to go, by the first edit of each method: {each}"]
    again = run_bench(config, tmp_path / "run", tell=told.append)
    assert (scores(again), len(told)) == (scores(rows), 1)
    assert (run._spoken(3601), run._spoken(1)) == ("1 h 1 min", "1 min")


def test_what_only_some_runs_ask_has_tables_of_its_own(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "Worker", WorkerHere)
    file = write_records(tmp_path, [unke("Ann")])
    change = {"T": [1], "methods": [settings["methods"][0]], "basis": False, "probes": True}
    config = make_config(
        {**settings, **change, "wild": True, "data": {"kind": "unke", "path": str(file)}}
    )
    (row,) = run_bench(config, tmp_path / "run")
    kinds = {"probes.sub", "probes.third turn", "contained.sub", "long.sub ROUGE-L"}
    assert kinds | {"wild.Rel EM", "wild.Gen contained", "long.original BLEU"} <= row["more"].keys()
    assert "probes.reversal" not in row["more"]  # UnKE names no subject
    case = read_json(tmp_path / "run/cases/BaFT/single/00000.json")
    assert len(case["wild"]["post"]) == 2  # none of the probes
    assert list(case["probes"])[:2] == ["sub", "third turn"]
    assert read_run(tmp_path / "run").results[0].number("probes.sub") == row["more"]["probes.sub"]
    write_report([tmp_path / "run"], tmp_path)
    report = (tmp_path / "report.md").read_text()
    assert all(text in report for text in ("as WILD scores it", "as EasyEdit scores UnKE"))
    similar = {"long.original similarity": 0.5}
    monkeypatch.setattr("baft_easyedit.bench.afterwards._similarity", lambda _: lambda *_: similar)
    later = config.model_copy(update={"similarity_model": str(tmp_path)})
    (row,) = run_bench(later, tmp_path / "run")
    assert row["more"]["long.original similarity"] == 0.5


def test_a_downstream_task_has_an_accuracy(monkeypatch):
    config = SimpleNamespace(downstream=SimpleNamespace(task="gsm8k"))
    session = SimpleNamespace(task_scores=lambda _: {"gsm8k exact_match": None})
    monkeypatch.setattr("baft_easyedit.bench.worker.downstream_tasks", lambda _: None)
    with pytest.raises(ValueError, match=r"task must have the metric acc; got .*gsm8k exact_match"):
        _MethodRun._downstream_accuracy(SimpleNamespace(config=config, session=session))


QUICK = {"methods": ["MEND"], "T": [1]}
"""A row that says at once why it is not run."""


def test_a_run_may_get_further_rows_and_no_other_settings(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["first"])
    run_bench(make_config({**settings, **QUICK}), tmp_path / "run")
    run_bench(make_config({**settings, **QUICK, "methods": ["SERAC"]}), tmp_path / "run")
    rows = run_bench(make_config({**settings, **QUICK, "T": [2], "jobs": 2}), tmp_path / "run")
    cells = [(row["method"], row["T"]) for row in rows]
    assert cells == [("MEND", 1), ("MEND", 2), ("SERAC", 1)]
    assert read_json(tmp_path / "run/summary.json") == rows
    record = read_json(tmp_path / "run/run.json")
    assert [session["command"] for session in record["earlier"]][:1] == [["first"]]
    assert len(record["earlier"]) == 2
    for change, message in (
        ({"seed": 1}, "a run with seed 0; got 1: give another"),
        ({"verify": False}, "a run with verify True; got False"),
        ({"methods": [{"name": "MEND", "method": "SERAC"}]}, "a run with the row MEND .*SERAC"),
    ):
        with pytest.raises(ValueError, match=f"holds {message}"):
            run_bench(make_config({**settings, **QUICK, **change}), tmp_path / "run")


@pytest.fixture
def unrun(monkeypatch):
    """Let runs begin and end without their methods."""
    monkeypatch.setattr(run._Share, "run", lambda *a: None)


def test_a_run_whose_record_is_damaged_or_lost_does_not_go_on(settings, tmp_path):
    config, directory = make_config({**settings, **QUICK}), RunDirectory(tmp_path / "run")
    run_bench(config, directory.root)
    for file, text, message in (
        (directory.config, "{}", r"data must be given; .* \(in .*config.yaml\)"),
        (directory.run, "{}", r"run\.json: schema must be given; .*; delete .*run, and run the"),
        (directory.run, None, r"run\.json must be there, for .*run holds what was run: give"),
    ):
        kept = file.read_text()
        if text is None:
            file.unlink()
        else:
            file.write_text(text)
        with pytest.raises(ValueError, match=message):
            run_bench(config, directory.root)
        file.write_text(kept)
    run_bench(config, directory.root)


@pytest.mark.usefixtures("unrun")
@pytest.mark.parametrize("in_template", [False, True])
def test_runs_that_asked_for_locality_outside_of_the_template_do_not_go_on(
    settings, tmp_path, in_template
):
    content = {**settings, "use_chat_template": in_template, "methods": ["BaFT"], "T": [1]}
    run_bench(make_config(content), tmp_path / "run")
    run_bench(make_config(content), tmp_path / "run")
    former = json.loads((tmp_path / "run" / "run.json").read_text())
    del former["locality_in_template"]
    (tmp_path / "run" / "run.json").write_text(json.dumps(former))
    outcome = pytest.raises(ValueError, match="same name: answers for locality, asked outside")
    with outcome if in_template else nullcontext():
        run_bench(make_config(content), tmp_path / "run")


@pytest.mark.parametrize(
    "what",
    [
        *("records", "model", "tokenizer", "use", "EasyEdit", "texts"),
        *("hyper-parameters of BaFT, single", "hyper-parameters of FT-M"),
    ],
)
@pytest.mark.usefixtures("unrun")
def test_other_content_under_the_same_name_is_refused(settings, tmp_path, monkeypatch, what):
    (tmp_path / "texts").write_text("a b")
    (tmp_path / "mine.yaml").write_text("model_name: x\nlayers: [1]\n")
    changed = changed_records(settings, tmp_path, lambda records: None)
    ours = {"name": "BaFT", "hparams": str(tmp_path / "mine.yaml")}
    content = {**changed, "methods": [ours, "FT-M"], "T": [1], "texts": str(tmp_path / "texts")}
    content["peer_preset"] = "smollm2"
    fingerprint = provenance.model_fingerprint(content["model"])
    run_bench(make_config(content), tmp_path / "run")
    if what == "records":
        changed_records(settings, tmp_path, lambda records: records[0].pop("subject"))
    elif what in fingerprint:
        other = {**fingerprint, what: "another"}
        monkeypatch.setattr(provenance, "model_fingerprint", lambda model: other)
    elif what == "EasyEdit":
        monkeypatch.setattr(provenance, "easyedit_version", lambda: {"version": "new"})
    elif what == "texts":
        (tmp_path / "texts").write_text("c d")
    elif what == "hyper-parameters of FT-M":
        monkeypatch.setattr(provenance, "own_preset_config", lambda name, preset: {"lr": 1.0})
    else:
        (tmp_path / "mine.yaml").write_text("model_name: x\nlayers: [2]\n")
    with pytest.raises(ValueError, match=f"other content under the same name: .*{what}"):
        run_bench(make_config(content), tmp_path / "run")


@pytest.mark.usefixtures("unrun")
def test_a_run_of_the_packages_own_files_goes_on_in_another_checkout(tmp_path, monkeypatch):
    row = {"name": "BaFT", "hparams": "BaFT/facts-llama"}
    settings = make_config({"data": {"kind": "facts", "limit": 1}, "methods": [row]})
    run_bench(settings, tmp_path / "run")
    inputs = read_json(tmp_path / "run/run.json")["inputs"]
    shutil.copytree(resources.hparams_root(), tmp_path / "hparams")
    shutil.copytree(resources.bundled_model_path(), tmp_path / "model")
    for module in (resources, config_module):
        monkeypatch.setattr(module, "hparams_root", lambda: tmp_path / "hparams")
    monkeypatch.setattr(resources, "bundled_model_path", lambda: tmp_path / "model")
    run_bench(settings, tmp_path / "run")
    assert read_json(tmp_path / "run/run.json")["inputs"] == inputs


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": ["EDIT"]}, r"method must be one of .*; got 'EDIT'"),
        ({"methods": [{"name": "BaFT", "set": {"rank": 0}}]}, "rank must be at least 1; got 0"),
        ({"methods": [{"name": "BaFT", "set": {"rnk": 2}}]}, "unknown hyper-parameter 'rnk'"),
        ({"methods": [{"name": "ROME", "hparams": "x"}]}, "hparams is for BaFT and ReFT only"),
        ({"data": {"kind": "news"}}, "kind must be one of .*; got 'news'"),
        ({"T": [5]}, "T times batch_size must be at most the number of records, 4; got 5 times 1"),
        ({"device": "cuda:99"}, "device must be on this machine, where torch finds .*'cuda:99'"),
        ({"snippets": "/nowhere"}, "there is none at '/nowhere'"),
        ({"similarity_model": "/nowhere"}, "similarity_model must be a directory; there is none"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(settings, tmp_path, change, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run_bench(make_config({**settings, **change}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_bad_files_are_refused(settings, tmp_path):
    changed = changed_records(settings, tmp_path, lambda r: r[1].update(loc_prompts=["x"]))
    with pytest.raises(ValueError, match="must have the key 'loc_prompt', not 'loc_prompts'"):
        run_bench(make_config(changed), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    empty = tmp_path / "empty.txt"
    empty.write_text("\n \n")
    with pytest.raises(ValueError, match=r"texts must name a file with a passage a line; .*empty"):
        run_bench(make_config({**settings, "texts": str(empty)}), tmp_path / "run")


def dies(*_):
    os.write(1, b"out of luck")
    os._exit(3)
    yield


def dies_at_its_second_chunk(directory, chunks, _device):
    for position, chunk in enumerate(chunks):
        yield position, 0
        yield position, 1
        if chunk.number == 1:
            os.write(2, b"no memory")
            os._exit(9)


def fails(*_):
    raise ValueError("no such model")
    yield


COUNTS = """
import pathlib, time
def counts(file):
    for k in range(3000):
        pathlib.Path(file).write_text(str(k))
        time.sleep(0.1)
    yield
"""


def test_a_process_ends_with_the_one_that_was_killed(tmp_path):
    (tmp_path / "counting.py").write_text(COUNTS)
    code = "import counting, sys; from baft_easyedit.bench.process import Worker; "
    code += "next(Worker(counting.counts, sys.argv[1]))"
    file, paths = tmp_path / "count", os.pathsep.join([str(ROOT), str(tmp_path)])
    command = [sys.executable, "-c", code, str(file)]
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": paths}) as killed:
        until(file.exists)
        killed.kill()
    until(lambda: stands_still(file))


def stands_still(file):
    before = file.read_text()
    time.sleep(1)
    return before == file.read_text()


def until(holds):
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if holds():
            return
        time.sleep(0.1)
    raise AssertionError("it never came to hold")


def test_what_a_process_raised_is_told_again():
    with process.Worker(fails) as worker:
        for _ in range(2):
            with pytest.raises(process.WorkerError, match="ValueError: no such model"):
                next(worker)


@pytest.mark.slow
def test_a_process_that_dies_is_a_row(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "run_chunks", dies)
    row = run_bench(make_config(settings), tmp_path / "run")[0]
    assert row["error"] == "its process ended with exit code 3: out of luck"
    assert (row["n"], row["num_failed"]) == (0, 4)


@pytest.mark.slow
def test_a_process_that_dies_at_a_chunk_is_followed_by_another(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "run_chunks", dies_at_its_second_chunk)
    moves = []
    only_baft = {**settings, "methods": settings["methods"][:1], "T": [1]}
    run_bench(make_config(only_baft), tmp_path / "run", lambda total, done: moves.append)
    failed = list(tmp_path.glob("run/chunks/BaFT/single/*"))
    assert [file.name for file in failed] == ["00001.json"]
    assert "exit code 9: no memory" in read_json(failed[0])["error"]
    assert sum(moves) == 4


@pytest.mark.parametrize("is_running", [False, True])
def test_stopped_workers_write_nothing(settings, tmp_path, monkeypatch, is_running):
    monkeypatch.setattr(run, "run_chunks", dies_at_its_second_chunk)
    directory, stop = RunDirectory(tmp_path / "run"), lambda _: share.stop()
    share = run._Share(directory, make_config(settings), "cpu", stop)
    if not is_running:
        share.stop()
    with pytest.raises(InterruptedError, match="the run was stopped"):
        share.run([Chunk("BaFT", Protocol(), 0, range(1))])
    assert not directory.root.exists()


@pytest.mark.slow
def test_an_interrupt_leaves_no_process_behind_and_no_failure(settings, tmp_path):
    slow = [{"name": name, "method": "BaFT", "set": BAFT} for name in ("a", "b", "c")]
    command, environment = as_command({**settings, "methods": slow, "jobs": 2}, tmp_path)
    run = subprocess.Popen(
        command,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        # Where the tests run in the background, interrupts are ignored, and that is inherited.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not list(tmp_path.glob("run/chunks/*/single/*")):
        assert run.poll() is None
        time.sleep(0.05)
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(run.pid)], capture_output=True)
    workers = [int(pid) for pid in listed.stdout.split()]
    assert workers
    run.send_signal(signal.SIGINT)
    told = run.communicate(timeout=60)[1].splitlines()[-1]
    assert told.startswith("baft-easyedit: stopped: at ")
    assert told.endswith(f"kept in {tmp_path}/run, and the same command goes on from there")
    assert run.returncode == 130
    for worker in workers:
        with pytest.raises(ProcessLookupError):
            os.kill(worker, 0)
    chunks = [read_json(file) for file in tmp_path.glob("run/chunks/*/*/*")]
    assert all(chunk["error"] is None for chunk in chunks)
    assert not (tmp_path / "run/chunks/c").exists()
