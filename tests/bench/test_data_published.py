"""The published benchmark files: all are read, and as EasyEdit reads them."""

from pathlib import Path

import pytest

from baft_easyedit import register
from baft_easyedit.bench.data import load_dataset
from baft_easyedit.easyedit.host import find_host
from baft_easyedit.training.requests import as_requests

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
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="the files are not beside the checkout")


def load(kind):
    return load_dataset(kind, DATA / FILES[kind][0])


@pytest.mark.parametrize("kind", FILES)
def test_published_file_is_read_in_full(kind):
    _, count, repeated, without_portability = FILES[kind]
    dataset = load(kind)
    assert len(dataset.requests) == count
    assert len(as_requests(dataset.requests)) == count
    assert sum(int(n.split()[0]) for n in dataset.notes if "in several records" in n) == repeated
    assert sum(not r["portability"] for r in dataset.requests) == without_portability
    assert all("subject" in r for r in dataset.requests)


def _texts(answer):
    """All texts of nested lists."""
    return [answer.strip()] if isinstance(answer, str) else [t for a in answer for t in _texts(a)]


@pytest.fixture(scope="session")
def host():
    register()
    return find_host()


@pytest.mark.easyedit
@pytest.mark.parametrize(
    "kind", ["wikidata-recent", "wikidata-counterfact", "knowedit-zsre", "wikibio"]
)
def test_knowedit_is_read_as_easyedit_reads_it(kind, host):
    if host.generation != "current":
        pytest.skip("the release has no KnowEditDataset")
    from easyeditor import KnowEditDataset

    ours = load(kind)
    theirs = KnowEditDataset(str(DATA / FILES[kind][0] / ours.files[0].name))
    keys = {
        "portability_r": ("portability", "reasoning"),
        "portability_s": ("portability", "Subject_Aliasing"),
        "portability_l": ("portability", "Logical_Generalization"),
        "locality_rs": ("locality", "Relation_Specificity"),
        "locality_f": ("locality", "Forgetfulness"),
    }
    for request, record in zip(ours.requests, theirs, strict=True):
        for key in ("prompt", "target_new", "subject"):
            assert request[key] == record[key].strip()
        for key, (section, kind_of_probe) in keys.items():
            probe = request[section].get(kind_of_probe, {"prompt": [], "ground_truth": []})
            expected = record[key] or []
            assert probe["prompt"] == [p["prompt"].strip() for p in expected]
            assert probe["ground_truth"] == [_texts(p["ground_truth"])[0] for p in expected]


@pytest.mark.easyedit
@pytest.mark.parametrize("name", ["zsre_mend_edit.json", "zsre_mend_train.json"])
def test_zsre_is_read_as_easyedit_reads_it(name, host):
    from easyeditor import ZsreDataset

    ours = load_dataset("zsre", DATA / "zsre" / name)
    theirs = ZsreDataset(str(DATA / "zsre" / name))
    for request, record in zip(ours.requests, theirs, strict=True):
        for key in ("case_id", "prompt", "target_new", "ground_truth", "rephrase_prompt"):
            assert request[key] == (record[key].strip() if key != "case_id" else record[key])
        probe = request["locality"]["neighborhood"]
        assert probe["prompt"] == [record["locality_prompt"]]
        assert probe["ground_truth"] == [record["locality_ground_truth"].strip()]
