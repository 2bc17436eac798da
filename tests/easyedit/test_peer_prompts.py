"""Chat templates and ends of answers for EasyEdit's other methods."""

from types import SimpleNamespace

import pytest
from transformers import AutoTokenizer

from baft_easyedit.easyedit.model_path import host_model_path
from baft_easyedit.easyedit.peers.prompts import (
    edited_request,
    scored_request,
    suited_tokenizer,
    tell_end_from_padding,
)
from baft_easyedit.easyedit.peers.repairs import fix_peer
from baft_easyedit.easyedit.session import Session
from tests.conftest import make_tokenizer, save_tiny_llama

CHAT = "<s>{% for m in messages %}[{{ m['content'] }}{{ mood }}]</s>{% endfor %}"
BOTH = {"use_chat_template": True, "learn_end": True}


@pytest.fixture(scope="module")
def chat_path(tmp_path_factory):
    """A tiny Llama whose tokenizer has a chat template and a token to pad with."""
    directory = save_tiny_llama(tmp_path_factory.mktemp("chat"))
    tok = AutoTokenizer.from_pretrained(directory)
    tok.unk_token = "~"  # one that it has
    tok.chat_template = CHAT
    tok.save_pretrained(directory)
    return host_model_path(str(directory))


@pytest.fixture
def tok(chat_path):
    tok = AutoTokenizer.from_pretrained(chat_path)
    tok.pad_token = tok.eos_token
    return tok


def editor_of(algorithm, tok, **settings):
    hparams = SimpleNamespace(alg_name=algorithm, **settings)
    return SimpleNamespace(alg_name=algorithm, tok=tok, hparams=hparams)


def test_the_template_becomes_part_of_the_prompt_and_the_end_of_the_answer(requests, tok):
    mood = {"chat_template_kwargs": {"mood": "!"}}
    edited = edited_request(requests[0], editor_of("FT", tok, **BOTH, **mood))
    assert edited["prompt"] == "[The capital of Freedonia is!]</s>"
    assert edited["target_new"] == "Oslo</s>"
    ids = tok(f"{edited['prompt']} {edited['target_new']}")["input_ids"]
    assert ids.count(tok.bos_token_id) == 1  # which the tokenizer puts there
    assert ids[-1] == tok.eos_token_id
    assert requests[0]["prompt"] == "The capital of Freedonia is"


def test_what_cannot_learn_an_end_says_so(requests, tok):
    ft_l = {"objective_optimization": "prompt_last", **BOTH}
    edited = edited_request(requests[0], editor_of("FT", tok, **ft_l))
    assert (edited["prompt"][0], edited["target_new"]) == ("[", "Oslo")
    notes = fix_peer("FT-L", editor_of("FT", tok, **ft_l).hparams)
    assert notes == ("FT-L: does not learn where an answer ends",)
    assert fix_peer("FT-M", editor_of("FT", tok, **BOTH).hparams) == ()


def test_padding_is_told_from_the_end(tok):
    editor = editor_of("FT", tok)
    tell_end_from_padding(editor)
    assert tok.pad_token_id == tok.eos_token_id  # nobody asked
    editor.hparams.learn_end = True
    tell_end_from_padding(editor)
    assert tok.pad_token == "~"


def test_padding_needs_a_token_of_its_own():
    editor = editor_of("FT", make_tokenizer(unk_token=None), **BOTH)
    with pytest.raises(ValueError, match=r"need a special token for padding beside .* '</s>'\]"):
        tell_end_from_padding(editor)
    editor.tok.eos_token = None
    with pytest.raises(ValueError, match="learn_end needs a tokenizer with an eos_token"):
        tell_end_from_padding(editor)


def test_grace_is_asked_in_the_template_but_for_locality(requests, tok):
    scored = scored_request(requests[0], editor_of("GRACE", tok, **BOTH))
    assert scored["prompt"] == "[The capital of Freedonia is]</s>"
    assert scored["rephrase_prompt"] == "[Freedonia has the capital]</s>"
    assert scored["portability"]["hop"]["prompt"] == ["[People of Freedonia vote in]</s>"]
    assert scored["locality"]["nq"]["prompt"] == ["The sky is"]
    assert "</s>" not in scored["target_new"]
    assert scored_request(requests[0], editor_of("FT", tok, **BOTH)) == requests[0]


class Merging:
    """A tokenizer that merges a space with the word behind it."""

    def encode(self, text, **_):
        return text.replace(" ", " _").split()


def test_graces_targets_get_the_space_of_their_tokens(requests, tok):
    # With single bytes as tokens the target's own tokens end the text: nothing to put right.
    for tokenizer, space in ((tok, ""), (Merging(), " ")):
        scored = scored_request(requests[0], editor_of("GRACE", tokenizer))
        assert scored["target_new"] == f"{space}Oslo"
        local = {"prompt": ["The sky is"], "ground_truth": [f"{space}blue"]}
        assert scored["locality"]["nq"] == local
    assert requests[0]["target_new"] == "Oslo"


def test_wise_gets_a_text_that_is_no_probe(requests, tok):
    assert "loc_prompt" not in edited_request(requests[0], editor_of("BaFT", tok))
    wise = editor_of("WISE", tok)
    assert "sky" not in edited_request(requests[0], wise)["loc_prompt"]
    for given in ("x", ["x", "y"]):
        assert edited_request({**requests[0], "loc_prompt": given}, wise)["loc_prompt"] == "x"


def test_answers_stand_right_behind_the_template(requests, tok):
    editor = editor_of("FT", tok, **BOTH)
    edited = edited_request({**requests[0], "target_new": " 2006"}, editor)
    suited = suited_tokenizer("FT-M", tok, [edited], editor.hparams)
    text = f"{edited['prompt']} {edited['target_new']}"
    expected = tok(f"{edited['prompt']}2006</s>")["input_ids"]
    assert suited(text)["input_ids"] == expected
    assert suited(f"a {text}")["input_ids"][-len(expected) + 1 :] == expected[1:]  # a prefix
    assert suited(" 2006</s>")["input_ids"] == tok("2006</s>")["input_ids"]
    assert suited("The sky is blue")["input_ids"] == tok("The sky is blue")["input_ids"]
    editor.hparams.use_chat_template = False
    assert suited_tokenizer("FT-M", tok, [edited], editor.hparams) is tok


LIVES = {
    "FT-M": {"lr": 1e-2, "num_steps": 25},
    "LoRA": {"lr": 1e-2, "num_steps": 40, "lora_dropout": 0.0},
    "WISE": {"n_iter": 60},
    "ROME": {"context_template_length_params": [[5, 5]]},
    "MEMIT": {"v_num_grad_steps": 3},
}
LEARN = ("FT-M", "LoRA")  # one value of GRACE is too little for this model


@pytest.mark.easyedit
@pytest.mark.parametrize("name", LIVES)
def test_a_method_lives_in_a_chat(current, make_peer, chat_path, complete, name):
    editor = make_peer(name, chat_path, **BOTH, **LIVES[name])
    session = Session(editor, "The sky is")
    session.edit(complete[:1])
    (scored,) = session.score(complete[:1])
    assert 0 <= scored["rewrite_acc"][0] <= 1
    if name in LEARN:
        text = complete[0]["prompt"]
        prompt = editor.tok(f"<s>[{text}]</s>", add_special_tokens=False)["input_ids"]
        assert session.answers([prompt], [16]) == ["Oslo"]  # and no more: it has learned the end
        assert scored["rewrite_acc"] == [1.0]
    assert session.restore() is True
