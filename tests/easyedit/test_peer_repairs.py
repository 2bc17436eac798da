"""Repairs of EasyEdit's other methods, and one short life of each."""

import importlib
import random
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from baft_easyedit.easyedit.peers import PEERS, batchable
from baft_easyedit.easyedit.peers.prompts import suited_tokenizer
from baft_easyedit.easyedit.peers.repairs import prepare_method
from baft_easyedit.easyedit.session import Session
from baft_easyedit.files.resources import bundled_model_path

PREFIXES = {"context_template_length_params": [[5, 5]]}
QUICK = {
    "ROME": {"v_num_grad_steps": 2, "mom2_adjustment": True, **PREFIXES},
    "MEMIT": {"v_num_grad_steps": 2},
    "AlphaEdit": {"v_num_grad_steps": 2},
    "UltraEdit": {},
    "WISE": {"n_iter": 2},
    "GRACE": {"n_iter": 2},
    "MELO": {"grace": {"num_iter": 2, "num_block": 2}},
}
"""Few steps; the rest take `num_steps`."""


@pytest.fixture
def make_quick(make_peer):
    """Make a method's editor that takes few steps."""
    return lambda name: make_peer(name, **QUICK.get(name, {"num_steps": 2}))


# A life of each method.


@pytest.mark.easyedit
@pytest.mark.parametrize("name", PEERS)
def test_a_method_edits_in_a_row_and_is_restored(make_quick, complete, name):
    editor = make_quick(name)
    session = Session(editor, "The sky is")
    for request in complete[:2]:
        session.edit([request])
    alone = [score for request in complete for score in session.score([request])]
    assert session.score(complete) == alone
    assert 0 <= alone[0]["rewrite_acc"][0] <= 1
    asked = [(r["prompt"], r["target_new"], False) for r in complete]
    one_by_one = [session.likelihoods([question])[0].nll for question in asked]
    assert [found.nll for found in session.likelihoods(asked)] == pytest.approx(one_by_one, 1e-4)
    prompts, answers, _ = zip(*asked, strict=True)
    assert len(session.token_accuracies(prompts[:1], answers[:1])) == 1
    assert session.restore() is True
    if name == "AlphaEdit":  # which adds up what it was told before
        module = sys.modules[editor.apply_algo.__module__]
        assert module.cache_c_new is False
    session.edit(complete[2:])  # a new sequence starts from the unedited model
    assert session.restore() is True


@pytest.mark.easyedit
@pytest.mark.parametrize("name", ["FT-M", "LoRA", "UltraEdit", "AlphaEdit"])
def test_one_call_edits_several_requests(current, make_quick, complete, name):
    assert batchable(name, "current")
    editor = make_quick(name)
    for count in (2, 3):
        session = Session(editor, "The sky is")
        session.edit(complete[:count])
        assert editor.hparams.batch_size == count
        assert session.restore() is True


# Caches.


@pytest.mark.easyedit
@pytest.mark.parametrize("name", ["ROME", "MEMIT", "WISE"])
def test_prefixes_do_not_depend_on_what_came_before(make_quick, name):
    editor = make_quick(name)
    path = {"WISE": "wise.utils"}.get(name, f"{name.lower()}.{name.lower()}_main")
    module = importlib.import_module(f"easyeditor.models.{path}")
    cached = module.CONTEXT_TEMPLATES_CACHE
    assert len(np.ravel([text for texts in cached for text in texts])) > 5
    torch.manual_seed(7)
    state = torch.get_rng_state(), random.getstate()
    prepare_method(name, editor, ["a text"], seed=0)
    assert cached == module.CONTEXT_TEMPLATES_CACHE
    assert cached is not module.CONTEXT_TEMPLATES_CACHE
    assert torch.equal(torch.get_rng_state(), state[0])
    assert random.getstate() == state[1]


# Repairs.


@pytest.mark.easyedit
def test_a_later_edit_of_melo_extends_the_same_model(current, make_quick, complete):
    editor = make_quick("MELO")
    unedited = editor.model
    session = Session(editor, "a")
    session.edit(complete[:1])
    edited = session.model
    before = {key: value.clone() for key, value in edited.named_parameters() if "lora_B" in key}
    assert any(value.any() for value in before.values())
    session.edit(complete[1:2])
    assert session.model is editor.model is edited
    session.restore()
    assert type(editor.model) is type(unedited)


@pytest.mark.easyedit
def test_melo_without_a_free_block_is_refused(current, make_quick, complete):
    session = Session(make_quick("MELO"), "a")  # with two blocks
    for request in complete[:2]:
        session.edit([request])
    with pytest.raises(ValueError, match=r"grace\.num_block must be at least the number of edits"):
        session.edit(complete[2:])


# Calls, requests and tokenizers, without EasyEdit.


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
