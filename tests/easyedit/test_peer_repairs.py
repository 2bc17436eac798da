"""Repairs of EasyEdit's other methods, and one short life of each."""

import importlib
import random
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from baft_easyedit.easyedit.peers import (
    PEERS,
    batchable,
    fix_peer,
    peer_hparams,
    prepare_method,
    why_not,
    write_statistics,
)
from baft_easyedit.easyedit.peers.prompts import edited_request, suited_tokenizer
from baft_easyedit.easyedit.session import Session, prepare_requests
from baft_easyedit.files.resources import bundled_model_path

QUICK = {
    "num_steps": 2,
    "v_num_grad_steps": 2,
    "n_iter": 2,
    "ctx_len": 5,
    "context_template_length_params": [[5, 5]],
    "grace": {"num_iter": 2, "num_block": 2},
}
TEXTS = [f"text number {i} of quite a few" for i in range(30)]


@pytest.fixture
def current(host):
    if host.generation == "pypi":
        pytest.skip("about the current EasyEdit")
    return host


@pytest.fixture
def make_peer(host, model_path, tmp_path):
    """Make a method's editor, repaired and prepared, with few steps."""

    def make(name, **overrides):
        from easyeditor import BaseEditor

        defaults = peer_hparams(name, model_path, "cpu", tmp_path, host.generation, len(TEXTS))[0]
        quick = {key: value for key, value in QUICK.items() if hasattr(defaults, key)}
        hparams, _ = peer_hparams(
            name,
            model_path,
            "cpu",
            tmp_path,
            host.generation,
            len(TEXTS),
            {**quick, **overrides},
        )
        fix_peer(name, hparams)
        editor = BaseEditor.from_hparams(hparams)
        write_statistics(editor, TEXTS)
        prepare_method(name, editor, seed=0)
        return editor

    return make


@pytest.fixture
def complete(requests):
    return prepare_requests(requests)


def editor_of(algorithm, tok=None):
    return SimpleNamespace(alg_name=algorithm, tok=tok, hparams=SimpleNamespace())


# A life of each method.


@pytest.mark.easyedit
@pytest.mark.parametrize("name", PEERS)
def test_a_method_edits_in_a_row_and_is_restored(host, make_peer, complete, name):
    if why_not(name, host.generation):
        pytest.skip("not in this EasyEdit")
    editor = make_peer(name)
    session = Session(editor, "The sky is")
    for request in complete[:2]:
        session.edit([request])
    alone = [score for request in complete for score in session.score([request])]
    assert session.score(complete) == alone
    assert 0 <= alone[0]["rewrite_acc"][0] <= 1
    assert session.restore() is True
    if name in ("AlphaEdit", "SPHERE"):  # which add up what they were told before
        module = sys.modules[editor.apply_algo.__module__]
        assert module.cache_c_new is False
    session.edit(complete[2:])  # a new sequence starts from the unedited model
    assert session.restore() is True


@pytest.mark.easyedit
@pytest.mark.parametrize("name", ["FT-M", "DPO", "UltraEdit", "EAMET", "PMET"])
def test_one_call_edits_several_requests(current, make_peer, complete, name):
    assert batchable(name, "current")
    editor = make_peer(name)
    for count in (2, 3):
        session = Session(editor, "The sky is")
        session.edit(complete[:count])
        assert editor.hparams.batch_size == count
        assert session.restore() is True


# Caches.


@pytest.mark.easyedit
@pytest.mark.parametrize("name", ["ROME", "MEMIT", "WISE", "CORE", "EAMET"])
def test_prefixes_do_not_depend_on_what_came_before(host, make_peer, name):
    if why_not(name, host.generation):
        pytest.skip("not in this EasyEdit")
    editor = make_peer(name)
    path = {"WISE": "wise.utils"}.get(name, f"{name.lower()}.{name.lower()}_main")
    module = importlib.import_module(f"easyeditor.models.{path}")
    cached = module.CONTEXT_TEMPLATES_CACHE
    assert len(np.ravel([text for texts in cached for text in texts])) > 5
    torch.manual_seed(7)
    state = torch.get_rng_state(), random.getstate()
    prepare_method(name, editor, seed=0)
    assert cached == module.CONTEXT_TEMPLATES_CACHE
    assert cached is not module.CONTEXT_TEMPLATES_CACHE
    assert torch.equal(torch.get_rng_state(), state[0])
    assert random.getstate() == state[1]


# Repairs.


@pytest.mark.easyedit
@pytest.mark.parametrize("name", ["MELO", "DPO"])
def test_a_later_edit_extends_the_same_model(current, make_peer, complete, name):
    editor = make_peer(name)
    unedited = editor.model
    session = Session(editor, "a")
    session.edit(complete[:1])
    edited = session.model
    before = {key: value.clone() for key, value in edited.named_parameters() if "lora_B" in key}
    assert any(value.any() for value in before.values())
    if name == "DPO":  # an edit that learns nothing keeps what was learned
        editor.hparams.lr = 0.0
    session.edit(complete[1:2])
    assert session.model is editor.model is edited
    if name == "DPO":
        now = dict(edited.named_parameters())
        assert all(torch.equal(now[key], value) for key, value in before.items())
    session.restore()
    assert type(editor.model) is type(unedited)


@pytest.mark.easyedit
def test_melo_without_a_free_block_is_refused(current, make_peer, complete):
    session = Session(make_peer("MELO"), "a")  # with two blocks
    for request in complete[:2]:
        session.edit([request])
    with pytest.raises(ValueError, match=r"grace\.num_block must be at least the number of edits"):
        session.edit(complete[2:])


@pytest.mark.easyedit
def test_defer_answers_each_prompt_of_a_batch_by_itself(current, make_peer, complete):
    editor = make_peer("DEFER", threshold=0.0)  # every prompt is deferred
    session = Session(editor, "a")
    session.edit(complete[:1])
    prompts = ["The sky is", "The sea is"]
    with torch.no_grad():
        together = session.model(**editor.tok(prompts, return_tensors="pt")).logits
        alone = [session.model(**editor.tok(p, return_tensors="pt")).logits for p in prompts]
    torch.testing.assert_close(together, torch.cat(alone))
    assert not torch.allclose(together[0, -1], together[1, -1])


@pytest.mark.easyedit
def test_eamet_leaves_the_tokenizer_alone(current, make_peer, complete):
    editor = make_peer("EAMET")
    before = editor.tok("a b").input_ids
    Session(editor, "a").edit(complete[:1])
    assert editor.tok("a b").input_ids == before
    assert before[0] == editor.tok.bos_token_id


# Calls, requests and tokenizers, without EasyEdit.


def test_old_answers_are_handed_on(requests):
    edited = edited_request({**requests[0], "ground_truth": ["Paris", "Lyon"]}, editor_of("DPO"))
    assert (edited["ground_truth"], edited["target_neg"]) == ("Paris", "Paris")
    edited = edited_request({**requests[0], "target_neg": "Kyiv"}, editor_of("DPO"))
    assert edited["target_neg"] == "Kyiv"
    assert edited_request(requests[0], editor_of("CORE"))["ground_truth"] == "Paris"
    with pytest.raises(ValueError, match=r"CORE needs the old answer: .* 'The capital of.*None"):
        edited_request({**requests[0], "ground_truth": None}, editor_of("CORE"))


class Merging:
    """A tokenizer whose tokens hold the space before a word."""

    def encode(self, text, **_):
        return text.replace(" ", " _").split()


def test_answers_get_the_space_of_their_tokens(requests):
    edited = edited_request(requests[0], editor_of("KN", Merging()))
    assert (edited["target_new"], edited["ground_truth"]) == (" Oslo", " Paris")
    assert edited_request(requests[0], editor_of("PMET", Merging()))["target_new"] == " Oslo"
    assert edited_request(requests[0], editor_of("FT", Merging()))["target_new"] == "Oslo"


@pytest.fixture(scope="module")
def sentencepiece():
    """The bundled tokenizer: it drops a text's first space when it decodes, as Llama 2's does."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(bundled_model_path())


def test_answers_keep_their_space_when_decoded(sentencepiece):
    ids = sentencepiece.encode(" New York", add_special_tokens=False, return_tensors="pt")[0]
    suited = suited_tokenizer("MEMIT", sentencepiece, [], SimpleNamespace())
    assert sentencepiece.decode(ids) == "New York"
    assert suited.decode(ids) == " New York"
    assert suited.decode(ids.tolist()) == " New York"
    assert suited.decode([]) == ""
    assert suited_tokenizer("FT-M", sentencepiece, [], SimpleNamespace()) is sentencepiece


def test_kns_answers_begin_with_themselves(sentencepiece):
    suited = suited_tokenizer("KN", sentencepiece, [], SimpleNamespace())
    assert suited.encode("Rome") == sentencepiece.encode("Rome", add_special_tokens=False)
    assert suited("Rome").input_ids == sentencepiece("Rome").input_ids
