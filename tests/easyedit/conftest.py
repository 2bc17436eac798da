"""EasyEdit, a tiny Llama on disk that it can load, and requests for it."""

import sys

import pytest
import torch

from baft_easyedit import BaFTHyperParams, ReFTHyperParams, register
from baft_easyedit.easyedit import session
from baft_easyedit.easyedit.arguments import prepare_requests
from baft_easyedit.easyedit.host import HOME_VARIABLE
from baft_easyedit.easyedit.model_path import host_model_path
from baft_easyedit.easyedit.peers import why_not
from tests.conftest import save_tiny_llama

CAPITALS = {"Freedonia": "Oslo", "Osterlich": "Rome", "Fenwick": "Bern"}


def make_request(country, city):
    return {
        "prompt": f"The capital of {country} is",
        "target_new": city,
        "ground_truth": "Paris",
        "subject": country,
        "rephrase_prompt": f"{country} has the capital",
        "locality": {"nq": {"prompt": "The sky is", "ground_truth": "blue"}},
        "portability": {"hop": {"prompt": f"People of {country} vote in", "ground_truth": city}},
    }


def edit_arguments(requests):
    """Turn request dicts into the lists that `BaseEditor.edit` takes."""
    return {
        "prompts": [r["prompt"] for r in requests],
        "target_new": [r["target_new"] for r in requests],
        "rephrase_prompts": [r["rephrase_prompt"] for r in requests],
        "subject": [r["subject"] for r in requests],
        "verbose": False,
    }


@pytest.fixture
def requests():
    return [make_request(country, city) for country, city in CAPITALS.items()]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # EasyEdit writes ./logs


@pytest.fixture(scope="session")
def host():
    return register()


@pytest.fixture(scope="session")
def current(host):
    """The current EasyEdit; tests that need it are skipped under the release."""
    if host.generation == "pypi":
        pytest.skip("the release has nothing of this")
    return host


@pytest.fixture(scope="session")
def model_path(tmp_path_factory):
    return host_model_path(str(save_tiny_llama(tmp_path_factory.mktemp("models"))))


@pytest.fixture
def make_hparams(model_path):
    def make(method="BaFT", **overrides):
        hparams_class = {"BaFT": BaFTHyperParams, "ReFT": ReFTHyperParams}[method]
        settings = {"layers": [1, 2], "rank": 4, "lr": 5e-2, "num_steps": 80, "device": "cpu"}
        return hparams_class(model_name=model_path, **{**settings, **overrides})

    return make


@pytest.fixture
def make_editor(host, make_hparams):
    def make(method="BaFT", **overrides):
        from easyeditor import BaseEditor

        return BaseEditor.from_hparams(make_hparams(method, **overrides))

    return make


@pytest.fixture
def make_peer(host, model_path):
    """Make a method's editor, repaired and prepared."""
    texts = [f"text number {i} of quite a few" for i in range(30)]

    def make(name, path=model_path, **overrides):
        if why_not(name, host.generation):
            pytest.skip("not in this EasyEdit")
        return session.make_peer(name, path, "cpu", texts, overrides)[0]

    return make


@pytest.fixture
def complete(requests):
    return prepare_requests(requests)


@pytest.fixture
def without_easyeditor(monkeypatch):
    """Forget the imported EasyEdit for one test."""
    monkeypatch.delenv(HOME_VARIABLE, raising=False)
    names = [name for name in sys.modules if name.split(".")[0] == "easyeditor"]
    kept = {name: sys.modules.pop(name) for name in names}
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "easyeditor"]:
        del sys.modules[name]
    sys.modules.update(kept)


def logits(editor, prompt):
    with torch.no_grad():
        return editor.model(**editor.tok(prompt, return_tensors="pt")).logits
