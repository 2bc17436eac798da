"""What each kind of benchmark file becomes; selection, notes, hashes, errors."""

import hashlib
import json
import re

import pytest
from dataset_files import (
    HALLUEDIT,
    RECORDS,
    akew,
    convsent,
    counterfact,
    halluedit,
    knowedit,
    mquake,
    records_of,
    request,
    rome,
    unke,
    wikibigedit,
    wikibio,
    write_records,
    zsre,
)

from baft_easyedit.bench.data import load_dataset
from baft_easyedit.bench.store import FileHash
from baft_easyedit.facts import edit_requests


@pytest.fixture
def load(tmp_path):
    """Load records given as Python values."""
    return lambda kind, records, **arguments: load_dataset(
        kind, write_records(tmp_path, records), **arguments
    )


def probe(prompts, *aliases):
    """Return a probe; each prompt has its accepted answers."""
    return {"prompt": prompts, "ground_truth": [a[0] for a in aliases], "aliases": list(aliases)}


def made(prompt, target_new, ground_truth=None, case_id=0, locality=None, **others):
    """Return a request."""
    main = {"case_id": case_id, "prompt": prompt, "target_new": target_new}
    sections = {"locality": locality or {}, "portability": others.pop("portability", {})}
    return {**main, "ground_truth": ground_truth, **sections, **others}


CAPITAL = made(
    "The capital of France is",
    "Rome",
    subject="France",
    rephrase_prompt="France has the capital",
    locality={"Relation_Specificity": probe(["The currency of France is"], ["euro", "EUR"])},
    portability={
        "Logical_Generalization": probe(["Is Rome a capital?"], ["yes", "it is"]),
        "reasoning": probe(
            ["People in France's capital speak", "The mayor of France's capital is"],
            ["Italian"],
            ["Gualtieri"],
        ),
    },
)
MARS = ["Mars", "the red planet"]


@pytest.mark.parametrize(
    ("kind", "record", "expected"),
    [
        (
            "zsre",
            zsre("Acme"),
            made(
                "When was Acme founded?",
                "2006",
                "1998",
                subject="Acme",
                rephrase_prompt="What year saw the start of Acme?",
                loc_prompt="nq question: who wrote it Ann",
                locality={"neighborhood": probe(["nq question: who sang about Acme"], ["Roxette"])},
                portability={"one_hop": probe(["What is Acme?"], ["A club"])},
            ),
        ),
        ("wikidata-recent", knowedit("France"), CAPITAL),
        (
            "wikibio",
            wikibio("jo smith"),
            made(
                "This is a passage about jo smith. jo smith was a physician.",
                "In 1850 jo smith moved to London, where a clinic was founded.",
                subject="jo smith",
                locality={"Relation_Specificity": probe(["jo smith works in"], ["medicine"])},
            ),
        ),
        (
            "counterfact",
            counterfact("Toko"),
            made(
                "Toko, who plays the",
                "piano",
                "guitar",
                7,
                subject="Toko",
                rephrase_prompt="Toko is incredible at",
                locality={"neighborhood": probe(["John Lennon performs on the"], ["guitar"])},
            ),
        ),
        (
            "counterfact",
            rome("Asha", 3),
            made(
                "Asha is a citizen of",
                "Australia",
                "India",
                3,
                subject="Asha",
                rephrase_prompt="Long ago. Asha has a passport of",
                counterfact={
                    "paraphrase": ["Long ago. Asha has a passport of", "Another one"],
                    "neighborhood": ["Asha is a citizen of", "Ravi is a citizen of"],
                    "generation": ["Asha's passport says"],
                    "reference": ["P27", "Q1"],
                },
                locality={
                    "neighborhood": probe(
                        ["Asha is a citizen of", "Ravi is a citizen of"], ["India"], ["India"]
                    )
                },
            ),
        ),
        (
            "requests",
            request("France"),
            made(
                "The capital of France is",
                "Rome",
                "Paris",
                subject="France",
                rephrase_prompt="France has the capital",
                loc_prompt=["Water boils at 100", "Snow is white"],
                locality={"nq": probe(["The sky is"], ["blue"])},
                portability={"hop": probe(["One is", "Two is"], ["1"], ["2", "two"])},
                target_neg="Oslo",  # keys of their own are kept
            ),
        ),
        ("requests", {"prompt": "A is ", "target_new": " b", "locality": None}, made("A is", "b")),
        (
            "requests",
            {
                **{"prompt": "A is", "target_new": "b"},
                "probes": {"in French": {"prompt": "A est", "ground_truth": "b"}},
            },
            made("A is", "b", probes={"in French": probe(["A est"], ["b"])}),
        ),
    ],
)
def test_a_record_becomes_a_request(load, kind, record, expected):
    assert load(kind, [record]).requests == [expected]


def test_mquake_edits_each_fact_and_asks_the_questions_with_the_last(load):
    dataset = load("mquake", [mquake("Ann", "Norway", 11), mquake("Bob", "Sweden", 12)])
    first, last = dataset.requests[:2]
    assert [r["case_id"] for r in dataset.requests] == ["11-0", "11-1", "12-0", "12-1"]
    whose = {"subject": "Ann", "rephrase_prompt": "Whose citizen is Ann?"}
    assert first == made("Ann is a citizen of", "Norway", "India", "11-0", **whose)
    assert last["prompt"] == "Norway is a citizen of"
    prompts = ["On what planet is Ann a citizen?", "What planet is Ann's?"]
    assert last["portability"] == {"multi_hop": probe(prompts, MARS, MARS)}
    assert dataset.notes[0].startswith("cases by their number of facts: 2 with 2;")


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
    (tmp_path / "zsre_mend_train.json").unlink()
    without = load_dataset("zsre", path, loc_prompts=False)
    assert (len(without.files), "loc_prompt" in without.requests[0]) == (1, False)
    with pytest.raises(FileNotFoundError, match=r"there is none at .*zsre_mend_train\.json"):
        load_dataset("zsre", path)


def test_a_directory_of_wikibigedit_is_read_by_date(tmp_path):
    for period, subject in (("20240301_20240320", "Late"), ("20240201_20240220", "Early")):
        write_records(tmp_path, [wikibigedit(subject)], f"wiki_big_edit_{period}.json")
    (tmp_path / "zsre_mend_train.json").unlink()
    dataset = load_dataset("wikibigedit", tmp_path)
    assert [r["subject"] for r in dataset.requests] == ["Early", "Late"]
    assert len(dataset.files) == 2


def test_halluedit_is_read_from_csv(tmp_path):
    file = tmp_path / "places.csv"
    file.write_text("\n".join([HALLUEDIT, halluedit("Acme", "headquarters location")]))
    (request_,) = load_dataset("halluedit", file).requests
    assert request_["probes"]["locality"] == probe(["Who sang?"], [None])
    again = write_records(tmp_path, [request_])
    assert load_dataset("requests", again).requests == [request_]
    file.write_text(HALLUEDIT + "\n,industry,Rome")
    with pytest.raises(ValueError, match=r"places\.csv, record 0: prompt must not be empty"):
        load_dataset("halluedit", file)
    file.write_text(f"subject,relation,object\n{'x' * 200_000},y,z")
    with pytest.raises(ValueError, match=r"places\.csv must be CSV, and is not: field larger than"):
        load_dataset("halluedit", file)
    file.write_bytes(f"{HALLUEDIT}\nM\xfcnchen,industry,Rome".encode("latin-1"))
    with pytest.raises(ValueError, match=r"places\.csv must be UTF-8 text, and is not"):
        load_dataset("halluedit", file)
    file.write_text("subject,object\nAcme,Rome")
    with pytest.raises(
        ValueError, match=r"columns subject, .* 1 rows with the columns \['subject', 'o"
    ):
        load_dataset("halluedit", file)
    file.write_text("subject,relation,object\nAcme,city,Rome, in Italy")
    with pytest.raises(ValueError, match=r"record 0: no more than 3 values must .* got 4: put a v"):
        load_dataset("halluedit", file)
    file.write_text("subject,relation,object,object\nAcme,city,Rome,Bonn")
    with pytest.raises(ValueError, match=r"places\.csv must have each column once; got"):
        load_dataset("halluedit", file)
    file.write_text('subject,relation,object\nAcme,city,"Rome\nBolt,city,Bonn')
    with pytest.raises(ValueError, match=r"must be CSV, and is not: unexpected end of data"):
        load_dataset("halluedit", file)


def test_a_record_with_a_key_twice_is_refused(tmp_path):
    file = tmp_path / "records.json"
    file.write_text('[{"prompt": "a b", "prompt": "c d", "target_new": "x"}]')
    with pytest.raises(ValueError, match=r"records\.json must be JSON, and is not: .*'prompt'"):
        load_dataset("requests", file)


def test_long_answers_have_short_questions_on_them(load):
    (request_,) = load("unke", [unke("Ann", para_question=" ")]).requests
    assert (request_["rephrase_prompt"], request_["long_answer"]) == ("Who is Ann?", True)
    untold, bare = akew("Eve", "mquake"), akew("Tom", "wikiupdate")
    untold["requested_rewrite"][0]["fact_new_uns"] = ""
    dataset = load("akew", [akew("Bob", "counterfact"), untold])
    bare["requested_rewrite"]["unsfact_triplets_GPT"] = None
    assert "probes" not in load("akew", [bare]).requests[0]
    with pytest.raises(ValueError, match=r"record 0: requested_rewrite"):
        load("akew", [{**bare, "requested_rewrite": []}])
    (request_,) = dataset.requests
    assert request_["probes"]["sub"]["prompt"] == [f"Bob has room {i} in" for i in range(5)]
    assert "1 records skipped, for they have no fact_new_uns" in dataset.notes
    with pytest.raises(ValueError, match="a question for each of 1 answers; got 2"):
        load("unke", [unke("Ann", sub_answer=["A painter"])])


@pytest.mark.parametrize(
    ("kind", "record"), [("unke", unke), ("wikibigedit", wikibigedit), ("counterfact", counterfact)]
)
def test_keys_of_no_layout_are_not_read(kind, record, load):
    foreign = dict.fromkeys(("locality", "portability", "probes", "counterfact"), "some text")
    assert (
        load(kind, [{**record("Ann"), **foreign}]).requests == load(kind, [record("Ann")]).requests
    )


@pytest.mark.parametrize("nothing", [None, "", "  ", [], [[]], [""], float("nan")])
def test_a_part_that_says_nothing_is_left_out_and_told(load, nothing):
    bare = {name: nothing for name in ("rephrase", "loc", "loc_ans", "answers", "subject")}
    if isinstance(nothing, list):
        bare = {"answers": nothing}
    dataset = load("zsre", [{**zsre("Acme"), **bare}, zsre("Bolt")], loc_prompts=False)
    assert dataset.requests[0]["ground_truth"] is None
    if not isinstance(nothing, list):
        assert not {"rephrase_prompt", "subject"} & dataset.requests[0].keys()
        assert "no rephrase_prompt in 1 of 2 records" in dataset.notes
        assert "no locality in 1 of 2 records" in dataset.notes
    spoilt = knowedit("France")
    spoilt["portability"]["Reasoning"][0]["ground_truth"] = nothing
    spoilt["locality"]["Forgetfulness"] = [{"prompt": "x", "ground_truth": [[], nothing]}]
    dataset = load("wikidata-recent", [spoilt])
    assert dataset.requests[0]["portability"]["reasoning"]["ground_truth"] == ["Gualtieri"]
    assert "Forgetfulness" not in dataset.requests[0]["locality"]
    assert "2 probes left out, for they lack prompt or answer" in dataset.notes


def test_convsent_draws_are_of_both_sentiments_and_stay_the_same(load):
    records = [convsent(f"topic {i}") for i in range(60)]
    requests = load("convsent", records).requests
    assert requests == load("convsent", records, seed=0).requests
    assert requests[5:] == load("convsent", records, start=5).requests
    assert requests != load("convsent", records, seed=1).requests
    begin = "From the sentiment dataset, answer "
    assert {(r["target_new"], r["prompt"].split()[-1]) for r in requests} == {
        ("I like it.", "postively."),
        ("I do not like it.", "negatively."),
    }
    questions = {r["prompt"].removeprefix(begin).split(r["subject"])[0] for r in requests}
    assert len(questions) == 13
    assert "What is your stance on " in questions


def test_facts_are_the_packages_own():
    dataset = load_dataset("facts", limit=3)
    originals = edit_requests("eval", 3)
    keys = ("case_id", "prompt", "target_new", "ground_truth", "subject", "loc_prompt")
    for request_, original in zip(dataset.requests, originals, strict=True):
        assert {key: request_[key] for key in keys} == {key: original[key] for key in keys}
        assert set(request_["locality"]) == set(original["locality"])
    assert "countries.tsv" in [file.name for file in dataset.files]
    train = load_dataset("facts", split="train", limit=3)
    assert not {r["case_id"] for r in train.requests} & {r["case_id"] for r in originals}


@pytest.mark.parametrize("kind", RECORDS)
def test_written_requests_are_read_back_equal(kind, load):
    """As `scripts/fuzz_readers.py` says of damaged records too."""
    requests = load(kind, records_of(kind)).requests
    assert load("requests", requests).requests == requests


def test_start_and_limit_select_records(load):
    records = [request(name) for name in ("France", "Spain", "Italy", "Malta")]
    chosen = load("requests", records, start=1, limit=2).requests
    assert [(r["subject"], r["case_id"]) for r in chosen] == [("Spain", 1), ("Italy", 2)]
    assert len(load("requests", records, start=1).requests) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"start": 2}, r"start must be in \[0, 1\] for requests; got 2"),
        ({"start": 1, "limit": 2}, r"limit must be in \[1, 1\] for requests from 1 on.*got 2"),
        ({"limit": 0}, r"limit must be in \[1, 2\].*got 0"),
    ],
)
def test_asking_for_records_that_are_not_there_is_an_error(load, arguments, message):
    with pytest.raises(ValueError, match=message):
        load("requests", records_of("requests"), **arguments)


def test_records_of_which_none_can_be_asked_are_an_error(load):
    with pytest.raises(ValueError, match=r"a record that can be asked; got none: .* empty: \[0\]"):
        load("zsre", [zsre("Acme", alt="")])


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("knowedit-zsre", "ZsRE-test-all.json"),
        ("wikidata-recent", "recent_test.json"),
        ("wikidata-counterfact", "test_cf.json"),
        ("wikibio", "wikibio-test-all.json"),
        ("counterfact", "multi_counterfact.json"),
        ("convsent", "blender_test.json"),
    ],
)
def test_a_directory_stands_for_the_file_of_its_kind(kind, name, tmp_path):
    content = write_records(tmp_path, records_of(kind), name).read_bytes()
    (file,) = load_dataset(kind, tmp_path).files
    digest = hashlib.sha256(content).hexdigest()
    assert file == FileHash(name=name, sha256=digest, bytes=len(content))


def test_missing_file_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"recent_test\.json; there is none at .*nowhere"):
        load_dataset("wikidata-recent", tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"a file; there is none at"):
        load_dataset("requests", tmp_path)


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (b"[{]", ValueError, r"bad\.json must be JSON, and is not: Expecting property name"),
        (b'["\xff\xfe"]', ValueError, r"bad\.json must be JSON, and is not: .*codec can't decode"),
        (b'{"prompt": "x"}', TypeError, r"bad\.json must hold a list of records; got dict"),
        (b"[]", ValueError, r"bad\.json must hold at least one record; got an empty list"),
        (b'["x"]', ValueError, r"bad\.json, record 0 must be a mapping; got 'x'"),
    ],
)
def test_files_of_another_shape_are_errors(tmp_path, content, error, message):
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    with pytest.raises(error, match=message):
        load_dataset("requests", path)


NO_SLOT = r"requested_rewrite\.prompt must have one \{\} for the"


def hop(bad):
    return {"portability": {"hop": bad}}


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        (
            "wikidata-recent",
            {"locality": {"Forgetfulness": [{"prompt": "x"}]}},
            r"locality\.Forgetfulness\.0\.ground_truth must be given; got \{'prompt': 'x'\}",
        ),
        (
            "wikidata-recent",
            {"prompt": "", "subject": 3},
            r"prompt must not be empty; got .* \(and 1 more problem\)$",
        ),
        ("wikidata-recent", {"prompt": "\ud800"}, "prompt must not have half of a surrogate pair"),
        ("counterfact", {"requested_rewrite": {"prompt": "{} and {} are"}}, NO_SLOT),
        ("counterfact", {"requested_rewrite": {"prompt": "no slot"}}, NO_SLOT),
        ("requests", hop("x"), "hop must be a dict with the keys prompt and ground_truth; got"),
        (
            "requests",
            hop({"prompt": ["One is", "Two is"], "ground_truth": ["1"]}),
            "portability.hop: ground_truth must be a list with an entry for each of 2 prompts",
        ),
        (
            "requests",
            hop({"prompt": "One is", "ground_truth": "1", "aliases": []}),
            "portability.hop: aliases must be a list with an entry for each of 1 prompts",
        ),
    ],
)
def test_bad_records_are_errors_that_name_place_rule_and_value(load, kind, change, message):
    first = records_of(kind)[0]
    with pytest.raises(ValueError, match=r"^records\.json, record 1: .*" + message):
        load(kind, [first, {**first, **change}])


def test_subject_outside_the_prompt_is_left_out_and_noted(load):
    records = [knowedit("France"), {**knowedit("Spain"), "subject": "Kingdom of Spain"}]
    dataset = load("wikidata-recent", records)
    assert [r.get("subject") for r in dataset.requests] == ["France", None]
    assert "subject left out, for it is not in the prompt: records [1]" in dataset.notes
    assert "no subject in 1 of 2 records" in dataset.notes


def test_repeated_prompts_are_noted_and_conflicts_told_apart(load):
    names = ("France", "Spain", "Italy", "France", "Spain", "France")
    targets = ("Rome", "Rome", "Rome", "Oslo", "Rome", "Bern")
    dataset = load("wikidata-recent", list(map(knowedit, names, targets)))
    assert [note for note in dataset.notes if "several" in note] == [
        "1 prompts are in several records with different targets: records 0, 3, 5",
        "1 prompts are in several records with the same target: records 1, 4",
    ]
    assert not any("several" in note for note in load("convsent", records_of("convsent")).notes)


def test_parts_that_records_lack_are_counted(load):
    bare = {**knowedit("Spain"), "portability": {"Reasoning": []}}
    del bare["rephrase"]
    dataset = load("wikidata-recent", [knowedit("France"), bare, bare])
    assert "rephrase_prompt" not in dataset.requests[1]
    assert dataset.requests[1]["portability"] == {}
    assert [note for note in dataset.notes if note.startswith("no ")] == [
        "no loc_prompt in 3 of 3 records",
        "no portability in 2 of 3 records",
        "no rephrase_prompt in 2 of 3 records",
    ]
    less = {**knowedit("Italy"), "portability": {"Subject_Aliasing": []}, "locality": {}}
    notes = load("wikidata-recent", [knowedit("France"), knowedit("Spain"), less]).notes
    assert "no locality in 1 of 3 records" in notes
    assert not any(re.search(r"portability\.|locality\.", note) for note in notes)


def test_counterfact_without_a_part_is_read_and_counted(load):
    bare = {key: rome("Ravi", 4)[key] for key in ("case_id", "requested_rewrite")}
    dataset = load("counterfact", [rome("Asha", 3), rome("Toko", 5), bare])
    named = {"subject": "Ravi", "counterfact": {"reference": ["P27", "Q1"]}}
    assert dataset.requests[2] == made("Ravi is a citizen of", "Australia", "India", 4, **named)
    for part in ("rephrase_prompt", "locality", "counterfact.generation"):
        assert f"no {part} in 1 of 3 records" in dataset.notes
    assert "no counterfact in 1 of 3 records" not in dataset.notes


@pytest.mark.parametrize(
    ("kind", "options", "error", "message"),
    [
        ("zsre", {"loc_prompts": "no"}, TypeError, "loc_prompts must be true or false; got 'no'"),
        ("convsent", {"seed": "x"}, TypeError, "seed must be an integer; got 'x'"),
        ("facts", {"split": 3}, TypeError, "split must be a text; got 3"),
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
