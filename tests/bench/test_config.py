from pathlib import Path

import pytest

from baft_easyedit.bench.config import make_config, read_config
from baft_easyedit.bench.methods import asked_of_all, our_hparams
from baft_easyedit.bench.protocol import Protocol
from baft_easyedit.files.resources import hparams_root

JUDGE = {"address": "http://localhost:8000/v1", "model": "x"}
SMALLEST = {"data": {"kind": "facts"}, "methods": ["BaFT"]}


def test_a_bare_name_is_a_row_of_that_method():
    config = make_config({**SMALLEST, "methods": ["BaFT", {"name": "+ss-w", "method": "BaFT"}]})
    assert [(m.name, m.method) for m in config.methods] == [("BaFT", "BaFT"), ("+ss-w", "BaFT")]
    assert (config.T, config.batch_size, config.model) == ((1,), (1,), "bundled")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methds": []}, r"methds is unknown \(did you mean 'methods'\?\)$"),
        ({"methods": [{"name": "BaFT", "st": {}}]}, r"methods.0.st is unknown \(.*'set'\?\)$"),
        ({"methods": []}, "methods must not be empty; got"),
        ({"methods": ["BaFT", "BaFT"]}, "methods must not repeat an entry; got"),
        ({"methods": [{"method": "BaFT"}]}, "methods.0.name must be given; got"),
        ({"T": [1, 0]}, "T.1 must be at least 1; got 0$"),
        ({"data": {"kind": "facts", "limit": True}}, "data.limit must be an integer; got True$"),
        ({"data": "facts"}, "data must be a mapping; got 'facts'$"),
        ({"T": "1,10"}, "T must be a list; got '1,10'$"),
        ({"T": ["1"]}, "T.0 must be an integer; got '1'$"),
        ({"device": [1]}, r"device must be an integer or a text; got \[1\]$"),
        ({"fp16": "yes"}, "fp16 must be true or false; got 'yes'$"),
        ({"similarity_model": ""}, "similarity_model must not be empty; got ''$"),
        ({"texts": 3}, "texts must be a text; got 3$"),
        ({"seed": -1}, "seed must be at least 0; got -1$"),
        ({"seed": 2**32}, "seed must be below 4294967296; got"),
        ({"judge": {**JUDGE, "timeout_s": 0}}, "judge.timeout_s must be above 0; got 0$"),
        ({"threads": 0, "jobs": 0}, r"threads must be at least 1; got 0 \(and 1 more problem\)$"),
        ({"probes": True, "generation": False}, "probes must come with generation: true; got"),
        ({"snippets": "a", "generation": False}, "snippets must come with generation: true; got"),
        ({"judge": JUDGE}, "judge must come with wild: true, whose answers it grades"),
        ({"judge": {**JUDGE, "key": "sk-1"}}, "judge.key is unknown"),
        ({"judge": {**JUDGE, "address": "here"}}, "judge.address must match .*http.*; got 'here'$"),
        ({"fp16": True, "bf16": True}, "bf16 must be false with fp16, such as by --no-fp16; got"),
        ({"model": ""}, "model must be given, in the file or as --model; got ''"),
    ],
)
def test_bad_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=f"bad benchmark setting: .*{message}"):
        make_config({**SMALLEST, **change})


def test_overrides_replace_values_and_name_rows_of_the_file(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(
        "data: {kind: facts, limit: 5}\nmethods: [{name: +x, method: BaFT, set: {rank: 4}}, ReFT]\n"
    )
    config = read_config(file, {"methods": ["+x", "ROME"], "data": {"limit": 2}, "T": [3]})
    assert [(m.name, m.method, m.set) for m in config.methods] == [
        ("+x", "BaFT", {"rank": 4}),
        ("ROME", "ROME", {}),
    ]
    assert (config.data.kind, config.data.limit, config.T) == ("facts", 2, (3,))


def test_presets_are_for_the_model_of_the_file(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("{model: a/b, preset: p, data: {kind: facts}, methods: [BaFT]}")
    assert read_config(file, {"model": "a/b"}).preset == "p"
    assert read_config(file, {"model": "a/c"}).preset is None
    assert read_config(file, {"model": "a/c", "preset": "q"}).preset == "q"


@pytest.mark.parametrize(
    "name", sorted(file.stem for file in (hparams_root() / "bench").glob("*.yaml"))
)
def test_every_benchmark_of_the_package_can_be_read(name):
    given = {} if name == "facts" else {"model": "some/model"}
    config = read_config(f"bench/{name}", given)
    assert config.methods
    first_line = (hparams_root() / "bench" / f"{name}.yaml").read_text().splitlines()[1]
    assert f"baft-easyedit bench bench/{name} " in first_line


def test_paths_in_a_file_are_looked_up_beside_it_then_in_the_working_directory(
    tmp_path, monkeypatch
):
    beside, here = tmp_path / "beside", tmp_path / "here"
    for directory in (beside, here):
        directory.mkdir()
        (directory / "records.json").touch()
    for name in ("mine", "bundled"):  # the latter is no model
        (beside / f"{name}.yaml").touch()
    (here / "texts.txt").touch()
    (beside / "bench.yaml").write_text(
        "{model: bundled, data: {kind: zsre, path: records.json}, texts: texts.txt, methods: "
        "[BaFT, {name: mine, method: BaFT, hparams: mine}]}"
    )
    monkeypatch.chdir(here)
    config = read_config("../beside/bench.yaml")
    assert Path(config.data.path).resolve() == beside / "records.json"
    assert Path(config.methods[1].hparams).resolve() == beside / "mine"
    assert (config.model, config.texts) == ("bundled", "texts.txt")
    (beside / "model").mkdir()
    text = (beside / "bench.yaml").read_text().replace("bundled", "model, preset: facts-llama")
    (beside / "bench.yaml").write_text(text)
    assert read_config("../beside/bench.yaml", {"model": "model"}).preset == "facts-llama"
    typed = read_config("../beside/bench.yaml", {"data": {"path": "records.json"}})
    assert typed.data.path == "records.json"


def test_home_is_expanded_in_a_files_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "it").mkdir()
    rest = "similarity_model: ~/it, downstream: {include_path: ~/it}}"
    (tmp_path / "bench.yaml").write_text("{data: {kind: facts}, methods: [BaFT], " + rest)
    config = read_config(tmp_path / "bench.yaml")
    assert config.similarity_model == config.downstream.include_path == str(tmp_path / "it")


def test_how_to_ask_is_for_all_rows():
    how = {"bf16": True, "use_chat_template": True, "learn_end": True}
    rows = ["BaFT", {"name": "plain", "method": "BaFT", "set": {"learn_end": False}}]
    config = make_config({**SMALLEST, **how, "methods": rows})
    ours, plain = (our_hparams(config, method, Protocol()) for method in config.methods)
    assert (ours.use_chat_template, ours.learn_end, ours.dtype) == (True, True, "bfloat16")
    assert (plain.use_chat_template, plain.learn_end) == (True, False)
    without = make_config(SMALLEST)
    assert not our_hparams(without, without.methods[0], Protocol()).use_chat_template
    assert asked_of_all(config) == how
    assert asked_of_all(without) == {}
