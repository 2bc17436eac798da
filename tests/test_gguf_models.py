"""GGUF files as Hugging Face directories: the same model, the file's own tokenizer, or an error."""

import json
from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from transformers import modeling_gguf_pytorch_utils

from baft_easyedit.facts import bundled_model_path, questions
from baft_easyedit.files import writing
from baft_easyedit.generation import load_model
from baft_easyedit.gguf import conversion, source
from baft_easyedit.gguf.conversion import import_gguf
from baft_easyedit.gguf.source import ARCHITECTURES, read_gguf
from baft_easyedit.gguf.tokenizer import make_backend
from tests.gguf_files import TEMPLATE, TOKENS, write_gguf

pytest.importorskip("gguf", reason="the package gguf is not installed")


@pytest.fixture
def file(tmp_path):
    return tmp_path / "tiny.gguf"


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_a_model_comes_out_as_it_went_in(family, file, tmp_path):
    if family not in modeling_gguf_pytorch_utils.GGUF_SUPPORTED_ARCHITECTURES:
        pytest.skip("an architecture that this transformers does not read")
    wanted = write_gguf(file, family)
    model, _ = load_model(str(import_gguf(file, tmp_path / "model")))
    ids = torch.arange(4, 44)[None]
    torch.testing.assert_close(model(ids).logits, wanted(ids).logits)


def test_weights_are_computed_back_from_their_quantisation(file, tmp_path):
    import gguf

    wanted = write_gguf(file, quantised="Q4_1").model.layers[0].mlp.up_proj.weight.detach().numpy()
    kind = gguf.GGMLQuantizationType.Q4_1
    wanted = gguf.quants.dequantize(gguf.quants.quantize(wanted, kind), kind)
    model, _ = load_model(str(import_gguf(file, tmp_path / "model")))
    assert np.array_equal(model.model.layers[0].mlp.up_proj.weight.detach().numpy(), wanted)


def test_weights_are_of_the_dtype_that_is_asked_for(file, tmp_path):
    write_gguf(file)
    whole, half = (import_gguf(file, tmp_path / str(d), d) for d in (torch.float32, torch.bfloat16))
    sizes = [(directory / conversion.WEIGHTS).stat().st_size for directory in (whole, half)]
    assert sizes[1] < 0.6 * sizes[0]
    assert json.loads((half / "config.json").read_text())["torch_dtype"] == "bfloat16"
    (tmp_path / "new").touch()
    assert {p.stat().st_mode for p in whole.iterdir()} == {(tmp_path / "new").stat().st_mode}


def test_the_configuration_is_for_transformers_4_and_5(file, tmp_path):
    write_gguf(file, more={"llama.rope.freq_base": 1e5})
    directory = import_gguf(file, tmp_path / "model")
    config = json.loads((directory / "config.json").read_text())
    assert config["rope_theta"] == 1e5
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert not [key for key in config if key.startswith("_")]


def backend_of(file, **tokenizer):
    write_gguf(file, tokenizer=tokenizer)
    return make_backend(read_gguf(file))


def pieces(backend, text):
    return backend.encode(text).tokens


@pytest.mark.parametrize(
    ("pre", "split"),
    [
        ("smollm", ["1", "7", "Ġab"]),
        ("gpt-2", ["17", "Ġab"]),
        ("llama-bpe", ["<|user|>", "17", "Ġab"]),
        ("qwen2", ["1", "7", "Ġab"]),
    ],
)
def test_a_byte_level_tokenizer_splits_as_the_file_says(pre, split, file):
    backend = backend_of(file, pre=pre, add_bos_token=None, merges=["1 7", "a b", "Ġ ab"], tokens=[
        *TOKENS[:-2], "ab", "Ġab"])  # fmt: skip
    assert pieces(backend, "17 ab") == split
    ids = backend.encode("17 ab <|end|>  Zürich 東京\n").ids
    assert backend.decode(ids).strip() == "17 ab   Zürich 東京"
    assert 2 in ids


def test_special_tokens_and_template_are_the_files(file, tmp_path):
    write_gguf(file, tokenizer={"add_bos_token": True, "add_eos_token": True, "eot_token_id": 3})
    directory = import_gguf(file, tmp_path / "model")
    model, tokenizer = load_model(str(directory))
    assert tokenizer("a").input_ids == [1, TOKENS.index("a"), 2]
    assert tokenizer("a", "b").input_ids == [1, TOKENS.index("a"), TOKENS.index("b"), 2]
    names = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token)
    assert names == ("<|user|>", "<|end|>", "<|pad|>", "<|unk|>")
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer.model_max_length == 256
    assert model.generation_config.eos_token_id == [2, 3]


def test_a_tokenizer_of_scores_gives_the_pieces_of_its_merges(file):
    """The bundled tokenizer, described as a GGUF file describes LLaMA-2's."""
    wanted = load_model("bundled")[1]
    content = json.loads((bundled_model_path() / "tokenizer.json").read_text())["model"]
    merges = [pair if isinstance(pair, list) else pair.split(" ") for pair in content["merges"]]
    tokens = sorted(content["vocab"], key=content["vocab"].get)
    ranks = {"".join(pair): -float(i) for i, pair in reversed([*enumerate(merges)])}
    described = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [ranks.get(token, -1e9) for token in tokens],
        "tokenizer.ggml.token_type": [3 if t in wanted.all_special_tokens else 1 for t in tokens],
        "tokenizer.ggml.bos_token_id": wanted.bos_token_id,
        "tokenizer.ggml.eos_token_id": wanted.eos_token_id,
        "tokenizer.ggml.unknown_token_id": wanted.unk_token_id,
    }  # fmt: skip
    backend = make_backend(source.GGUFSource(file, described, {}))
    texts = [question.prompt for question in questions("held_out")[::7]]
    assert [backend.encode(text).ids for text in texts] == wanted(texts).input_ids
    assert [backend.decode(backend.encode(text).ids) for text in texts] == texts


def refused(file, tmp_path, message, error=ValueError):
    with pytest.raises(error, match=message):
        import_gguf(file, tmp_path / "models/model")
    assert not [p for p in (tmp_path / "models").glob("*") if p.exists()]
    assert not [p for p in (tmp_path / "models").glob(".*")]


OF_TOKENIZER = [
    ({"pre": "tekken"}, r"tokenizer.ggml.pre must be one of gpt-2, .*has 'tekken': how it"),
    ({"pre": None}, r"tokenizer.ggml.pre must be one of .* has None"),
    ({"model": "bert"}, r"tokenizer.ggml.model must be one of gpt2, llama; .* has 'bert'"),
    ({"tokens": None}, "tokens must be a list of tokens; .* has none"),
    ({"tokens": ["a", "a"]}, "tokens must be a list of tokens; .* repeats one"),
    ({"merges": None}, "merges must have a pair for each merge; .* has none"),
    ({"merges": ["x1 y1"]}, "the merges of .* do not fit its tokens"),
    ({"eos_token_id": 999}, r"eos_token_id must be below 263, the number of tokens; .* 999"),
    ({"model": "llama"}, "scores must have a number for each of 263 tokens; .* has 0"),
]
SCALED = [
    ({"llama.rope.scaling.type": "yarn"}, r"rope scaling is not supported.*type 'yarn'"),
    ({"rope_freqs.weight": np.ones(4, np.float32)}, "rope scaling is not.*rope_freqs.weight"),
]
LACKING = "must be those of a LlamaForCausalLM; missing: .*layers.2.mlp.up"


@pytest.mark.parametrize(
    ("written", "message"),
    [
        *(({"tokenizer": tokenizer}, message) for tokenizer, message in OF_TOKENIZER),
        *(({"more": more}, message) for more, message in SCALED),
        ({"drop": "blk.2.ffn_up.weight"}, LACKING),
    ],
)
def test_what_cannot_be_converted_is_refused_before_anything_is_written(
    written, message, file, tmp_path
):
    write_gguf(file, **written)
    refused(file, tmp_path, message)


@pytest.mark.parametrize(
    ("key", "old", "new", "message"),
    [
        ("general.architecture", b"llama", b"mamba", r"must be one of .*llama.*'mamba'"),
        ("llama.feed_forward_length", b"@", b"A", "could not be read as a llama|shape: .*mlp"),
    ],
)
def test_values_that_do_not_fit_are_named(key, old, new, message, file, tmp_path):
    write_gguf(file)
    before, key, behind = file.read_bytes().partition(key.encode())
    file.write_bytes(before + key + behind.replace(old, new, 1))
    refused(file, tmp_path, message)


def test_a_quantisation_that_gguf_cannot_compute_back_is_refused(file, tmp_path, monkeypatch):
    write_gguf(file, quantised="Q8_0")
    unknown = Mock(side_effect=NotImplementedError("Q8_0"))
    monkeypatch.setattr("gguf.dequantize", unknown)
    refused(file, tmp_path, r"could not be read as a llama \(NotImplementedError: 'Q8_0'\)")


@pytest.mark.parametrize(
    "change",
    [
        lambda content: b"GGML" + content[4:],
        lambda content: b"GG",
        lambda content: content[:4] + b"\x01\0\0\0" + content[8:],
        lambda content: content[:4] + b"\0\0\0\x03" + content[8:],
        lambda content: content[:300],
        lambda content: content[:-100],
    ],
    ids=["magic", "short", "version", "endianness", "header", "tensors"],
)
def test_files_that_are_no_whole_gguf_are_refused(change, file, tmp_path):
    write_gguf(file)
    file.write_bytes(change(file.read_bytes()))
    refused(file, tmp_path, "must be a whole GGUF file; reading it failed")


@pytest.mark.parametrize(
    ("versions", "message"),
    [
        ([PackageNotFoundError], "'gguf' from version .*; none is installed: pip .*real"),
        (["1.0", PackageNotFoundError], "'accelerate' from version .*; none is installed: pip"),
        (["0.10.0"], "'gguf' from version 0.16 on; 0.10.0 is installed"),
    ],
)
def test_a_package_is_told_how_to_get(versions, message, file, tmp_path, monkeypatch):
    monkeypatch.setattr(source.importlib.metadata, "version", Mock(side_effect=versions))
    refused(file, tmp_path, f"needs the package {message}", ImportError)


def test_a_directory_that_holds_something_is_refused(file, tmp_path):
    write_gguf(file)
    target = tmp_path / "model"
    target.mkdir()
    import_gguf(file, target)  # empty: it may be there
    with pytest.raises(ValueError, match=r"must be new or empty; .* holds something"):
        import_gguf(file, target)
    with pytest.raises(ValueError, match="the directory must be new or empty"):
        import_gguf(file, file)


def test_too_little_room_is_told_before_anything_is_written(file, tmp_path, monkeypatch):
    write_gguf(file)
    monkeypatch.setattr(writing.shutil, "disk_usage", lambda path: SimpleNamespace(free=10**6))
    refused(file, tmp_path, "needs 34 MB, and 1 MB are free there: make room", OSError)


@pytest.mark.parametrize("is_full", [True, False])
def test_what_ends_a_conversion_leaves_nothing(is_full, file, tmp_path, monkeypatch):
    write_gguf(file)
    error = SafetensorError("disk full") if is_full else KeyboardInterrupt()
    monkeypatch.setattr("safetensors.torch.save_file", Mock(side_effect=error))
    message = "could not be written: disk full" if is_full else None
    refused(file, tmp_path, message, OSError if is_full else KeyboardInterrupt)
