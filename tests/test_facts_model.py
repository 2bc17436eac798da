"""The bundled model knows the facts; its tokenizer and the training recipe do what they say."""

import importlib.util
import random
import re
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch

from baft_easyedit.facts import bundled_model_path, edit_requests, facts, questions
from baft_easyedit.facts.questions import Kind
from baft_easyedit.generation import generate_answers, load_model

SPEC = importlib.util.spec_from_file_location(
    "train_facts_model", Path(__file__).parent.parent / "scripts/train_facts_model.py"
)
SCRIPT = sys.modules[SPEC.name] = importlib.util.module_from_spec(SPEC)  # dataclasses look
SPEC.loader.exec_module(SCRIPT)


@pytest.fixture(scope="module")
def bundled():
    return load_model("bundled")


def _sample(kind, count):
    return random.Random(1).sample(questions(kind), count)


def test_bundled_model_is_small():
    files = [path for path in bundled_model_path().iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12e6
    assert any(path.suffix == ".safetensors" for path in files)


@pytest.mark.parametrize(("kind", "least"), [("trained", 0.95), ("held_out", 0.80)])
def test_bundled_model_answers_rightly(bundled, kind, least):
    assert SCRIPT.exact_match(*bundled, _sample(kind, 100)) >= least


def test_bundled_model_does_not_believe_the_edits_yet(bundled):
    records = edit_requests("eval", 100)
    answers = generate_answers(*bundled, [record["prompt"] for record in records])
    assert not any(
        got == record["target_new"] for got, record in zip(answers, records, strict=True)
    )


def test_bundled_tokenizer_has_llama_special_tokens(bundled):
    _, tok = bundled
    assert tok.convert_tokens_to_ids(["<unk>", "<s>", "</s>"]) == [0, 1, 2]
    assert (tok.unk_token_id, tok.bos_token_id, tok.eos_token_id, tok.pad_token_id) == (0, 1, 2, 2)
    assert tok.padding_side == "left"
    assert tok("Paris").input_ids[0] == tok.bos_token_id
    assert set(tok("Paris")) == {"input_ids", "attention_mask"}


def test_bundled_tokenizer_keeps_the_prompt_a_prefix_of_every_record(bundled):
    _, tok = bundled
    pairs = []
    for record in edit_requests("train") + edit_requests("eval"):
        pairs += [(record["prompt"], record["target_new"])]
        pairs += [(record["rephrase_prompt"], record["target_new"])]
    for record in edit_requests("eval", 300):
        probes = [*record["locality"].values(), *record["portability"].values()]
        pairs += [(probe["prompt"], probe["ground_truth"]) for probe in probes]
    prompts = tok([prompt for prompt, _ in pairs]).input_ids
    texts = tok([f"{prompt} {target}" for prompt, target in pairs]).input_ids
    for prompt, text in zip(prompts, texts, strict=True):
        assert text[: len(prompt)] == prompt
        assert len(text) > len(prompt)


def test_bundled_tokenizer_round_trips_every_answer(bundled):
    _, tok = bundled
    for text in {fact.answer for fact in facts()} | {"Zürich 東京", "50 % of 3,000!"}:
        ids = tok(text).input_ids
        assert tok.unk_token_id not in ids
        assert tok.decode(ids, skip_special_tokens=True) == text


def test_model_card_has_the_figures(bundled):
    model, _ = bundled
    card = (bundled_model_path() / "README.md").read_text(encoding="utf-8")
    figures = dict(re.findall(r"^\| ([a-z ,-]+) \| \d+ \| ([01]\.\d{4}) \|$", card, re.MULTILINE))
    assert float(figures["trained phrasings"]) >= 0.97
    assert float(figures["held-out phrasings"]) >= 0.85
    assert {"two-hop, trained", "two-hop, held-out"} <= set(figures)
    assert f"{len(facts())} true facts" in card
    assert f"| parameters | {model.num_parameters()} |" in card
    assert "scripts/train_facts_model.py" in card


def test_the_recipe_lowers_the_loss_and_writes_a_model_that_loads(tmp_path, monkeypatch, capsys):
    recipe = SCRIPT.TrainingRecipe(
        epochs=2, vocab_size=420, hidden_size=16, intermediate_size=16, num_layers=1, num_heads=2,
        phrasings_per_epoch=1,
    )  # fmt: skip
    texts = [question.prompt for question in _sample("trained", 500)]
    tokenizer = SCRIPT.train_tokenizer(texts, recipe.vocab_size)
    monkeypatch.setattr(SCRIPT, "questions", lambda kind: _sample(kind, 1000))
    monkeypatch.setattr(SCRIPT, "tell_accuracy", lambda *_: None)
    model = SCRIPT.build_model(recipe, tokenizer)
    SCRIPT.train(model, tokenizer, recipe, "cpu", tmp_path)
    first, last = map(float, re.findall(r"loss (\d+\.\d+)", capsys.readouterr().out))
    assert last < first
    loaded, tok = load_model(str(tmp_path))
    ids = torch.tensor([tok("The capital of France is").input_ids])
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, atol=1e-2, rtol=0)
    scores = dict.fromkeys(get_args(Kind), 0.125)
    SCRIPT.write_model_card(tmp_path, scores, recipe, minutes=1.5)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "0.1250" in card
    assert "1.5 minutes, " in card
