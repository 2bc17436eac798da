"""Edit requests: EasyEdit's schema, counterfactual, disjoint splits, the same every time."""

from collections import Counter

import pytest

from baft_easyedit.facts import (
    edit_requests,
    facts,
    questions,
    relations,
    split_of,
    two_hop_rules,
)


@pytest.fixture(scope="module")
def splits():
    return {split: edit_requests(split) for split in ("train", "eval")}


@pytest.fixture(scope="module")
def true_answers():
    kinds = ("trained", "held_out", "two_hop_trained", "two_hop_held_out")
    return {question.prompt: question.answer for kind in kinds for question in questions(kind)}


def test_splits_are_large_and_disjoint(splits):
    cases = {split: {record["case_id"] for record in records} for split, records in splits.items()}
    assert len(cases["train"]) >= 300
    assert len(cases["eval"]) >= 300
    assert not cases["train"] & cases["eval"]
    assert len(cases["train"] | cases["eval"]) == len(facts())


def test_edit_requests_are_the_same_on_every_call(splits):
    assert edit_requests("eval") == splits["eval"]
    assert edit_requests("eval", 7) == splits["eval"][:7]
    assert edit_requests("train", 0) == []


def test_eval_prefix_is_mixed_over_relations(splits):
    known = facts()
    share = Counter(fact.relation for fact in known)
    prefix = Counter(known[record["case_id"]].relation for record in splits["eval"][:100])
    assert len(prefix) >= 25
    assert max(prefix.values()) <= 15
    assert all(abs(prefix[name] / 100 - share[name] / len(known)) < 0.08 for name in share)


def test_records_follow_the_schema(splits):
    keys = {"case_id", "prompt", "target_new", "ground_truth", "subject", "rephrase_prompt"}
    keys |= {"portability", "locality", "loc_prompt"}
    for record in splits["train"] + splits["eval"]:
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


def test_records_edit_a_true_fact_to_another_value_of_its_relation(splits, true_answers):
    known = facts()
    held_out = {relation.name: relation.held_out for relation in relations()}
    trained = {question.prompt for question in questions("trained")}
    values = {}
    for fact in known:
        values.setdefault(fact.relation, set()).add(fact.answer)
    for record in splits["train"] + splits["eval"]:
        fact = known[record["case_id"]]
        assert true_answers[record["prompt"]] == record["ground_truth"] == fact.answer
        assert record["target_new"] != record["ground_truth"]
        assert record["target_new"] in values[fact.relation]
        assert record["prompt"] in trained
        assert record["rephrase_prompt"] == held_out[fact.relation].format(subject=fact.subject)


def test_records_portability_follows_from_the_new_target(splits, true_answers):
    answers = {fact.key: fact.answer for fact in facts()}
    then = {rule.relation: rule.then for rule in two_hop_rules()}
    known, changed, total = facts(), 0, 0
    for record in splits["train"] + splits["eval"]:
        if not record["portability"]:
            continue
        probe = record["portability"]["two_hop"]
        second = then[known[record["case_id"]].relation]
        assert probe["ground_truth"] == answers[second, record["target_new"]]
        total += 1
        changed += probe["ground_truth"] != true_answers.get(probe["prompt"])
    assert total >= 500
    assert changed == total


def test_records_locality_is_true_and_about_something_else(splits, true_answers):
    asked, known = {question.prompt: question for question in questions("trained")}, facts()
    for record in splits["train"] + splits["eval"]:
        for name, probe in record["locality"].items():
            assert true_answers[probe["prompt"]] == probe["ground_truth"]
            assert probe["prompt"] not in (record["prompt"], record["rephrase_prompt"])
            if name == "same_subject":
                assert record["subject"] in probe["prompt"]
        unrelated = asked[record["locality"]["unrelated"]["prompt"]]
        assert unrelated.relation != known[record["case_id"]].relation
        assert unrelated.subject != record["subject"]


def test_records_loc_prompts_are_neighbours_of_the_train_split_that_are_not_probed(splits):
    texts = {}
    by_fact = {fact.key: fact for fact in facts()}
    for question in questions("trained"):
        fact = by_fact[question.relation, question.subject]
        texts[f"{question.prompt} {question.answer}"] = fact
    known = facts()
    for record in splits["train"] + splits["eval"]:
        edited = known[record["case_id"]]
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
