"""CounterFact's scores by probability, fluency and specificity, from told likelihoods."""

from math import exp, log2
from types import SimpleNamespace

import pytest
import torch

from baft_easyedit.bench.probabilities import field_scores, ngram_entropy
from baft_easyedit.bench.scores import FIELD_SCORES, row_scores
from baft_easyedit.easyedit.likelihoods import Likelihood

CASE = {
    "prompt": "P",
    "target_new": "new",
    "ground_truth": "true",
    "counterfact": {"paraphrase": ["A", "B"], "neighborhood": ["N"], "generation": ["G", "H I"]},
    "locality": {"n": {"prompt": ["N"], "ground_truth": ["true"]}},
}
CASE["counterfact"]["reference"] = ["P1", "Q1"]  # no prompts
NLLS = {("P", "new"): 1.0, ("A", "new"): 3.0, ("N", "new"): 2.5}
"""Of the others 2.0."""


class Session:
    """Finds answers as likely as it is told, and writes what it likes."""

    def __init__(self):
        self.editor = SimpleNamespace(hparams=SimpleNamespace())
        self.editor.tok = lambda text: {"input_ids": text.split()}
        self.asked, self.limits = [], []

    def likelihoods(self, asked):
        self.asked = asked
        return [
            Likelihood(NLLS.get((p, a), 2.0), 0.5 if is_local else 1.0) for p, a, is_local in asked
        ]

    def answers(self, prompts, limits, top_k):
        self.limits = limits, top_k, torch.rand(1).item()
        return ["a b c"] * len(prompts)


def test_success_is_the_wanted_answer_likelier_and_magnitude_by_how_much():
    session = Session()
    (scores,) = field_scores(session, [CASE], False)
    assert scores == pytest.approx(
        {
            "rewrite_success": 1.0,
            "rewrite_magnitude": exp(-1) - exp(-2),
            "paraphrase_success": 0.0,  # the same is not more
            "paraphrase_magnitude": (exp(-3) - exp(-2)) / 2,
            "neighborhood_success": 1.0,
            "neighborhood_magnitude": exp(-2) - exp(-2.5),
            "specificity_acc": 0.5,
        }
    )
    assert len(set(session.asked)) == len(session.asked) == 8
    assert ("N", "true", True) in session.asked  # without the chat template


def test_a_part_that_a_record_lacks_has_no_score():
    bare = {**CASE, "counterfact": {}, "locality": {}}
    assert set(field_scores(Session(), [bare], True)[0]) == {"rewrite_success", "rewrite_magnitude"}
    untrue = {**CASE, "ground_truth": None, "locality": {}}
    assert field_scores(Session(), [untrue, {**bare, "counterfact": None}], True) == [{}, {}]


def test_fluency_is_that_of_drawn_texts_with_their_prompts_and_draws_nothing_from_others():
    session, before = Session(), torch.get_rng_state()
    (scores,) = field_scores(session, [CASE], True)
    expected = (ngram_entropy("G a b c") + ngram_entropy("H I a b c")) / 2
    assert scores["ngram_entropy"] == expected
    assert scores["texts"] == ["G a b c", "H I a b c"]
    assert torch.equal(torch.get_rng_state(), before)
    told = session.limits
    assert told[:2] == ([99, 98], 5)  # 100 tokens in all
    field_scores(session, [CASE], True)
    assert session.limits == told


def test_entropy_of_n_grams_is_roms():
    # Bigrams: ab twice, ba once; trigrams: aba, bab.
    bigrams = 2 / 3 * log2(3 / 2) + 1 / 3 * log2(3)
    assert ngram_entropy("a b a b") == pytest.approx((2 / 3 * bigrams + 4 / 3 * 1.0) / 2)
    assert ngram_entropy("again again again again") == ngram_entropy("word") == 0.0
    assert ngram_entropy("a,b. It's 1,000.5 eco-cars") == ngram_entropy("a , b . c d e f")


def test_s_is_the_harmonic_mean_of_the_rows_means():
    scores = dict.fromkeys(FIELD_SCORES, 0.5) | {"rewrite_success": 1.0}
    worse = {**scores, "rewrite_success": 0.0, "paraphrase_success": None}
    row = row_scores([{"scores": scores}, {"scores": worse}])
    assert row["harmonic_success"] == row["pre_harmonic_success"] == 0.5
    assert row_scores([{"scores": {"rewrite_acc": 1.0}}])["harmonic_success"] is None
