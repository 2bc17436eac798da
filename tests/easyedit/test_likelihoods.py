"""Likelihoods of answers are those of transformers' own loss, one text at a time."""

from math import inf

import pytest
import torch

from baft_easyedit.easyedit.likelihoods import likelihoods
from baft_easyedit.easyedit.session import Session
from baft_easyedit.model.hooks import attached_edit

pytestmark = pytest.mark.easyedit
ASKED = [
    ("The capital of Freedonia is", "Oslo", False),
    ("The capital of Freedonia is", "a town of no importance", False),
    ("Freedonia", "is", False),
    ("What is a very long question about the sky? The sky is", "blue", True),
]


def alone(session, prompt, answer):
    """Score one text by transformers' loss, whose labels tell the edit its prompt."""
    tok, model = session.editor.tok, session.model
    before = len(tok(prompt)["input_ids"])
    ids = tok(f"{prompt} {answer}", return_tensors="pt")["input_ids"]
    labels = ids.clone()
    labels[:, :before] = -100
    with torch.no_grad():
        output = model(input_ids=ids, labels=labels)
    hits = output.logits[0, before - 1 : -1].argmax(-1) == ids[0, before:]
    return output.loss.item(), hits.float().mean().item()


def test_likelihoods_are_transformers_own_before_an_edit_and_after(make_editor, complete):
    session, seen = Session(make_editor(), "a"), []
    for is_edited in (False, True):
        if is_edited:
            session.edit(complete[:1])
        expected = [alone(session, prompt, answer) for prompt, answer, _ in ASKED]
        for batch_size, side in ((1, "left"), (3, "right"), (3, "left")):
            session.batch_size, session.editor.tok.padding_side = batch_size, side
            found = session.likelihoods(ASKED)
            for score, own in zip(found, expected, strict=True):
                assert tuple(score) == pytest.approx(own, abs=1e-5)
        seen.append(found[0])
    before, after = seen
    assert before.nll > after.nll
    assert after.accuracy == 1.0
    assert attached_edit(session.model).contexts.now.prompt_lengths is None


def test_local_prompts_are_asked_without_the_chat_template(current, make_editor):
    editor = make_editor(use_chat_template=True)
    editor.tok.chat_template = "U:{{ messages[0]['content'] }}A:"
    session = Session(editor, "a")
    in_template, plain = session.likelihoods(
        [("The sky is", "b", False), ("The sky is", "b", True)]
    )
    nll, accuracy = alone(session, "The sky is", "b")
    assert plain == (pytest.approx(nll, abs=1e-5), accuracy)
    assert abs(plain.nll - in_template.nll) > 1e-3


def test_a_model_that_edits_broke_is_infinitely_surprised(tokenizer):
    def broken(input_ids, attention_mask):
        return torch.full((*input_ids.shape, 300), torch.nan)

    (score,) = likelihoods(broken, tokenizer, [((1, 2, 3), 1)], 1, torch.device("cpu"))
    assert score.nll == inf


def test_grace_is_asked_at_the_prompts_end(current, make_peer, complete):
    session = Session(make_peer("GRACE", n_iter=60), "a")
    request = complete[0]
    asked = [(request["prompt"], request["target_new"], False), ASKED[3]]
    (before, other), seconds = session.likelihoods(asked), session.edit([request])
    after, same = session.likelihoods(asked)
    assert seconds > 0
    assert after.nll < before.nll
    assert same == other
