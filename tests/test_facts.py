"""The fact tables, the questions and edit requests made of them, and what SmolLM2 knows of them."""

import json
import runpy
from collections import Counter, defaultdict
from pathlib import Path
from typing import get_args

import pytest

from baft_easyedit.facts import (
    edit_requests,
    facts,
    questions,
    relations,
    split_of,
    two_hop_rules,
)
from baft_easyedit.facts.questions import Kind
from baft_easyedit.facts.tables import (
    DATA,
    SUBJECT_SLOT,
    known_phrasings,
    prompts_to_complete,
    tables_hash,
)
from baft_easyedit.generation import generate_answers, load_model

KNOWN = {"known": "eval", "known_train": "train"}
SCRIPT = Path(__file__).parent.parent / "scripts/find_known_facts.py"
answers_follow = runpy.run_path(str(SCRIPT))["answers_follow"]
FACTS = facts()
RELATIONS = {relation.name: relation for relation in relations()}


@pytest.fixture(scope="module")
def splits():
    return {split: edit_requests(split) for split in ("train", "eval", *KNOWN)}


@pytest.fixture(scope="module")
def records(splits):
    """All records that are about facts, known to SmolLM2 or not."""
    return splits["train"] + splits["eval"]


@pytest.fixture(scope="module")
def true_answers():
    return {
        question.prompt: question.answer for kind in get_args(Kind) for question in questions(kind)
    }


@pytest.fixture(scope="module")
def known_prompts():
    """The answers to all prompts that are answered rightly."""
    known = known_phrasings()
    return {
        a.prompt: a.answer for a in prompts_to_complete() if a.phrasing in known.get(a.case, [])
    }


def test_facts_are_many_and_unique():
    counts = Counter(fact.relation for fact in FACTS)
    assert len({fact.key for fact in FACTS}) == len(FACTS) >= 1500
    assert counts["element_symbol"] == 118
    assert counts["currency_code"] >= 130
    assert counts["country_capital"] >= 180


def test_facts_have_short_clean_text():
    for fact in FACTS:
        for text in (fact.subject, fact.answer):
            assert text == " ".join(text.split()) != ""
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
    assert {fact.answer for fact in FACTS if fact.key == (relation, subject)} == {answer}


def test_relations_have_five_phrasings_and_one_held_out():
    for relation in RELATIONS.values():
        assert len(relation.trained) >= 4, relation.name
        assert relation.held_out not in relation.trained
        phrasings = relation.all
        assert {phrasing.endswith("?") for phrasing in phrasings} == {True, False}
        assert all(phrasing.count(SUBJECT_SLOT) == 1 for phrasing in phrasings)
        places = {phrasing.index(SUBJECT_SLOT) for phrasing in phrasings}
        assert 0 in places or len(places) > 2


def test_two_hop_rules_chain_known_relations():
    for rule in two_hop_rules():
        assert {rule.relation, rule.then} <= set(RELATIONS)
        assert all(phrasing.count(SUBJECT_SLOT) == 1 for phrasing in rule.phrasings)


def test_questions_never_have_two_answers():
    answers = {}
    for kind in get_args(Kind):
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


def test_splits_are_large_and_disjoint(splits):
    cases = {split: {record["case_id"] for record in own} for split, own in splits.items()}
    assert min(len(cases["train"]), len(cases["eval"])) >= 300
    assert not cases["train"] & cases["eval"]
    assert len(cases["train"] | cases["eval"]) == len(FACTS)
    for split, whole in KNOWN.items():
        assert len(cases[split]) >= 200
        assert cases[split] <= cases[whole] & set(known_phrasings())
        assert len({FACTS[case].relation for case in cases[split]}) >= 12


def test_edit_requests_are_the_same_on_every_call(splits):
    assert edit_requests("eval") == splits["eval"]
    assert edit_requests("eval", 7) == splits["eval"][:7]
    assert edit_requests("train", 0) == []


def test_eval_prefix_is_mixed_over_relations(splits):
    share = Counter(fact.relation for fact in FACTS)
    prefix = Counter(FACTS[record["case_id"]].relation for record in splits["eval"][:100])
    assert len(prefix) >= 25
    assert max(prefix.values()) <= 15
    assert all(abs(prefix[name] / 100 - share[name] / len(FACTS)) < 0.08 for name in share)


def test_records_follow_the_schema(splits):
    keys = {"case_id", "prompt", "target_new", "ground_truth", "subject", "rephrase_prompt"}
    keys |= {"portability", "locality", "loc_prompt"}
    for record in (record for own in splits.values() for record in own):
        assert set(record) == keys
        assert {"neighborhood", "unrelated"} <= set(record["locality"])
        assert set(record["locality"]) <= {"neighborhood", "same_subject", "unrelated"}
        assert set(record["portability"]) <= {"two_hop"}
        probes = [*record["locality"].values(), *record["portability"].values()]
        assert all(set(probe) == {"prompt", "ground_truth"} for probe in probes)
        prompts = [record["prompt"], record["rephrase_prompt"], *(p["prompt"] for p in probes)]
        targets = [record["target_new"], *(p["ground_truth"] for p in probes)]
        assert all(text and text == text.strip() for text in prompts + targets)
        assert record["subject"] in record["prompt"]
        assert record["subject"] in record["rephrase_prompt"]


def values_of(known):
    """The answers to each relation."""
    values = defaultdict(set)
    for fact in known:
        values[fact.relation].add(fact.answer)
    return values


def test_records_edit_a_true_fact_to_another_value_of_its_relation(records, true_answers):
    trained = {question.prompt for question in questions("trained")}
    values = values_of(FACTS)
    for record in records:
        fact = FACTS[record["case_id"]]
        assert true_answers[record["prompt"]] == record["ground_truth"] == fact.answer
        assert record["target_new"] in values[fact.relation] - {fact.answer}
        assert record["prompt"] in trained
        held_out = RELATIONS[fact.relation].held_out
        assert record["rephrase_prompt"] == held_out.format(subject=fact.subject)


def test_records_portability_follows_from_the_new_target(records, true_answers):
    answers = {fact.key: fact.answer for fact in FACTS}
    then = {rule.relation: rule.then for rule in two_hop_rules()}
    asked = [record for record in records if record["portability"]]
    assert len(asked) >= 500
    for record in asked:
        probe = record["portability"]["two_hop"]
        second = then[FACTS[record["case_id"]].relation]
        assert probe["ground_truth"] == answers[second, record["target_new"]]
        assert probe["ground_truth"] != true_answers.get(probe["prompt"])


def test_records_locality_is_true_and_about_something_else(records, true_answers):
    asked = {question.prompt: question for question in questions("trained")}
    for record in records:
        for name, probe in record["locality"].items():
            assert true_answers[probe["prompt"]] == probe["ground_truth"]
            assert probe["prompt"] not in (record["prompt"], record["rephrase_prompt"])
            if name == "same_subject":
                assert record["subject"] in probe["prompt"]
        unrelated = asked[record["locality"]["unrelated"]["prompt"]]
        assert unrelated.relation != FACTS[record["case_id"]].relation
        assert unrelated.subject != record["subject"]


def test_records_loc_prompts_are_neighbours_of_the_train_split_that_are_not_probed(records):
    by_fact = {fact.key: fact for fact in FACTS}
    texts = {f"{q.prompt} {q.answer}": by_fact[q.relation, q.subject] for q in questions("trained")}
    for record in records:
        edited = FACTS[record["case_id"]]
        chosen = [texts[text] for text in record["loc_prompt"]]
        assert len({fact.key for fact in chosen}) == 4
        probes = record["locality"].values()
        probed = {texts[f"{p['prompt']} {p['ground_truth']}"].key for p in probes}
        for fact in chosen:
            assert split_of(fact) == "train"
            assert fact.relation == edited.relation
            assert fact.subject != edited.subject
            assert fact.answer != record["target_new"]
            assert fact.key not in probed


def test_edit_requests_reject_an_unknown_split_and_a_limit_out_of_range():
    with pytest.raises(ValueError, match=r"split must be one of .*'eval'.*but got 'test'"):
        edit_requests("test")
    for limit in (-1, 10**6):
        with pytest.raises(ValueError, match=rf"limit must be in \[0, \d+\] .* got {limit};"):
            edit_requests("eval", limit)


@pytest.mark.parametrize("split", KNOWN)
def test_records_ask_what_is_known_and_learn_from_it(split, splits, known_prompts):
    texts = {f"{prompt} {answer}" for prompt, answer in known_prompts.items()}
    for record in splits[split]:
        assert known_prompts[record["prompt"]] == record["ground_truth"] != record["target_new"]
        assert record["rephrase_prompt"] != record["prompt"]
        for probe in record["locality"].values():
            assert known_prompts[probe["prompt"]] == probe["ground_truth"]
        assert len(set(record["loc_prompt"])) == 4
        assert texts.issuperset(record["loc_prompt"])
    rephrased = [record["rephrase_prompt"] in known_prompts for record in splits[split]]
    assert sum(rephrased) >= len(rephrased) / 3


def test_targets_are_known_values_of_the_relation(splits):
    values = values_of(FACTS[case] for case in known_phrasings())
    for record in splits["known"]:
        assert record["target_new"] in values[FACTS[record["case_id"]].relation]


def test_numbers_are_of_the_tables():
    known = json.loads((DATA / "known.json").read_text())
    assert known["tables"] == tables_hash(), "run scripts/find_known_facts.py"


def test_questions_are_not_completed():
    asked = list(prompts_to_complete())
    assert not [a for a in asked if a.prompt.endswith("?")]
    for one in asked[::50]:
        phrasing = RELATIONS[FACTS[one.case].relation].all[one.phrasing]
        assert one.prompt == phrasing.format(subject=FACTS[one.case].subject)


def test_what_decoding_would_give_is_read_off_one_forward():
    model, tokenizer = load_model("bundled")
    asked = [(q.prompt, q.answer) for q in questions("held_out")[::40]]
    said = generate_answers(model, tokenizer, [prompt for prompt, _ in asked], 24)
    wanted = [text == answer for text, (_, answer) in zip(said, asked, strict=True)]
    assert {True, False} == set(wanted)
    assert answers_follow(model, tokenizer, asked) == wanted
    words = [q for q in questions("trained")[:40] if q.answer.isalpha()]
    begun = [(q.prompt, q.answer[:-2]) for q in words]
    assert not any(answers_follow(model, tokenizer, begun))


@pytest.mark.slow
@pytest.mark.real
def test_a_sample_is_answered_rightly_still(real_model, known_prompts):
    sample = list(known_prompts.items())[::80]
    answers = generate_answers(*real_model, [prompt for prompt, _ in sample], 8)
    assert [a[: len(true)] for a, (_, true) in zip(answers, sample, strict=True)] == [
        true for _, true in sample
    ]
    assert all(answers_follow(*real_model, sample))
    assert not any(answers_follow(*real_model, [(prompt, "Freedonia") for prompt, _ in sample[:8]]))
