"""The facts that SmolLM2 knows, as edits."""

import json
import runpy
from pathlib import Path

import pytest

from baft_easyedit.facts import edit_requests, facts, questions, relations
from baft_easyedit.facts.tables import DATA, known_phrasings, prompts_to_complete, tables_hash
from baft_easyedit.generation import generate_answers, load_model

SPLITS = {"known": "eval", "known_train": "train"}
SCRIPT = Path(__file__).parent.parent / "scripts/find_known_facts.py"
answers_follow = runpy.run_path(str(SCRIPT))["answers_follow"]


@pytest.fixture(scope="module")
def known_prompts():
    """The answers to all prompts that are answered rightly."""
    known = known_phrasings()
    return {
        a.prompt: a.answer for a in prompts_to_complete() if a.phrasing in known.get(a.case, [])
    }


@pytest.mark.parametrize("split", SPLITS)
def test_known_facts_are_enough_and_of_their_split(split):
    cases, every = {record["case_id"] for record in edit_requests(split)}, facts()
    assert len(cases) >= 200
    assert cases <= {record["case_id"] for record in edit_requests(SPLITS[split])}
    assert cases <= set(known_phrasings())
    assert len({every[case].relation for case in cases}) >= 12


@pytest.mark.parametrize("split", SPLITS)
def test_records_ask_what_is_known_and_learn_from_it(split, known_prompts):
    usual = {record["case_id"]: record for record in edit_requests(SPLITS[split])}
    texts = {f"{prompt} {answer}" for prompt, answer in known_prompts.items()}
    records = edit_requests(split)
    for record in records:
        assert known_prompts[record["prompt"]] == record["ground_truth"] != record["target_new"]
        assert record["rephrase_prompt"] != record["prompt"]
        for probe in record["locality"].values():
            assert known_prompts[probe["prompt"]] == probe["ground_truth"]
        assert len(set(record["loc_prompt"])) == 4
        assert texts.issuperset(record["loc_prompt"])
        assert record.keys() == usual[record["case_id"]].keys()
    assert sum(record["rephrase_prompt"] in known_prompts for record in records) >= len(records) / 3


def test_targets_are_known_values_of_the_relation():
    known = facts()
    values = {}
    for case in known_phrasings():
        values.setdefault(known[case].relation, set()).add(known[case].answer)
    for record in edit_requests("known"):
        assert record["target_new"] in values[known[record["case_id"]].relation]


def test_numbers_are_of_the_tables():
    known = json.loads((DATA / "known.json").read_text())
    assert known["tables"] == tables_hash(), "run scripts/find_known_facts.py"


def test_questions_are_not_completed():
    asked = list(prompts_to_complete())
    assert not [a for a in asked if a.prompt.endswith("?")]
    named, every = {relation.name: relation for relation in relations()}, facts()
    for one in asked[::50]:
        phrasing = named[every[one.case].relation].all[one.phrasing]
        assert one.prompt == phrasing.format(subject=every[one.case].subject)


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
