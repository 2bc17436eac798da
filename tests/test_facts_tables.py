"""The fact tables: complete, unique, and true in samples."""

from collections import Counter

import pytest

from baft_easyedit.facts import facts, questions, relations, two_hop_rules
from baft_easyedit.facts.tables import SUBJECT_SLOT


def test_facts_are_many_and_unique():
    known, counts = facts(), Counter(fact.relation for fact in facts())
    assert len({fact.key for fact in known}) == len(known) >= 1500
    assert counts["element_symbol"] == 118
    assert counts["currency_code"] >= 130
    assert counts["country_capital"] >= 180


def test_facts_have_short_clean_text():
    for fact in facts():
        for text in (fact.subject, fact.answer):
            assert text
            assert text == " ".join(text.split())
            assert text.isascii()
        assert len(fact.answer.split()) <= 5


@pytest.mark.parametrize(
    ("relation", "subject", "answer"),
    [
        ("country_capital", "Australia", "Canberra"),
        ("country_currency", "Japan", "Japanese yen"),
        ("element_symbol", "tungsten", "W"),
        ("book_author", "Moby-Dick", "Herman Melville"),
        ("landmark_city", "Eiffel Tower", "Paris"),
        ("state_capital", "California", "Sacramento"),
        ("star_constellation", "Vega", "Lyra"),
    ],
)
def test_facts_state_what_is_known(relation, subject, answer):
    assert {fact.answer for fact in facts() if fact.key == (relation, subject)} == {answer}


def test_relations_have_five_phrasings_and_one_held_out():
    for relation in relations():
        assert len(relation.trained) >= 4, relation.name
        assert relation.held_out not in relation.trained
        phrasings = (*relation.trained, relation.held_out)
        assert any(phrasing.endswith("?") for phrasing in phrasings)
        assert any(not phrasing.endswith("?") for phrasing in phrasings)
        assert all(phrasing.count(SUBJECT_SLOT) == 1 for phrasing in phrasings)
        assert (
            any(phrasing.startswith(SUBJECT_SLOT) for phrasing in phrasings)
            or len({phrasing.index(SUBJECT_SLOT) for phrasing in phrasings}) > 2
        )


def test_two_hop_rules_chain_known_relations():
    names = {relation.name for relation in relations()}
    for rule in two_hop_rules():
        assert {rule.relation, rule.then} <= names
        assert all(phrasing.count(SUBJECT_SLOT) == 1 for phrasing in rule.phrasings)


def test_questions_never_have_two_answers():
    answers = {}
    for kind in ("trained", "held_out", "two_hop_trained", "two_hop_held_out"):
        for question in questions(kind):
            assert question.subject in question.prompt
            assert question.prompt == question.prompt.strip()
            assert answers.setdefault(question.prompt, question.answer) == question.answer


def test_questions_held_out_are_not_among_the_trained():
    for held_out, trained in (("held_out", "trained"), ("two_hop_held_out", "two_hop_trained")):
        seen = {question.prompt for question in questions(trained)}
        assert seen
        assert not seen & {question.prompt for question in questions(held_out)}


def test_questions_two_hop_follow_from_two_facts():
    asked = questions("two_hop_trained") + questions("two_hop_held_out")
    question = next(q for q in asked if q.prompt.startswith("The painter of Guernica comes"))
    assert question.answer == "Spain"


def test_questions_reject_an_unknown_kind():
    with pytest.raises(ValueError, match=r"kind must be one of .*'trained'.*got 'hard'"):
        questions("hard")
