"""Repairs of EasyEdit's other methods, and one short life of each."""

import importlib
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from baft_easyedit.easyedit.peer_calls import calls_put_right, tokenizer_for
from baft_easyedit.easyedit.peer_fixes import (
    after_edit,
    edited_request,
    fix_peer,
    prepare_method,
    reset_method_state,
)
from baft_easyedit.easyedit.peers import (
    PEERS,
    batchable,
    peer_hparams,
    why_not,
    write_statistics,
)
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
    session.edit(complete[2:])  # a new sequence starts from the unedited model
    assert session.restore() is True


@pytest.mark.easyedit
@pytest.mark.parametrize("name", ["FT-M", "DPO", "UltraEdit", "EAMET", "SPHERE", "PMET"])
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


@pytest.mark.easyedit
def test_what_a_method_keeps_is_forgotten(current, make_peer, complete):
    for name in ("AlphaEdit", "SPHERE", "SimIE", "WISE"):
        editor = make_peer(name)
        session = Session(editor, "a")
        session.edit(complete[:1])
        kept = _kept(name, editor)
        assert kept()
        session.restore()
        assert not kept()


def _kept(name, editor):
    """Return what tells whether a method keeps something of an edit."""
    if name == "SimIE":
        return lambda: editor.hparams._simie_instance
    if name == "WISE":
        wise = importlib.import_module("easyeditor.models.wise.WISE")
        return lambda: wise.edit_history
    folder = {"AlphaEdit": "alphaedit"}.get(name, name)
    module = importlib.import_module(f"easyeditor.models.{folder}.{name}_main")
    return lambda: module.cache_c_new


# Repairs.


@pytest.mark.easyedit
def test_repairs_are_told_and_done_once(current):
    hparams = SimpleNamespace()
    assert "sequential_edit" in fix_peer("WISE", hparams)[0]
    assert hparams.sequential_edit is True
    grace = importlib.import_module("easyeditor.models.grace.GRACE").GRACE
    assert any("generation" in note for note in fix_peer("GRACE", hparams))
    repaired = grace.edit
    fix_peer("GRACE", hparams)
    assert grace.edit is repaired
    dpo = importlib.import_module("easyeditor.models.dpo.dpo_main")
    fix_peer("DPO", hparams)
    repaired = dpo.get_peft_model
    fix_peer("DPO", hparams)
    assert dpo.get_peft_model is repaired
    assert fix_peer("FT-M", hparams) == ()
    assert [note[:6] for note in fix_peer("PMET", hparams)] == ["PMET: "] * 2


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


@pytest.mark.easyedit
def test_positions_are_counted_from_the_left(current, make_peer):
    assert {make_peer(name).tok.padding_side for name in ("PMET", "MEMIT-FE", "SimIE")} == {"right"}
    assert make_peer("FT-M").tok.padding_side == "left"


# Calls, requests and tokenizers, without EasyEdit.


def test_kns_edits_are_undone_together():
    undone = []
    calls = iter("abc")

    def edit_neurons(model, tok, requests, hparams):
        name = next(calls)
        return model, lambda: undone.append(name)

    apply = calls_put_right("KN", edit_neurons)
    tok = Merging()
    first, _ = (apply("model", tok, [1], SimpleNamespace())[1] for _ in range(2))
    first()
    assert undone == ["b", "a"]
    apply("model", tok, [1], SimpleNamespace())[1]()
    assert undone == ["b", "a", "c"]


def test_other_methods_keep_their_model_and_their_state():
    editor = SimpleNamespace(alg_name="ROME", model="unedited")
    after_edit(editor, "edited")
    reset_method_state(editor)
    assert editor.model == "unedited"
    editor = SimpleNamespace(alg_name="MELO", model="unedited")
    reset_method_state(editor)  # not prepared: nothing to put back
    assert editor.model == "unedited"


def test_old_answers_are_handed_on(requests):
    edited = edited_request({**requests[0], "ground_truth": ["Paris", "Lyon"]}, editor_of("DPO"))
    assert (edited["ground_truth"], edited["target_neg"]) == ("Paris", "Paris")
    edited = edited_request({**requests[0], "target_neg": "Kyiv"}, editor_of("DPO"))
    assert edited["target_neg"] == "Kyiv"
    assert edited_request(requests[0], editor_of("CORE"))["ground_truth"] == "Paris"


def test_missing_old_answers_are_told(requests):
    with pytest.raises(
        ValueError, match=r"CORE needs the old answer: .* 'The capital of Fre.*None"
    ):
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
    suited = tokenizer_for("MEMIT", sentencepiece, SimpleNamespace())
    assert sentencepiece.decode(ids) == "New York"
    assert suited.decode(ids) == " New York"
    assert suited.decode(ids.tolist()) == " New York"
    assert suited.decode([]) == ""
    assert tokenizer_for("FT-M", sentencepiece, SimpleNamespace()) is sentencepiece


def test_kns_answers_begin_with_themselves(sentencepiece):
    suited = tokenizer_for("KN", sentencepiece, SimpleNamespace())
    assert suited.encode("Rome") == sentencepiece.encode("Rome", add_special_tokens=False)
    assert suited("Rome").input_ids == sentencepiece("Rome").input_ids


def test_eamet_cannot_take_the_first_token_away(sentencepiece):
    before = sentencepiece(["Rome"]).input_ids
    suited = tokenizer_for("EAMET", sentencepiece, SimpleNamespace(model_name="/models/llama-3"))
    suited.add_bos_token = False
    assert suited(["Rome"]).input_ids == sentencepiece(["Rome"]).input_ids == before
    assert suited("Rome").input_ids == before[0][1:]
    # It strips the token by itself for these.
    strips = tokenizer_for("EAMET", sentencepiece, SimpleNamespace(model_name="/models/Llama-3.1"))
    assert strips("Rome").input_ids == before[0]
