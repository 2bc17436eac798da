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
    hparams = CLASSES[name.split("/")[0]].from_hparams(name)
    assert hparams.alg_name == name.split("/")[0]
    assert (hparams.batch_size > 1) is name.endswith("-batch.yaml")


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


def test_bundled_model_is_found_from_its_name():
    assert BaFTHyperParams.from_hparams("BaFT/facts-llama").model_name.endswith("facts-llama")


def test_file_is_found_with_and_without_its_suffix_and_overridden(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(MINIMAL))
    assert BaFTHyperParams.from_hparams(file) == BaFTHyperParams.from_hparams(tmp_path / "mine")
    assert BaFTHyperParams.from_hparams(file, rank=3, device="cpu").rank == 3
    assert hparams_file("hparams/BaFT/llama-2-7b").samefile(hparams_file("BaFT/llama-2-7b"))


def test_missing_file_lists_those_of_the_package():
    with pytest.raises(FileNotFoundError, match=r"no hyper-parameter file 'x'.*BaFT/llama-2-7b,"):
        BaFTHyperParams.from_hparams("x")
    with pytest.raises(FileNotFoundError, match=r"\(did you mean 'BaFT/llama-2-7b'\?\); the pa"):
        BaFTHyperParams.from_hparams("BaFT/lama-2-7b")


def test_file_may_have_any_suffix_and_lack_what_is_given(tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text("layers: [1]\nrank: 3\n")
    hparams = read_hparams(file, model_name="x")
    assert (hparams.model_name, hparams.rank) == ("x", 3)


@pytest.mark.parametrize("name", OURS)
def test_presets_keep_the_end_off_as_the_papers_scores_are_teacher_forced(name):
    assert "\nlearn_end: false  # paper" in hparams_file(name).read_text(encoding="utf-8")
    assert not CLASSES[name.split("/")[0]].from_hparams(name).learn_end


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"lrate": 1.0}, ValueError, "unknown hyper-parameter 'lrate' of BaFT.*; allowed: model_n"),
        ({"num_step": 1}, ValueError, r"'num_step' of BaFT \(did you mean 'num_steps'\?\); allow"),
        ({"lr": "1e-4"}, TypeError, r"lr must be of type float; got '1e-4'.*write 1.0e-4"),
        ({"lr": 0}, ValueError, "lr must be above 0; got 0.0"),
        ({"lr": float("nan")}, ValueError, "lr must be a finite number; got nan"),
        ({"gate_lr": 0.0}, ValueError, "gate_lr must be above 0; got 0.0"),
        ({"basis_lr": -0.1}, ValueError, "basis_lr must be at least 0, or null; got -0.1"),
        ({"past_states": -1}, ValueError, "past_states must be at least 0; got -1"),
        ({"settle_steps": 0}, ValueError, "settle_steps must be at least 1; got 0"),
        ({"parametrisation": "qr"}, ValueError, "parametrisation must be one of direct, whitened"),
        ({"loc_own_texts": 1}, TypeError, "loc_own_texts must be of type bool; got 1"),
        ({"rank": 0}, ValueError, "rank must be at least 1; got 0"),
        ({"rank": 2.5}, TypeError, "rank must be of type int; got 2.5"),
        ({"rank": True}, TypeError, "rank must be of type int; got True"),
        ({"layers": []}, ValueError, "layers must name at least one layer"),
        ({"layers": [-1]}, ValueError, r"layers must not be negative .*got \[-1\]"),
        ({"layers": [2, 2]}, ValueError, "layers must not repeat a layer"),
        ({"layers": "9;18"}, TypeError, r"layers must be of type list\[int\]; got '9;18'"),
        ({"num_prompt_positions": 0}, ValueError, "num_prompt_positions must be at least 1"),
        ({"num_steps": 0}, ValueError, "num_steps must be at least 1"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1"),
        ({"max_length": 0}, ValueError, "max_length must be at least 1"),
        ({"weight_decay": -1}, ValueError, "weight_decay must be at least 0"),
        ({"early_stop_loss": -1}, ValueError, "early_stop_loss must be at least 0"),
        ({"balance_coef": -1}, ValueError, "balance_coef must be at least 0"),
        ({"locality_coef": -1}, ValueError, "locality_coef must be at least 0"),
        ({"alpha": 1.5}, ValueError, r"alpha must be in \[0, 1\]"),
        ({"beta": -0.5}, ValueError, r"beta must be in \[0, 1\]"),
        ({"gamma": 2}, ValueError, r"gamma must be in \[0, 1\]"),
        ({"gate": "relu"}, ValueError, "gate must be one of rms-sigmoid"),
        ({"rescaling": "sum"}, ValueError, "rescaling must be one of match, none; got 'sum'"),
        ({"engine": "graph"}, ValueError, "engine must be one of auto, cached, full; got 'graph'"),
        ({"evaluation_type": "judge"}, ValueError, "evaluation_type must be one of LLM-judge"),
        ({"loc_positions": "first"}, ValueError, "loc_positions must be one of all, last"),
        ({"lr": 10**400}, TypeError, "lr must be of type float; got an integer of 1329 bits"),
        ({"seed": 2**64}, ValueError, "seed must have at most 64 bits; got 18446744073709551616"),
        ({"layers": [10**99]}, ValueError, "layers must have at most 64 bits; got "),
        ({"alg_name": "LoRA"}, ValueError, "alg_name must be 'BaFT'; got 'LoRA'"),
        ({"model_name": ""}, ValueError, "model_name must not be empty"),
        ({"device": None}, TypeError, "device must be of type int | str"),
        ({"fp16": "yes"}, TypeError, "fp16 must be of type bool"),
    ],
)
def test_unusable_values_are_refused_by_name(change, error, message):
    with pytest.raises(error, match=message):
        BaFTHyperParams.from_dict({**MINIMAL, **change})


def test_missing_keys_are_named():
    with pytest.raises(ValueError, match="'layers' of BaFT is missing"):
        BaFTHyperParams.from_dict({"model_name": "x"})


def test_file_that_is_no_mapping_is_refused(tmp_path):
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(TypeError, match="must hold a mapping of hyper-parameters"):
        BaFTHyperParams.from_hparams(tmp_path / "list")


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


def test_scaled_layers_are_the_papers_share_of_the_depth():
    assert scaled_layers(32) == [9, 18, 24, 28]
    assert scaled_layers(6) == [1, 3, 4, 5]
    assert scaled_layers(1) == [0]
    with pytest.raises(ValueError, match="depth must be at least 1; got 0"):
        scaled_layers(0)


def test_method_is_read_from_the_file(tmp_path):
    assert type(read_hparams("BaFT/llama-2-7b")) is BaFTHyperParams
    assert type(read_hparams("ReFT/llama-2-7b")) is ReFTHyperParams
    (tmp_path / "rome.yaml").write_text("alg_name: ROME\n")
    with pytest.raises(ValueError, match="alg_name must be one of BaFT, ReFT; got 'ROME'"):
        read_hparams(tmp_path / "rome")


def test_api_key_is_not_shown():
    assert "secret" not in repr(BaFTHyperParams(**MINIMAL, api_key="secret"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rehearsal": -1}, "rehearsal must be at least 0; got -1"),
        ({"rehearsal_stop_loss": -0.1}, "rehearsal_stop_loss must be at least 0"),
        ({"rehearsal_memory": 0}, "rehearsal_memory must be at least 1, or null; got 0"),
        ({"rehearsal_irrelevant": -1}, "rehearsal_irrelevant must be at least 0, or null; got -1"),
    ],
)
def test_bad_settings_of_continual_editing_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        BaFTHyperParams.from_dict({**MINIMAL, **change})


def test_chat_template_is_given_json_values_it_does_not_get_already(tmp_path):
    file = tmp_path / "chat.yaml"
    file.write_text(
        "model_name: x\nlayers: [1]\nuse_chat_template: true\n"
        'chat_template_kwargs: {enable_thinking: false}\nseparator: ""\n'
    )
    hparams = BaFTHyperParams.from_hparams(file)
    assert hparams.chat_template_kwargs == {"enable_thinking": False}
    assert hparams.separator == ""


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"chat_template_kwargs": {"a": 1}}, ValueError, "must be null without use_chat_template"),
        (
            {"chat_template_kwargs": {"tokenize": True}},
            ValueError,
            "must not set conversation",
        ),
        ({"chat_template_kwargs": {"a": object}}, ValueError, "must hold JSON values by name"),
        ({"chat_template_kwargs": {1: 2}}, ValueError, "must hold JSON values by name"),
        ({"chat_template_kwargs": "a"}, TypeError, "chat_template_kwargs must be of type dict"),
        ({"separator": 1}, TypeError, r"separator must be of type str \| None"),
    ],
)
def test_bad_settings_of_prompts_are_refused(change, error, message):
    chat = {} if "without" in message else {"use_chat_template": True}
    with pytest.raises(error, match=message):
        BaFTHyperParams.from_dict({**MINIMAL, **chat, **change})
