from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import yaml

from baft_easyedit import BaFTHyperParams, ReFTHyperParams
from baft_easyedit.files.resources import hparams_file, hparams_root
from baft_easyedit.hparams import read_hparams, scaled_layers

MINIMAL = {"model_name": "some-llama", "layers": [1, 3]}
CLASSES = {"BaFT": BaFTHyperParams, "ReFT": ReFTHyperParams}
OURS = sorted(p.relative_to(hparams_root()).as_posix() for p in hparams_root().glob("?*FT/*.yaml"))
OURS = [name for name in OURS if name.split("/")[0] in CLASSES]


@pytest.mark.parametrize("name", OURS)
def test_every_yaml_file_of_the_package_loads_strictly(name):
    hparams = read_hparams(name)
    assert type(hparams) is CLASSES[name.split("/")[0]]
    assert (hparams.batch_size > 1) is name.endswith("-batch.yaml")
    assert not hparams.learn_end  # the paper's scores are teacher forced
    assert "\nlearn_end: false  # paper" in hparams_file(name).read_text(encoding="utf-8")


@pytest.mark.parametrize("alg", CLASSES)
@pytest.mark.parametrize(
    ("model", "layers", "margins"),
    [
        ("llama-2-7b", [9, 18, 24, 28], (0.01, 0.05, 0.02)),
        ("llama-2-7b-chat", [9, 18, 24, 28], (0.01, 0.05, 0.02)),
        ("llama-3-8b-instruct", [9, 18, 24, 28], (0.01, 0.1, 0.05)),
        ("gemma-1.1-7b-it", [9, 18, 24, 27], (0.01, 0.1, 0.05)),
    ],
)
def test_values_of_the_papers_table_5(alg, model, layers, margins):
    single = CLASSES[alg].from_hparams(f"{alg}/{model}")
    batch = CLASSES[alg].from_hparams(f"{alg}/{model}-batch")
    assert single.layers == batch.layers == layers
    assert single.rank == batch.rank == 12
    assert single.num_prompt_positions == 3
    assert (single.num_steps, batch.num_steps) == (40, 70)
    assert batch.lr == 1e-4
    assert single.early_stop_loss == 0.01
    if alg == "BaFT":
        assert (single.alpha, single.beta, single.gamma) == margins


def test_file_is_found_under_any_of_its_names_and_overridden(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(MINIMAL))
    assert BaFTHyperParams.from_hparams(file) == BaFTHyperParams.from_hparams(tmp_path / "mine")
    assert BaFTHyperParams.from_hparams(file, rank=3, device="cpu").rank == 3
    assert hparams_file("hparams/BaFT/llama-2-7b").samefile(hparams_file("BaFT/llama-2-7b"))
    (tmp_path / "mine.txt").write_text("layers: [1]\nrank: 3\n")
    assert read_hparams(tmp_path / "mine.txt", model_name="x").rank == 3
    assert BaFTHyperParams.from_hparams("BaFT/facts-llama").model_name.endswith("facts-llama")


def test_missing_file_lists_those_of_the_package():
    with pytest.raises(FileNotFoundError, match=r"no hyper-parameter file 'x'.*BaFT/llama-2-7b,"):
        BaFTHyperParams.from_hparams("x")
    with pytest.raises(FileNotFoundError, match=r"\(did you mean 'BaFT/llama-2-7b'\?\); the pa"):
        BaFTHyperParams.from_hparams("BaFT/lama-2-7b")


CHAT = {"use_chat_template": True}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lrate": 1.0}, "unknown hyper-parameter 'lrate' of BaFT.*; allowed: model_n"),
        ({"num_step": 1}, r"'num_step' of BaFT \(did you mean 'num_steps'\?\); allow"),
        ({"lr": 0}, "lr must be above 0; got 0.0"),
        ({"lr": float("nan")}, "lr must be a finite number; got nan"),
        ({"gate_lr": 0.0}, "gate_lr must be above 0; got 0.0"),
        ({"loc_stand_ins": -1}, "loc_stand_ins must be at least 0; got -1"),
        ({"layers": []}, "layers must name at least one layer, or be auto"),
        ({"layers": "9;18"}, "layers must be auto, or a list of layers; got '9;18'"),
        ({"layers": [-1]}, r"layers must not be negative .*got \[-1\]"),
        ({"layers": [2, 2]}, "layers must not repeat a layer"),
        ({"layers": [10**99]}, "layers must have at most 64 bits; got "),
        ({"seed": 2**64}, "seed must have at most 64 bits; got 18446744073709551616"),
        ({"gate": "relu"}, "gate must be one of rms-sigmoid"),
        ({"rescaling": "sum"}, "rescaling must be one of match, none; got 'sum'"),
        ({"engine": "graph"}, "engine must be one of auto, cached, full; got 'graph'"),
        ({"evaluation_type": "judge"}, "evaluation_type must be one of LLM-judge"),
        ({"loc_positions": "first"}, "loc_positions must be one of all, last"),
        ({"alg_name": "LoRA"}, "alg_name must be 'BaFT'; got 'LoRA'"),
        ({"model_name": ""}, "model_name must not be empty"),
        (
            {"fp16": True, "bf16": True},
            "bf16 must be false with fp16: choose one of them; got True",
        ),
        ({"chat_template_kwargs": {"a": 1}}, "must be null without use_chat_template"),
        ({**CHAT, "chat_template_kwargs": {"tokenize": True}}, "must not set conversation"),
        ({**CHAT, "chat_template_kwargs": {"a": object}}, "must hold JSON values by name"),
        ({**CHAT, "chat_template_kwargs": {1: 2}}, "must hold JSON values by name"),
        *(
            ({name: least - 1}, rf"{name} must be at least {least}; got {least - 1}")
            for least, names in {
                0: "loc_stand_ins weight_decay early_stop_loss balance_coef locality_coef",
                1: "rank num_prompt_positions num_steps batch_size max_length",
            }.items()
            for name in names.split()
        ),
        ({"min_similarity": 1}, r"min_similarity must be in \[-1, 1\), or null; got 1.0"),
        *(({name: 1.5}, rf"{name} must be in \[0, 1\]") for name in ("alpha", "beta", "gamma")),
    ],
)
def test_unusable_values_are_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        BaFTHyperParams.from_dict({**MINIMAL, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": "1e-4"}, r"lr must be of type float; got '1e-4'.*write 1.0e-4"),
        ({"lr": 10**400}, "lr must be of type float; got an integer of 1329 bits"),
        ({"rank": 2.5}, "rank must be of type int; got 2.5"),
        ({"rank": True}, "rank must be of type int; got True"),
        ({"layers": 9}, r"layers must be of type list\[int\] \| str; got 9"),
        ({"layers": [9, "18"]}, r"layers must be of type list\[int\] \| str; got \[9, '18'\]"),
        ({"device": None}, "device must be of type int | str"),
        ({"fp16": "yes"}, "fp16 must be of type bool"),
        ({"chat_template_kwargs": "a"}, "chat_template_kwargs must be of type dict"),
        ({"separator": 1}, r"separator must be of type str \| None"),
    ],
)
def test_values_of_another_type_are_refused_by_name(change, message):
    with pytest.raises(TypeError, match=message):
        BaFTHyperParams.from_dict({**MINIMAL, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gate": "sigmoid"}, "gate must be 'one' for ReFT"),
        ({"balance": True}, "balance must be false for ReFT"),
        ({"locality": True}, "locality must be false for ReFT"),
    ],
)
def test_reft_minimises_the_answer_loss_alone(change, message):
    with pytest.raises(ValueError, match=message):
        ReFTHyperParams.from_dict({**MINIMAL, **change})


def test_missing_keys_and_another_method_are_named(tmp_path):
    with pytest.raises(ValueError, match="'layers' of BaFT is missing"):
        BaFTHyperParams.from_dict({"model_name": "x"})
    (tmp_path / "rome.yaml").write_text("alg_name: ROME\n")
    with pytest.raises(ValueError, match=r"one of BaFT, ReFT; got 'ROME' \(in .*rome.yaml"):
        read_hparams(tmp_path / "rome")


def test_scaled_layers_are_the_papers_share_of_the_depth():
    assert scaled_layers(32) == [9, 18, 24, 28]
    assert scaled_layers(6) == [1, 3, 4, 5]
    assert scaled_layers(1) == [0]
    with pytest.raises(ValueError, match="depth must be at least 1; got 0"):
        scaled_layers(0)


def test_guarded_edits_are_in_later_layers():
    guarded = BaFTHyperParams.from_hparams("BaFT/smollm2", layers="auto")
    assert guarded.at_depth(32).layers == [25, 26, 27, 28]
    assert guarded.at_depth(30).layers == [23, 24, 25, 26]
    assert guarded.at_depth(6).layers == [4, 5]
    assert replace(guarded, min_similarity=None).at_depth(30).layers == [8, 16, 22, 26]


@pytest.mark.parametrize(
    "file", ["BaFT/smollm2", "hparams/BaFT/smollm2.yaml", "tests/../hparams/BaFT/smollm2"]
)
def test_another_model_than_a_files_takes_layers_of_its_own_depth(file, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1])
    read = partial(BaFTHyperParams.from_hparams, file)
    assert read(model_name="Qwen/Qwen3-8B").layers == "auto"
    assert read(model_name="Qwen/Qwen3-8B", layers=[3]).layers == [3]
    for same in ({}, {"model_name": "smollm2"}, {"model_name": read().model_name}):
        assert read(**same).layers == [23, 24, 25, 26]
    with pytest.raises(TypeError, match="model_name"):
        read(model_name=3)
    gemma = partial(BaFTHyperParams.from_hparams, "BaFT/gemma-1.1-7b-it")
    assert gemma(model_name="copies/gemma").layers == gemma().layers == [9, 18, 24, 27]


def test_layers_of_a_file_of_ones_own_are_for_any_model(tmp_path):
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({**MINIMAL, "layers": [1, 2]}))
    assert read_hparams(tmp_path / "mine.yaml", model_name="other").layers == [1, 2]


def test_api_key_is_not_shown():
    assert "secret" not in repr(BaFTHyperParams(**MINIMAL, api_key="secret"))
