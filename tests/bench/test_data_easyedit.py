"""What EasyEdit's own classes read from the same files, small ones and published ones."""

import importlib
from pathlib import Path

import pytest
from dataset_files import (
    HALLUEDIT,
    RECORDS,
    akew,
    halluedit,
    records_of,
    rome,
    unke,
    wikibigedit,
    write_records,
    zsre,
)

from baft_easyedit import register
from baft_easyedit.bench.data import load_dataset
from baft_easyedit.training.requests import as_requests

easyedit = pytest.mark.easyedit
# Path, requests, prompts in several records, records without portability.
FILES = {
    "zsre": ("zsre", 500, 0, 0),
    "knowedit-zsre": ("knowedit/ZsRE", 1301, 18, 0),
    "wikidata-recent": ("knowedit/wiki_recent", 1266, 2, 0),
    "wikidata-counterfact": ("knowedit/wiki_counterfact", 839, 17, 77),
    "wikibio": ("knowedit/WikiBio", 306, 0, 306),
    "convsent": ("knowedit/convsent", 800, 0, 800),
    "mquake": ("mquake/MQuAKE-hard.json", 4 * 429, 211, 3 * 429),
    "requests": ("zsre/zsre_requests_500.json", 500, 0, 500),
}
DATA = Path(__file__).parents[2].parent / "shared" / "data"
published = pytest.mark.skipif(not DATA.is_dir(), reason="the files are not beside the checkout")
KINDS = {
    "portability_r": ("portability", "reasoning"),
    "portability_s": ("portability", "Subject_Aliasing"),
    "portability_l": ("portability", "Logical_Generalization"),
    "locality_rs": ("locality", "Relation_Specificity"),
    "locality_f": ("locality", "Forgetfulness"),
}
"""KnowEdit's probes, by EasyEdit's names for them."""


@pytest.fixture(scope="module")
def theirs():
    """EasyEdit's module of data sets with a class in it."""
    if register().generation != "current":
        pytest.skip("the release has none of these")
    return lambda module: importlib.import_module(f"easyeditor.dataset.{module}")


def pairs(request, section, kind):
    """Prompts with their first answers."""
    asked = request.get(section, {}).get(kind, {"prompt": [], "ground_truth": []})
    return list(zip(asked["prompt"], asked["ground_truth"], strict=True))


def given(prompt, answer):
    """EasyEdit's single probe, None where there is none."""
    return [(prompt, answer)] if prompt and answer else []


@easyedit
def test_wikibigedit(theirs, tmp_path):
    path = write_records(tmp_path, [*RECORDS["wikibigedit"], wikibigedit("Cell", personas=None)])
    ours = load_dataset("wikibigedit", path).requests
    records = list(theirs("wikibigedit").WikiBigEditDataset(str(path)))
    assert len(ours) == len(records) == 3
    for request, record in zip(ours, records, strict=True):
        for key in ("subject", "prompt", "target_new", "ground_truth"):
            assert request[key] == record[key]
        assert request["rephrase_prompt"] == record["rephrase"]
        persona = given(record["portability_personas"], record["target_new"])
        assert pairs(request, "portability", "personas") == persona
        hop = given(record["portability_hop"], record["portability_hop_ans"])
        assert pairs(request, "portability", "mhop") == hop
        assert pairs(request, "locality", "locality") == given(
            record["locality"], record["locality_ans"]
        )


@easyedit
def test_halluedit(theirs, tmp_path):
    relations = ("industry", "headquarters location", "founded by", "founder", "CEO", "capital")
    path = tmp_path / "all.csv"
    rows = [halluedit(f"Acme{i}", relation) for i, relation in enumerate(relations)]
    path.write_text("\n".join([HALLUEDIT, *rows]))
    ours = load_dataset("halluedit", path).requests
    for request, record in zip(ours, theirs("HalluEditBench").HalluEditBench(path), strict=True):
        for key in ("subject", "prompt", "target_new", "ground_truth"):
            assert request[key] == record[key]
        asked = record["generalization"]
        assert request["rephrase_prompt"] == asked["rephrase"]["prompt"]
        for kind in ("yes", "no", "reversed"):
            assert pairs(request, "probes", kind) == [tuple(asked[kind].values())]
        # EasyEdit's class leaves the question out, its script does not.
        assert pairs(request, "probes", "mcq") == [
            (f"What is it? {asked['mcq']['prompt']}", asked["mcq"]["ground_truth"])
        ]
        assert pairs(request, "probes", "locality") == [tuple(record["locality"].values())]
        for kind, hop in record["portability"].items():
            assert pairs(request, "portability", kind) == given(hop["prompt"], hop["ground_truth"])


@easyedit
@pytest.mark.parametrize(
    ("kind", "record"), [("zsre", zsre("Ann", "2006")), ("counterfact", rome("Ann", 3))]
)
def test_leme(theirs, tmp_path, kind, record):
    entity = {"coupled_prompt": "Write an essay.", "entity": "Ann"}
    coupled = {"coupled_prompts_and_properties": {"subject_entity": entity, "coupled_entities": []}}
    path = write_records(tmp_path, [{**record, **coupled}])
    options = {"loc_prompts": False} if kind == "zsre" else {}
    (request,) = load_dataset(kind, path, **options).requests
    read = theirs("LEME").LongFormEditDataset(str(path), kind)[0]
    for key in ("subject", "target_new", "ground_truth"):
        assert request[key] == read[key]
    added = {"zsre": "", "counterfact": "?"}[kind]  # EasyEdit makes questions of statements
    assert request["prompt"] + added == read["prompt"]


@easyedit
def test_mquake_joined(theirs, tmp_path):
    path = write_records(tmp_path, records_of("mquake"))
    ours = load_dataset("mquake", path, joined=True).requests
    for request, record in zip(ours, theirs("MQuAKE").MQuAKEDataset(str(path)), strict=True):
        for key in ("prompt", "target_new", "rephrase_prompt"):
            assert request[key] == record[key]
        asked = zip(record["portability_prompt"], record["portability_ground_truth"], strict=True)
        assert pairs(request, "portability", "multi_hop") == list(asked)


@easyedit
def test_unke(theirs, tmp_path):
    (tmp_path / "UnKE").mkdir()
    path = write_records(tmp_path / "UnKE", [unke("Ann"), unke("Bob")], "final_data_v3.json")
    loader = theirs("AKEW_both").AKEWUnifiedDataset
    records = loader(str(tmp_path), "unke", model_name="any", use_unstructured_data=True)
    for request, record in zip(load_dataset("unke", path).requests, records, strict=True):
        _is_same_text(request, record)


def _is_same_text(request, record):
    assert request["prompt"] == record["question"]
    assert request["target_new"] == record["answer"]
    assert request["rephrase_prompt"] == record["para_question"]
    asked = zip(record["sub_question"], record["sub_answer"], strict=True)
    assert pairs(request, "probes", "sub") == list(asked)


@easyedit
@pytest.mark.parametrize("kind", ["wikiupdate", "counterfact", "mquake"])
def test_akew(theirs, tmp_path, kind):
    names = {"wikiupdate": "WikiUpdate", "counterfact": "CounterFact", "mquake": "MQuAKE-CF"}
    (tmp_path / "AKEW").mkdir()
    path = write_records(tmp_path / "AKEW", [akew("Ann", kind)], f"{names[kind]}.json")
    loader = theirs("AKEW_both").AKEWUnifiedDataset
    (record,) = loader(str(tmp_path), kind, model_name="any", use_unstructured_data=True)
    _is_same_text(load_dataset("akew", path).requests[0], record)
    (record,) = loader(str(path), kind, model_name="any")
    (request,) = load_dataset("akew", path, texts=False).requests
    for key in ("subject", "prompt", "target_new", "ground_truth"):
        assert request[key] == record[key]
    rephrased = record["rephrase"]  # a list of all paraphrases in two of the files
    first = rephrased[0] if isinstance(rephrased, list) else rephrased
    assert request["rephrase_prompt"] == first
    near, answers = record["locality"], record["locality_ans"]
    several = isinstance(near, list)
    assert pairs(request, "locality", "locality") == (
        list(zip(near, answers, strict=True)) if several else [(near, answers)]
    )
    hops = record["portability_prompt"] or [], record["portability_ground_truth"] or []
    assert pairs(request, "portability", "por_hop") == list(zip(*hops, strict=True))


@published
@pytest.mark.parametrize("kind", FILES)
def test_published_file_is_read_in_full(kind):
    path, count, repeated, without_portability = FILES[kind]
    dataset = load_dataset(kind, DATA / path)
    assert len(dataset.requests) == len(as_requests(dataset.requests)) == count
    assert sum(int(n.split()[0]) for n in dataset.notes if "in several records" in n) == repeated
    assert sum(not r["portability"] for r in dataset.requests) == without_portability
    assert all("subject" in r for r in dataset.requests)


def _texts(answer):
    """All texts of nested lists."""
    return [answer.strip()] if isinstance(answer, str) else [t for a in answer for t in _texts(a)]


@easyedit
@published
@pytest.mark.parametrize(
    "kind", ["wikidata-recent", "wikidata-counterfact", "knowedit-zsre", "wikibio"]
)
def test_knowedit(kind, theirs):
    folder = DATA / FILES[kind][0]
    ours = load_dataset(kind, folder)
    records = theirs("knowedit").KnowEditDataset(str(folder / ours.files[0].name))
    for request, record in zip(ours.requests, records, strict=True):
        for key in ("prompt", "target_new", "subject"):
            assert request[key] == record[key].strip()
        for key, place in KINDS.items():
            assert pairs(request, *place) == [
                (p["prompt"].strip(), _texts(p["ground_truth"])[0]) for p in record[key] or []
            ]


@easyedit
@published
@pytest.mark.parametrize("name", ["zsre_mend_edit.json", "zsre_mend_train.json"])
def test_zsre(name):
    register()
    records = importlib.import_module("easyeditor").ZsreDataset(str(DATA / "zsre" / name))
    ours = load_dataset("zsre", DATA / "zsre" / name).requests
    for request, record in zip(ours, records, strict=True):
        for key in ("prompt", "target_new", "ground_truth", "rephrase_prompt"):
            assert request[key] == record[key].strip()
        assert request["case_id"] == record["case_id"]
        probe = record["locality_prompt"], record["locality_ground_truth"].strip()
        assert pairs(request, "locality", "neighborhood") == [probe]
