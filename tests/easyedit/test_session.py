"""EasyEdit's own parts, one by one: edit, score, restore, verify."""

import pytest
import torch
from conftest import logits

from baft_easyedit.easyedit.session import Session

pytestmark = pytest.mark.easyedit


def test_parameters_are_counted(make_editor, make_peer, complete):
    session = Session(make_editor("ReFT"), "a")
    assert session.num_parameters is None
    session.edit(complete[:1])
    assert session.num_parameters == 2 * (2 * 4 * 32 + 4)  # layers (R, A and b)
    session = Session(make_peer("FT-L", num_steps=3), "a")
    session.edit(complete[:1])
    assert session.num_parameters == 32 * 64


def test_edits_in_a_row_add_up_and_are_undone_together(make_editor, complete):
    editor = make_editor()
    before = logits(editor, "The sky is")
    session = Session(editor, "The sky is")
    (pre,) = session.score(complete[:1])
    for request in complete:
        assert session.edit([request]) > 0
        (metrics,) = session.score_against([pre], [request])
        assert metrics["pre"]["rewrite_acc"] != metrics["post"]["rewrite_acc"] == [1.0]
        assert 0 <= metrics["post"]["locality"]["nq_acc"][0] <= 1
    assert session.restore() is True
    assert torch.equal(logits(editor, "The sky is"), before)


def test_lora_is_scored_without_dropout(make_peer, complete):
    session = Session(make_peer("AdaLoRA", num_steps=2), "The sky is")
    for request in complete[:2]:
        session.edit([request])
    training = [module for module in session.model.modules() if module.training]
    assert training  # EasyEdit leaves it so
    prompts, targets = ["The sky is"] * 2, ["blue"] * 2
    assert session.token_accuracies(prompts, targets) == session.token_accuracies(prompts, targets)
    assert all(module.training for module in training)


def test_answers_are_generated_by_the_edited_model(make_editor, complete):
    session = Session(make_editor(), "The sky is")
    prompts = [complete[0]["prompt"], "The sky is"]
    before = session.answers(prompts, [6, 4])
    session.edit(complete[:1])
    after = session.answers(prompts, [6, 4])
    session.batch_size = 1
    assert session.answers(prompts, [6, 4]) == after
    assert after[0].startswith("Oslo")
    assert not before[0].startswith("Oslo")


@pytest.mark.parametrize("verify", [True, False])
def test_a_restore_that_fails_is_made_good_if_there_is_a_copy(make_editor, complete, verify):
    editor = make_editor()
    before = logits(editor, "The sky is")
    original = editor.apply_algo

    class Broken(dict):
        def items(self):
            raise RuntimeError("lost them")

        __call__ = items

    editor.apply_algo = lambda *args, **kwargs: (original(*args, **kwargs)[0], Broken())
    session = Session(editor, "The sky is", verify)
    session.edit(complete[:1])
    if verify:
        assert session.restore() is False
        assert torch.equal(logits(editor, "The sky is"), before)
    else:
        with pytest.raises(RuntimeError, match="lost them"):
            session.restore()


def test_an_answer_of_grace_that_ends_early_is_scored_whole(current, make_editor):
    editor = make_editor()
    editor.alg_name = editor.hparams.alg_name = "GRACE"
    request = {
        "prompt": "A",
        "target_new": "an answer that is longer than its prompt",
        "ground_truth": "?",
        "portability": {},
        "locality": {},
    }
    config = editor.model.generation_config
    config.eos_token_id = None
    wanted = Session(editor, "a").score([request])[0]["rewrite_acc"]
    ids = editor.tok(request["prompt"], return_tensors="pt")["input_ids"]
    config.eos_token_id = editor.model(ids).logits[0, -1].argmax().item()  # what comes first
    assert Session(editor, "a").score([request])[0]["rewrite_acc"] == wanted
    assert config.eos_token_id is not None
