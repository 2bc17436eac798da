"""What each kind of benchmark file becomes."""

import json

import pytest
from dataset_files import (
    convsent,
    counterfact,
    knowedit,
    mquake,
    records_of,
    request,
    rome,
    wikibio,
    write_records,
    zsre,
)

from baft_easyedit.bench.data import load_dataset
from baft_easyedit.facts import edit_requests


@pytest.fixture
def load(tmp_path):
    return lambda kind, records, **arguments: load_dataset(
        kind, write_records(tmp_path, records), **arguments
    )


def probe(prompts, *aliases):
    """Return a probe; each prompt has its accepted answers."""
    return {"prompt": prompts, "ground_truth": [a[0] for a in aliases], "aliases": list(aliases)}


def test_zsre_has_the_requests_of_the_wise_example_and_the_new_question(load):
    assert load("zsre", [zsre("Acme")]).requests == [
        {
            "case_id": 0,
            "prompt": "When was Acme founded?",
            "target_new": "2006",
            "ground_truth": "1998",
            "subject": "Acme",
            "rephrase_prompt": "What year saw the start of Acme?",
            "loc_prompt": "nq question: who wrote it Ann",
            "locality": {"neighborhood": probe(["nq question: who sang about Acme"], ["Roxette"])},
            "portability": {"one_hop": probe(["What is Acme?"], ["A club"])},
        }
    ]


def test_zsre_skips_empty_targets_and_pairs_loc_prompts_by_record(load, tmp_path):
    records = [zsre("Acme"), zsre("Bolt", alt=""), zsre("Cell")]
    dataset = load("zsre", records)
    assert [r["case_id"] for r in dataset.requests] == [0, 2]
    assert dataset.notes[:2] == [
        "1 loc prompts are used in turn for 3 records",
        "records skipped, for their alt is empty: [1]",
    ]
    path = write_records(tmp_path, records)
    train = [{"loc": f"question {i}", "loc_ans": "x"} for i in range(3)]
    (tmp_path / "zsre_mend_train.json").write_text(json.dumps(train))
    dataset = load_dataset("zsre", path)
    assert [r["loc_prompt"] for r in dataset.requests] == ["question 0 x", "question 2 x"]
    assert not any("in turn" in note for note in dataset.notes)


def test_zsre_without_loc_prompts_needs_no_train_file(load, tmp_path):
    path = write_records(tmp_path, records_of("zsre"))
    (tmp_path / "zsre_mend_train.json").unlink()
    dataset = load_dataset("zsre", path, loc_prompts=False)
    assert len(dataset.files) == 1
    assert "loc_prompt" not in dataset.requests[0]
    with pytest.raises(FileNotFoundError, match=r"there is none at .*zsre_mend_train\.json"):
        load_dataset("zsre", path)


def test_knowedit_has_the_probes_of_easyedits_example(load):
    assert load("wikidata-recent", [knowedit("France")]).requests == [
        {
            "case_id": 0,
            "prompt": "The capital of France is",
            "target_new": "Rome",
            "ground_truth": None,
            "subject": "France",
            "rephrase_prompt": "France has the capital",
            "locality": {
                "Relation_Specificity": probe(["The currency of France is"], ["euro", "EUR"])
            },
            "portability": {
                "Logical_Generalization": probe(["Is Rome a capital?"], ["yes", "it is"]),
                "reasoning": probe(
                    ["People in France's capital speak", "The mayor of France's capital is"],
                    ["Italian"],
                    ["Gualtieri"],
                ),
            },
        }
    ]


def test_knowedit_zsre_has_other_names_for_the_rephrased_prompt_and_the_truth(load):
    record = {**knowedit("France"), "ground_truth": ["Paris"], "rephrase_prompt": "Capital:"}
    del record["rephrase"]
    (request,) = load("knowedit-zsre", [record]).requests
    assert request["ground_truth"] == "Paris"
    assert request["rephrase_prompt"] == "Capital:"


def test_wikibio_loses_the_blank_after_its_paragraph_and_has_no_rephrased_prompt(load):
    (request,) = load("wikibio", [wikibio("jo smith")]).requests
    assert request["prompt"] == "This is a passage about jo smith. jo smith was a physician."
    assert request["target_new"].startswith("In 1850")
    assert request["subject"] == "jo smith"
    assert request["locality"] == {
        "Relation_Specificity": probe(["jo smith works in"], ["medicine"])
    }
    assert not {"rephrase_prompt", "loc_prompt"} & set(request)


def test_convsent_draws_are_of_both_sentiments_and_stay_the_same(load):
    records = [convsent(f"topic {i}") for i in range(60)]
    requests = load("convsent", records).requests
    assert requests == load("convsent", records, seed=0).requests
    assert requests[5:] == load("convsent", records, start=5).requests
    assert requests != load("convsent", records, seed=1).requests
    replies = {
        (r["target_new"], r["prompt"].split()[-1], r["prompt"].split(" answer ")[0])
        for r in requests
    }
    assert replies == {
        ("I like it.", "postively.", "From the sentiment dataset,"),
        ("I do not like it.", "negatively.", "From the sentiment dataset,"),
    }
    questions = {r["prompt"].split(" answer ")[1].split(r["subject"])[0] for r in requests}
    assert len(questions) == 13
    assert "What is your stance on " in questions


def test_counterfact_is_read_in_easyedits_layout(load):
    assert load("counterfact", [counterfact("Toko")]).requests == [
        {
            "case_id": 7,
            "prompt": "Toko, who plays the",
            "target_new": "piano",
            "ground_truth": "guitar",
            "subject": "Toko",
            "rephrase_prompt": "Toko is incredible at",
            "locality": {"neighborhood": probe(["John Lennon performs on the"], ["guitar"])},
            "portability": {},
        }
    ]


def test_counterfact_is_read_in_romes_layout(load):
    assert load("counterfact", [rome("Asha", 3)]).requests == [
        {
            "case_id": 3,
            "prompt": "Asha is a citizen of",
            "target_new": "Australia",
            "ground_truth": "India",
            "subject": "Asha",
            "rephrase_prompt": "Long ago. Asha has a passport of",
            "locality": {
                "neighborhood": probe(
                    ["Asha is a citizen of", "Ravi is a citizen of"], ["India"], ["India"]
                )
            },
            "portability": {},
        }
    ]


@pytest.mark.parametrize("template", ["{} and {} are", "{0} is", "no slot"])
def test_rewrite_without_one_slot_for_the_subject_is_an_error(load, template):
    record = rome("Asha", 3)
    record["requested_rewrite"]["prompt"] = template
    with pytest.raises(ValueError, match=r"requested_rewrite\.prompt: must have one \{\} for the"):
        load("counterfact", [record])


def test_mquake_edits_each_fact_and_asks_the_questions_with_the_last(load):
    dataset = load("mquake", [mquake("Ann", "Norway", 11), mquake("Bob", "Sweden", 12)])
    first, last = dataset.requests[:2]
    assert [r["case_id"] for r in dataset.requests] == ["11-0", "11-1", "12-0", "12-1"]
    assert first == {
        "case_id": "11-0",
        "prompt": "Ann is a citizen of",
        "target_new": "Norway",
        "ground_truth": "India",
        "subject": "Ann",
        "rephrase_prompt": "Whose citizen is Ann?",
        "locality": {},
        "portability": {},
    }
    answers = ["Mars", "the red planet"]
    assert last["prompt"] == "Norway is a citizen of"
    assert last["portability"] == {
        "multi_hop": probe(
            ["On what planet is Ann a citizen?", "What planet is Ann's?"], answers, answers
        )
    }
    assert dataset.notes[0].startswith("cases by their number of facts: 2 with 2;")


def test_requests_keep_their_own_keys_and_lose_empty_probes(load):
    assert load("requests", [request("France")]).requests == [
        {
            "target_neg": "Oslo",
            "case_id": 0,
            "prompt": "The capital of France is",
            "target_new": "Rome",
            "ground_truth": "Paris",
            "subject": "France",
            "rephrase_prompt": "France has the capital",
            "loc_prompt": ["Water boils at 100", "Snow is white"],
            "locality": {"nq": probe(["The sky is"], ["blue"])},
            "portability": {"hop": probe(["One is", "Two is"], ["1"], ["2", "two"])},
        }
    ]


def test_requests_need_no_more_than_prompt_and_target(load):
    (bare,) = load("requests", [{"prompt": "A is ", "target_new": " b", "locality": None}]).requests
    assert bare == {
        "case_id": 0,
        "prompt": "A is",
        "target_new": "b",
        "ground_truth": None,
        "locality": {},
        "portability": {},
    }


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("x", "must be a dict with the keys prompt and ground_truth; got 'x'"),
        (
            {"prompt": ["One is", "Two is"], "ground_truth": ["1"]},
            "ground_truth must be a list with an entry for each of 2 prompts",
        ),
        (
            {"prompt": ["One is"], "ground_truth": "1"},
            "ground_truth must be a list with an entry for each of 1 prompts",
        ),
        (
            {"prompt": "One is", "ground_truth": "1", "aliases": []},
            "aliases must be a list with an entry for each of 1 prompts",
        ),
    ],
)
def test_probe_of_another_shape_is_an_error(load, bad, message):
    with pytest.raises(ValueError, match=f"record 0: portability.hop: {message}"):
        load("requests", [{**request("France"), "portability": {"hop": bad}}])


def test_facts_are_the_packages_own(load):
    dataset = load_dataset("facts", limit=3)
    originals = edit_requests("eval", 3)
    keys = ("case_id", "prompt", "target_new", "ground_truth", "subject", "loc_prompt")
    for request_, original in zip(dataset.requests, originals, strict=True):
        assert {key: request_[key] for key in keys} == {key: original[key] for key in keys}
        assert set(request_["locality"]) == set(original["locality"])
    assert "countries.tsv" in [file.name for file in dataset.files]
    train = load_dataset("facts", split="train", limit=3)
    assert train.requests[0]["case_id"] == edit_requests("train", 1)[0]["case_id"]


@pytest.mark.parametrize(
    ("kind", "options", "error", "message"),
    [
        ("zsre", {"loc_prompts": "no"}, TypeError, "loc_prompts must be true or false; got 'no'"),
        ("convsent", {"seed": "x"}, TypeError, "seed must be an integer; got 'x'"),
        ("facts", {"path": "x"}, ValueError, "path must be None for facts, which .*; got x"),
        ("zsre", {"alpha": 1}, ValueError, r"options of zsre must be among \['loc_prompts'\]; got"),
        ("wikibio", {"file_name": 1}, ValueError, r"options of wikibio must be among \[\]; got"),
        ("trivia", {"path": "x"}, ValueError, "kind must be one of .*'mquake'.*; got 'trivia'"),
        ("wikibio", {}, ValueError, r"path must lead to wikibio-test-all\.json; got None"),
    ],
)
def test_bad_options_are_errors(kind, options, error, message):
    with pytest.raises(error, match=message):
        load_dataset(kind, **options)
