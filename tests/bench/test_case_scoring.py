"""Scoring of one case, with a session that answers from a table."""

from types import SimpleNamespace

import pytest

from baft_easyedit.bench.scoring import (
    PreEditScores,
    any_alias_portability,
    generation_scores,
    immediate_scores,
    questions_of,
    score_case,
)

CASE = {
    "prompt": "P",
    "target_new": "new",
    "rephrase_prompt": "R",
    "locality": {"a": {"prompt": ["L1", "L2"], "ground_truth": ["x", "y"]}},
    "portability": {
        "hop": {
            "prompt": ["H1", "H2"],
            "ground_truth": ["one", "two"],
            "aliases": [["one", "1", "I"], ["two"]],
        }
    },
}


class Session:
    """Scores like EasyEdit, from what it is told."""

    def __init__(self):
        self.editor = SimpleNamespace(
            tok=None, hparams=SimpleNamespace(max_length=40), alg_name="BaFT"
        )
        self.editor.tok = SimpleNamespace(padding_side="left")
        self.scored = []

    def score(self, request):
        self.scored.append(request)
        return {"rewrite_acc": [0.5], "rephrase_acc": [1.0], "locality": {}, "portability": {}}

    def score_against(self, pre, request):
        post = {"rewrite_acc": [1.0], "portability": {"hop_acc": [0.25, 0.5]}}
        return {"pre": pre, "post": post}

    def token_accuracies(self, prompts, targets):
        assert (prompts, targets) == (["H1", "H1"], ["1", "I"])
        return [0.75, 0.0]


def test_a_case_is_asked_its_prompt_its_rephrasing_and_its_probes():
    asked = [(q.section, q.key, q.prompt, q.answer) for q in questions_of(CASE)]
    assert asked == [
        ("rewrite", "", "P", "new"),
        ("rephrase", "", "R", "new"),
        ("locality", "a", "L1", "x"),
        ("locality", "a", "L2", "y"),
        ("portability", "hop", "H1", "one"),
        ("portability", "hop", "H2", "two"),
    ]
    assert len(questions_of({"prompt": "P", "target_new": "new"})) == 1


def test_generated_answers_match_exactly_or_agree_with_those_before():
    before = ["old", "old", "x", "other", "?", "?"]
    after = ["new", "new and more", "x", "y", "one", "2"]
    assert generation_scores(CASE, before, after) == {
        "gen_rewrite_acc": 1.0,
        "gen_rephrase_acc": 0.0,
        "gen_locality_acc": 0.5,  # against the answer before, not the truth
        "gen_portability_acc": 0.5,
    }
    alone = generation_scores({"prompt": "P", "target_new": "new"}, ["old"], ["new"])
    assert alone["gen_locality_acc"] is None


def test_the_best_of_the_accepted_answers_counts_beside_the_first():
    post = {"portability": {"hop_acc": [0.25, 0.5]}}
    assert any_alias_portability(Session(), CASE, post) == pytest.approx((0.75 + 0.5) / 2)
    single = {"hop": {"prompt": ["H1"], "ground_truth": ["one"], "aliases": [["one"]]}}
    assert any_alias_portability(Session(), {**CASE, "portability": single}, post) is None
    assert any_alias_portability(Session(), {**CASE, "portability": {}}, post) is None


def test_protocols_are_not_mixed_in_a_case():
    scored = score_case(Session(), CASE, {"metrics": {"x": 1}, "answers": None}, False)
    assert scored["answers"] is None
    assert scored["scores"]["rewrite_acc"] == 1.0
    assert scored["scores"]["portability_acc"] == 0.375
    assert not any(name.startswith("gen_") for name in scored["scores"])


def test_immediate_scores_leave_the_probes_out():
    session = Session()
    assert immediate_scores(session, CASE) == {
        "immediate_rewrite_acc": 0.5,
        "immediate_rephrase_acc": 1.0,
    }
    assert session.scored[0]["locality"] == session.scored[0]["portability"] == {}


@pytest.fixture
def pre_edit(tmp_path):
    def make(**depends_on):
        return PreEditScores(lambda key, i: tmp_path / key / f"{i}.json", depends_on, False)

    return make


def test_scores_before_the_edit_are_computed_once(pre_edit):
    session = Session()
    first = pre_edit(model="m").get(session, 3, CASE)
    assert pre_edit(model="m").get(session, 3, CASE) == first
    assert len(session.scored) == 1


@pytest.mark.parametrize("what", ["model", "padding", "case", "length", "scoring"])
def test_scores_before_the_edit_depend_on_all_that_matters(pre_edit, what):
    session = Session()
    pre_edit(model="m").get(session, 0, CASE)
    case, model = CASE, "m"
    if what == "model":
        model = "other"
    elif what == "padding":
        session.editor.tok.padding_side = "right"
    elif what == "case":
        case = {**CASE, "target_new": "newer"}
    elif what == "length":
        session.editor.hparams.max_length = 80
    else:
        session.editor.alg_name = "GRACE"  # scored by generation
    pre_edit(model=model).get(session, 0, case)
    assert len(session.scored) == 2


def test_graces_aliases_are_not_scored_by_another_protocol():
    session = Session()
    session.editor.alg_name = "GRACE"
    post = {"portability": {"hop_acc": [0.25, 0.5]}}
    assert any_alias_portability(session, CASE, post) is None
