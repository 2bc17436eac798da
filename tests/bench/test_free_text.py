"""Scores of generated text, by themselves and against EasyEdit's own functions."""

import importlib
import json
from types import SimpleNamespace

import pytest
import torch

from baft_easyedit import register
from baft_easyedit.bench.evaluate import answer_questions
from baft_easyedit.bench.free_text import (
    contains,
    first_sentence,
    long_scores,
    normalised,
    wild_scores,
)
from baft_easyedit.bench.questions import Question, wild_ids
from baft_easyedit.model.prompt_format import PromptFormat

REQUEST = {
    "prompt": "P",
    "target_new": "Rome",
    "rephrase_prompt": "R",
    "locality": {"a": {"prompt": ["L"], "ground_truth": ["x"]}},
    "portability": {
        "hop": {"prompt": ["H1", "H2"], "ground_truth": ["one", "two"]},
        "other": {"prompt": ["H3"], "ground_truth": ["three"]},
    },
}


def test_wild_scores_exact_match_containment_and_what_stayed():
    before = ["", "", "x and y", "", "", ""]
    after = ["the Rome!", "It is Rome", "X and y", "one", "no", "thirty-three"]
    assert wild_scores(REQUEST, before, after) == {
        "wild.Rel EM": 1.0,
        "wild.Gen EM": 0.0,
        "wild.Loc EM": 1.0,
        "wild.Por EM": 0.25,  # a mean over kinds
        "wild.Rel contained": 1.0,
        "wild.Gen contained": 1.0,
        "wild.Por contained": 0.25,
    }


def test_a_target_is_contained_as_a_whole():
    assert contains("It was Rome, in Italy.", "rome")
    # an option's letter is an article
    assert contains("The answer is A.", "A")
    assert contains("A", "A")
    assert not contains("B", "A")
    assert not contains("", "A")
    assert not contains("It is a dog", "A")
    assert not contains("Romeo", "Rome")
    assert contains("首都は東京です。", "東京")
    assert not contains("首都は東です。", "東京")
    assert contains("เมืองหลวงคือโรม", "โรม")
    assert first_sentence("Rome. It is old.\nYes") == "Rome"
    assert first_sentence("\n") == ""


WHO = Question("rewrite", "", "Who?", "Ann")


def test_wild_asks_in_its_own_words_or_in_the_chat_template(tokenizer):
    plain = tokenizer.decode(wild_ids(WHO, PromptFormat(), tokenizer))
    assert plain.endswith("Please answer the question:\n\nQ: Who?\nA:")
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{{ mark }}"
    )
    form = PromptFormat(use_chat_template=True, chat_template_kwargs={"mark": "!"})
    chat = tokenizer.decode(wild_ids(WHO, form, tokenizer))
    assert chat == "<system>You are a helpful assistant.<user>Who?!"


LONG = [
    Question("rewrite", "", "Who is Ann?", "Ann is a painter. The works hang in Oslo."),
    Question("rephrase", "", "Ann?", "Ann is a painter. The works hang in Oslo."),
    Question("probes", "sub", "What?", "A painter"),
    Question("probes", "sub", "Where?", "Oslo"),
]
ANSWERS = [
    ["Ann is a painter. Her works hang in a museum.", "A painter", "painter", "In Oslo, I think."],
    ["Bob", "", "It is a painter and a poet", "Oslo"],
]


@pytest.mark.easyedit
@pytest.mark.filterwarnings("ignore:\nThe hypothesis contains 0 counts")
def test_long_answers_are_scored_as_easyedit_does(tmp_path, monkeypatch):
    if register().generation != "current":
        pytest.skip("the release has no evaluate_uns")
    theirs = importlib.import_module("easyeditor.evaluate.evaluate_uns")
    encoder = SimpleNamespace(encode=lambda texts, **_: torch.ones(len(texts), 2))
    monkeypatch.setattr(theirs, "SentenceTransformer", lambda *_, **__: encoder)
    records = [
        {
            "answer": LONG[0].answer,
            "original_prediction": original,
            "para_prediction": para,
            "sub_answer": [LONG[2].answer, LONG[3].answer],
            "sub_pred": subs,
        }
        for original, para, *subs in ANSWERS
    ]
    file = tmp_path / "results.json"
    file.write_text(json.dumps(records))
    expected = theirs.eval_akew_unstructured(str(file), "unke", device="cpu")
    ours = [long_scores(LONG, answers) for answers in ANSWERS]
    found = {name: sum(scores[name] for scores in ours) / 2 for name in ours[0]}
    assert found == {
        f"long.{part.lower()} {name.removesuffix(' SCORE')}": value
        for part, scores in expected.items()
        for name, value in scores.items()
        if name != "Bert Score"
    }


@pytest.mark.easyedit
@pytest.mark.parametrize("text", ["The U.S.A.", "an apple, a day", " Rome  ", "theatre", "1,000"])
def test_texts_are_compared_as_easyedit_compares_them(text):
    if register().generation != "current":
        pytest.skip("the release has no exact_match_score")
    theirs = importlib.import_module("easyeditor.evaluate.evaluate_utils")
    assert normalised(text) == theirs.normalize_answer(text)


def test_answers_of_wild_end_at_the_first_sentence(tokenizer):
    def answers(prompts, limits):
        assert limits == [50] * len(prompts)
        return [f"{i}. More" for i, _ in enumerate(prompts)]

    editor = SimpleNamespace(tok=tokenizer, hparams=SimpleNamespace())
    session = SimpleNamespace(editor=editor, answers=answers)
    requests = [
        {"prompt": "P", "target_new": "new", "rephrase_prompt": "R"},
        {"prompt": "Q", "target_new": "new"},
    ]
    assert answer_questions(session, requests, "wild") == [["0", "1"], ["2"]]
