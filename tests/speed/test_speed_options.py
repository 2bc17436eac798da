from pathlib import Path

import pytest
import torch

from baft_easyedit.bench.data import load_dataset
from baft_easyedit.facts import edit_requests
from baft_easyedit.generation import load_model
from baft_easyedit.speed import SpeedOptions, Sweep
from baft_easyedit.speed.options import make_rows, swept_value
from baft_easyedit.speed.ours import edited_layers
from baft_easyedit.speed.prompts import PromptMaker, records
from baft_easyedit.speed.shapes import find_shape, word_tokenizer


def names(**options):
    return [row.name for row in make_rows(SpeedOptions(**options))]


def test_baft_means_a_row_for_each_engine():
    assert names() == ["BaFT-replay", "BaFT-full", "ReFT"]
    assert names(methods=("BaFT-full", "ReFT-full", "FT-M")) == ["BaFT-full", "ReFT-full", "FT-M"]


def test_only_the_default_engine_of_baft_is_the_reference():
    rows = make_rows(SpeedOptions(methods=("BaFT", "ReFT", "ROME")))
    assert [row.is_reference for row in rows] == [True, False, False, False]
    assert [row.is_ours for row in rows] == [True, True, True, False]


def test_sweep_changes_one_setting_for_baft_and_reft():
    sweeps = (Sweep.parse("prompt-length=16, 32"), Sweep("layers", (2,)))
    rows = make_rows(SpeedOptions(sweeps=sweeps, rank=5))
    assert len(rows) == 9
    assert rows[0].name == "BaFT-replay prompt-length=16"
    assert [swept_value(row) for row in rows] == [16] * 3 + [32] * 3 + [2] * 3
    assert {row.rank for row in rows} == {5}
    assert rows[0].setting == rows[2].setting != rows[3].setting


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"repeats": 0}, "repeats must be at least 1; got 0"),
        ({"steps": 0}, "steps must be at least 1; got 0"),
        ({"new_tokens": -1}, "new_tokens must be at least 0; got -1"),
        ({"threads": 0}, "threads must be at least 1; got 0"),
        ({"prompt_length": 3}, "prompt-length must be at least 4 tokens; got 3"),
        ({"dtype": "int8"}, "dtype must be one of float32, .*; got 'int8'"),
        ({"model": "bundled", "shape": "llama-2-7b"}, "shape must be absent with a model"),
        ({"shape": "bert"}, "shape must be one of llama-2-7b, .*; got 'bert'"),
        ({"methods": ()}, "methods must name at least one method"),
        ({"methods": ("BaFT", "BaFT-full")}, "methods must not name a row twice"),
        ({"methods": ("BaFT-fast",)}, "methods must have an engine of replay, full; got"),
        ({"methods": ("FT-X",)}, "method must be one of .*; got 'FT-X'"),
        ({"out": Path("speed.txt")}, "out must name a .json file"),
        ({"sweeps": (Sweep("rank", (1,)), Sweep("rank", (2,)))}, "sweeps must not repeat"),
        ({"sweeps": (Sweep("prompt-length", (2,)),)}, "prompt-length must be at least 4"),
        ({"profile": True}, "out must be given with profile; got None"),
        ({"start": -1}, "start must be at least 0; got -1"),
        ({"data": "zsre.json"}, "data must have the form KIND=PATH, with a kind of facts, zsre"),
        (
            {"data": "facts=", "sweeps": (Sweep("prompt-length", (8,)),)},
            "sweeps must leave prompt-length out with data",
        ),
        (
            {"shape": "llama-2-7b", "methods": ("FT-M",), "dtype": "bfloat16"},
            "weights_dir must be given to run FT-M on llama-2-7b; got None: .* of 14 GB",
        ),
    ],
)
def test_bad_option_is_named(options, match):
    with pytest.raises(ValueError, match=match):
        SpeedOptions(**options)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("rank", "sweep must have the form"),
        ("rank=4,x", "sweep must have the form"),
        ("width=4", "sweep must be one of prompt-length, rank, layers, batch; got 'width'"),
        ("rank=4,4", "sweep must have values, each of them once"),
        ("rank=0", "sweep must have values of at least 1"),
    ],
)
def test_bad_sweep_is_named(text, match):
    with pytest.raises(ValueError, match=match):
        Sweep.parse(text)


def test_records_are_those_of_the_benchmarks():
    options = SpeedOptions(data="facts=", start=3)
    expected = load_dataset("facts", start=3, limit=5).requests
    assert records(options, 5) == expected
    assert records(SpeedOptions(), 5) == []
    assert options.texts == "facts records from 3 on"


def test_large_shape_needs_no_directory_for_our_methods():
    assert SpeedOptions(shape="llama-2-7b").shape_name == "llama-2-7b"


@pytest.mark.parametrize(
    ("name", "count"),
    [("llama-2-7b", 6_738_415_616), ("llama-3-8b", 8_030_261_248), ("gemma-7b", 8_537_680_896)],
)
def test_named_shape_has_the_size_of_its_model(name, count):
    assert find_shape(name).num_parameters() == count


def test_random_model_is_made_in_its_dtype_and_leaves_the_random_state():
    state = torch.get_rng_state()
    model = find_shape("llama-2x64").model(torch.device("cpu"), torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.config.num_hidden_layers == 2
    assert not model.training
    assert torch.get_default_dtype() == torch.float32
    assert torch.equal(torch.get_rng_state(), state)


def test_width_of_no_whole_heads_is_refused():
    with pytest.raises(ValueError, match=r"a multiple of 64 as width, .*; got 'llama-2x65'"):
        find_shape("llama-2x65")


def lengths(tokenizer, request):
    prompt = len(tokenizer(request["prompt"])["input_ids"])
    text = f"{request['prompt']} {request['target_new']}"
    return prompt, len(tokenizer(text)["input_ids"]) - prompt


@pytest.mark.parametrize(("prompt", "answer"), [(4, 1), (16, 4), (200, 7)])
def test_requests_have_exactly_the_wanted_tokens(prompt, answer):
    tokenizer = word_tokenizer(2000)
    maker = PromptMaker(tokenizer)
    requests = maker.requests(prompt, answer, count=3, seed=1)
    assert {lengths(tokenizer, r) for r in requests} == {(prompt, answer)}
    assert all(r["prompt"].count(r["subject"]) == 1 for r in requests)
    assert len({r["prompt"] for r in requests}) == 3
    assert maker.requests(prompt, answer, count=3, seed=1) == requests


def test_requests_have_exactly_the_wanted_tokens_under_the_bundled_tokenizer():
    tokenizer = load_model("bundled")[1]
    requests = PromptMaker(tokenizer).requests(24, 3, count=2, seed=0)
    assert {lengths(tokenizer, r) for r in requests} == {(24, 3)}
    assert requests[0].keys() <= edit_requests("eval")[0].keys()


def test_tokenizer_without_words_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"the tokenizer must have at least 16 words .*; got 0"):
        PromptMaker(tokenizer)


def test_prompt_that_is_never_reached_is_refused(monkeypatch):
    maker = PromptMaker(word_tokenizer(100))
    monkeypatch.setattr(maker, "_length", lambda text: 5)
    with pytest.raises(ValueError, match=r"prompt_length must be one that .*; got 9, with answers"):
        maker.requests(9, 1, count=1, seed=0)


def test_edited_layers_begin_where_the_paper_does():
    assert edited_layers(32) == [9, 18, 24, 28]
    assert edited_layers(32, 1) == [9]
    assert edited_layers(32, 3) == [9, 18, 28]
    assert edited_layers(12, 9) == [3, 4, 5, 6, 7, 8, 9, 10, 11]
    with pytest.raises(ValueError, match=r"layers must be at most 9 for this model, .*; got 10"):
        edited_layers(12, 10)
