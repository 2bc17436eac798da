"""Scoring of cases, with a session that answers from a table."""

from functools import partial
from types import SimpleNamespace

import pytest

from baft_easyedit.bench.evaluate import (
    answer_questions,
    any_alias_portability,
    immediate_scores,
    pre_edit_scores,
    score_cases,
)
from baft_easyedit.bench.free_text import generation_scores
from baft_easyedit.bench.questions import questions_of, wild_questions
from baft_easyedit.bench.store import RunDirectory
from baft_easyedit.easyedit.likelihoods import Likelihood
from tests.conftest import make_tokenizer

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
        self.batch_size = 32
        self.scored = []

    def score(self, requests):
        self.scored += requests
        metrics = {"rewrite_acc": [0.5], "rephrase_acc": [1.0], "locality": {}, "portability": {}}
        return [metrics] * len(requests)

    def score_against(self, pre, requests):
        post = {"rewrite_acc": [1.0], "portability": {"hop_acc": [0.25, 0.5]}}
        return [{"pre": before, "post": post} for before in pre]

    def likelihoods(self, asked):
        return [Likelihood(1.0, 0.25)] * len(asked)

    def answers(self, prompts, max_new_tokens):
        pairs = zip(prompts, max_new_tokens, strict=True)
        return [f"{' '.join(map(str, prompt))} {limit}" for prompt, limit in pairs]

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
        "exact.Loc: a": 0.5,
        "exact.Por: hop": 0.5,
    }
    alone = generation_scores({"prompt": "P", "target_new": "new"}, ["old"], ["new"])
    assert alone["gen_locality_acc"] is None


def test_probes_are_scored_by_kind_and_apart_from_the_rest():
    probes = {
        "yes": {"prompt": ["Y"], "ground_truth": ["Yes"]},
        "same": {"prompt": ["S1", "S2"], "ground_truth": [None, None]},
    }
    request = {"prompt": "P", "target_new": "new", "probes": probes}
    assert [q.prompt for q in wild_questions(request)] == ["P"]
    scores = generation_scores(request, ["?", "?", "a", "b"], ["new", "yes, it is", "a", "c"])
    assert scores["gen_rewrite_acc"] == 1.0
    assert scores["gen_portability_acc"] is None
    assert {k: v for k, v in scores.items() if "." in k} == {
        "probes.yes": 0.0,
        "probes.same": 0.5,  # as before
        "contained.yes": 1.0,
    }


def test_the_best_of_the_accepted_answers_counts_beside_the_first():
    post = {"portability": {"hop_acc": [0.25, 0.5]}}
    assert any_alias_portability(Session(), CASE, post) == pytest.approx((0.75 + 0.5) / 2)
    single = {"hop": {"prompt": ["H1"], "ground_truth": ["one"], "aliases": [["one"]]}}
    assert any_alias_portability(Session(), {**CASE, "portability": single}, post) is None
    assert any_alias_portability(Session(), {**CASE, "portability": {}}, post) is None
    graces = Session()
    graces.editor.alg_name = "GRACE"  # whose first answer is scored by another protocol
    assert any_alias_portability(graces, CASE, post) is None


def test_each_case_gets_its_own_answers_cut_at_its_own_length():
    session = Session()
    session.editor.tok = lambda text, **_: {"input_ids": text.split()}
    other = {"prompt": "Q", "target_new": "w " * 20}
    answers = answer_questions(session, [CASE, other], "answers")
    assert answers == [[f"{p} 16" for p in ("P", "R", "L1", "L2", "H1", "H2")], ["Q 24"]]
    answered = ["P 16", "?", "L1 16", "?", "?", "?"]
    pre = {"metrics": {}, "answers": answered, "field_scores": {}}
    (scored,) = score_cases(session, [CASE], [pre], ["answers"])
    assert scored["answers"] == {"pre": pre["answers"], "post": answers[0]}
    assert scored["scores"]["gen_locality_acc"] == 0.5


def test_locality_is_asked_in_the_chat_template_too():
    """`Session` answers with the prompt as it is asked."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m['content'] }}>{% endfor %}"
    session = Session()
    session.editor.tok = tokenizer
    session.editor.hparams = SimpleNamespace(use_chat_template=True)
    session.answers = lambda prompts, limits: [tokenizer.decode(ids) for ids in prompts]
    (answers,) = answer_questions(session, [CASE], "answers")
    assert answers == ["<P>", "<R>", "<L1>", "<L2>", "<H1>", "<H2>"]


def test_protocols_are_not_mixed_in_a_case():
    pre = {"metrics": {"x": 1}, "answers": None, "field_scores": {"specificity_acc": 0.5}}
    written = {"ground_truth": "old", "counterfact": {"generation": ["G"]}}
    scored, _ = score_cases(Session(), [CASE | written, CASE], [pre, pre], [])
    assert scored["answers"] is scored["texts"] is None
    assert scored["scores"]["rewrite_acc"] == 1.0
    assert scored["scores"]["portability_acc"] == 0.375
    assert scored["scores"]["specificity_acc"] == 0.25
    assert scored["scores"]["pre_specificity_acc"] == 0.5
    assert not any(name.startswith("gen_") for name in scored["scores"])


def test_immediate_scores_leave_the_probes_out():
    session = Session()
    assert immediate_scores(session, CASE) == {
        "immediate_rewrite_acc": 0.5,
        "immediate_rephrase_acc": 1.0,
    }
    assert session.scored[0]["locality"] == session.scored[0]["portability"] == {}


def nothing(session):
    """Leave a session as it is."""


@pytest.mark.parametrize(
    ("change", "cases", "is_new"),
    [
        (nothing, [CASE], False),
        (lambda s: setattr(s.editor.hparams, "use_chat_template", False), [CASE], False),
        (lambda s: setattr(s.editor.tok, "padding_side", "right"), [CASE], True),
        (lambda s: setattr(s, "batch_size", 2), [CASE], True),
        (lambda s: setattr(s.editor.hparams, "max_length", 80), [CASE], True),
        (lambda s: setattr(s.editor, "alg_name", "GRACE"), [CASE], True),  # by generation
        (nothing, [{**CASE, "target_new": "newer"}], True),
        (nothing, [CASE, CASE], True),
    ],
)
def test_scores_before_the_edit_are_computed_once_for_all_that_they_depend_on(
    tmp_path, change, cases, is_new
):
    session, kept = Session(), partial(RunDirectory(tmp_path).kept, "pre_edit")
    first = pre_edit_scores(kept, session, [CASE], [])
    change(session)
    again = pre_edit_scores(kept, session, cases, [])
    assert again == first * len(cases)
    assert len(session.scored) == (1 + len(cases) if is_new else 1)
