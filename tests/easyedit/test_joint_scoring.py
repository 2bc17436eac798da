"""Requests scored together by EasyEdit's evaluator: as alone, or one by one."""

import logging
from types import SimpleNamespace

import pytest
import torch

from baft_easyedit.easyedit.joint_scoring import (
    padding_is_harmless,
    score_jointly,
    taken_apart,
)
from baft_easyedit.easyedit.session import Session, prepare_requests
from tests.conftest import make_model

PLAIN = {"prompt": "P", "target_new": "x", "ground_truth": None}
FULL = {
    **PLAIN,
    "prompt": "Q",
    "locality": {"nq": {"prompt": ["a", "b"], "ground_truth": ["c", "d"]}},
    "portability": {"hop": {"prompt": "e", "ground_truth": "f"}},
}


def test_each_prompt_needs_a_score():
    with pytest.raises(ValueError, match="rewrite_acc must have a score for each of 2; got 1"):
        taken_apart({"rewrite_acc": [0.1]}, [PLAIN, FULL])
    with pytest.raises(ValueError, match="hop_acc must have a score for each of 1; got 2"):
        taken_apart({"portability": {"hop_acc": [0.1, 0.2]}}, [PLAIN, FULL])


class Evaluator:
    """Scores a request by its prompt; refuses to score several."""

    def __init__(self, error=None):
        self.error = error
        self.seen = []

    def __call__(self, request):
        self.seen.append(request["prompt"])
        several = isinstance(request["prompt"], list)
        if several and self.error:
            raise self.error
        prompts = request["prompt"] if several else [request["prompt"]]
        return {"rewrite_acc": [float(len(prompt)) for prompt in prompts]}


def words(prompts):
    return {"input_ids": [prompt.split() for prompt in prompts]}


def of_lengths(*lengths, **more):
    return [{**PLAIN, "prompt": " ".join(["w"] * n), **more} for n in lengths]


def test_texts_of_about_one_length_are_scored_together():
    evaluator = Evaluator()
    requests = [*of_lengths(4, 40, 5, 4, 4), *of_lengths(4, rephrase_prompt="r")]
    scores = score_jointly(evaluator, requests, words, 3)
    assert [s["rewrite_acc"][0] for s in scores] == [len(r["prompt"]) for r in requests]
    counts = [len(prompt) if isinstance(prompt, list) else 1 for prompt in evaluator.seen]
    assert counts == [3, 1, 1, 1]
    probes = {"locality": {"nq": {"prompt": "w " * 50, "ground_truth": "x"}}}
    evaluator = Evaluator()
    score_jointly(evaluator, [*of_lengths(4), *of_lengths(4, **probes)], words, 8)
    assert len(evaluator.seen) == 2


@pytest.mark.parametrize("error", [torch.cuda.OutOfMemoryError("full"), ValueError("of 2; got 1")])
def test_what_cannot_be_scored_together_is_scored_alone(caplog, error):
    evaluator = Evaluator(error)
    requests = of_lengths(4, 5)
    with caplog.at_level(logging.INFO):
        scores = score_jointly(evaluator, requests, words, 8)
    assert [s["rewrite_acc"][0] for s in scores] == [7.0, 9.0]
    assert f"2 requests are scored one by one: {error}" in caplog.text


def several_probes(requests):
    """Requests of different shapes: more probes, none, no rephrasing."""
    more = {"prompt": ["Snow is", "The sun is very"], "ground_truth": ["white", "hot"]}
    first, second, third = prepare_requests(requests)
    first["locality"]["other"] = more
    second["portability"] = {}
    del third["rephrase_prompt"]
    return [first, second, third]


@pytest.mark.easyedit
def test_requests_score_together_as_alone(make_editor, requests):
    cases = several_probes(requests)
    editor = make_editor()
    alone, together = Session(editor, "a", batch_size=1), Session(editor, "a", batch_size=8)
    assert not alone.scores_together
    assert together.scores_together
    pre = alone.score(cases)
    assert together.score(cases) == pre
    together.edit(cases[:1])
    after = together.score_against(pre, cases)
    assert after[0]["post"]["rewrite_acc"] == [1.0]
    alone._edits = together._edits
    assert after == alone.score_against(pre, cases)
    prompts, limits = ["Snow is", "The capital of Freedonia is", "a"], [3, 6, 5]
    assert together.answers(prompts, limits) == alone.answers(prompts, limits)


@pytest.mark.easyedit
def test_only_what_scores_alike_is_scored_together(make_editor, monkeypatch):
    session = Session(make_editor(), "a")
    editor = session.editor
    assert session.scores_together
    for name in ("WISE", "GRACE", "MELO"):
        with monkeypatch.context() as patch:
            patch.setattr(editor, "alg_name", name)
            assert not session.scores_together
    for name, value in (("evaluation_type", "generate-text"), ("evaluation_type", "LLM-judge")):
        changed = SimpleNamespace(**{**vars(editor.hparams), name: value})
        with monkeypatch.context() as patch:
            patch.setattr(editor, "hparams", changed)
            assert not session.scores_together
    editor.tok.padding_side = "right"
    assert session.scores_together == (session.generation == "current")
    assert not padding_is_harmless(make_model("gpt2"))  # positions are learned
    assert padding_is_harmless(make_model("gptj"))
