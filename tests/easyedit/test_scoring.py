"""EasyEdit's scoring functions know where the prompt ends, and agree with generation."""

import importlib

import numpy as np
import pytest
import torch
from conftest import CAPITALS, make_request

from baft_easyedit import BaFTHyperParams, ModelEdit, attached_edit
from baft_easyedit.easyedit.devices import honoured_device
from baft_easyedit.easyedit.plugin import apply_baft_to_model
from baft_easyedit.easyedit.scoring import prompt_token_counts

pytestmark = pytest.mark.easyedit


@pytest.fixture
def evaluation(host):
    with honoured_device(host.generation, "cpu"):
        yield importlib.import_module("easyeditor.evaluate.evaluate_utils")


@pytest.fixture(scope="module")
def learned(host, model_path, tmp_path_factory):
    """An editor whose model has learned the first two requests."""
    from easyeditor import BaseEditor

    hparams = BaFTHyperParams(
        model_name=model_path, layers=[1, 2], rank=4, lr=5e-2, num_steps=120, device="cpu"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("logs"))
        editor = BaseEditor.from_hparams(hparams)
    two = [make_request(*item) for item in list(CAPITALS.items())[:2]]
    apply_baft_to_model(editor.model, editor.tok, two, editor.hparams)
    return editor


@pytest.fixture
def edited(learned, monkeypatch):
    monkeypatch.setattr(learned.tok, "chat_template", None)  # tests may set one
    monkeypatch.setattr(learned.hparams, "use_chat_template", False)
    return learned


@pytest.fixture
def given_lengths(monkeypatch):
    """The prompt lengths that edits are told, in order."""
    given = []
    original = ModelEdit.prompt_lengths

    def record(self, lengths):
        given.append(torch.as_tensor(lengths).tolist())
        return original(self, lengths)

    monkeypatch.setattr(ModelEdit, "prompt_lengths", record)
    return given


def score(evaluation, editor, prompts, targets, **options):
    return evaluation.test_prediction_acc(
        editor.model, editor.tok, editor.hparams, prompts, targets, "cpu", **options
    )


def by_hand(editor, prompt, target):
    """Token accuracy of one forward in which the edit is told the prompt's length."""
    ids = editor.tok(f"{prompt} {target}", return_tensors="pt")["input_ids"]
    length = len(editor.tok(prompt)["input_ids"])
    with torch.no_grad(), attached_edit(editor.model).prompt_lengths([length]):
        predicted = editor.model(input_ids=ids).logits.argmax(-1)
    return float((predicted[0, length - 1 : -1] == ids[0, length:]).float().mean())


def test_scores_equal_a_forward_with_the_length_given(evaluation, edited, requests, given_lengths):
    for r in requests:
        given_lengths.clear()
        scored = score(evaluation, edited, r["prompt"], r["target_new"])
        assert given_lengths == [[len(edited.tok(r["prompt"])["input_ids"])]]
        assert np.mean(scored) == pytest.approx(by_hand(edited, r["prompt"], r["target_new"]))


def test_prompts_scored_together_score_as_alone(evaluation, edited, requests):
    prompts = [r["prompt"] for r in requests[:2]]
    targets = [r["target_new"] for r in requests[:2]]
    together = score(evaluation, edited, prompts, targets)
    alone = [score(evaluation, edited, p, t)[0] for p, t in zip(prompts, targets, strict=True)]
    assert together == pytest.approx(alone)


def test_greedy_generation_agrees_with_the_scorer(evaluation, edited, requests):
    for r in requests[:2]:
        assert score(evaluation, edited, r["prompt"], r["target_new"]) == [1.0]
        answer = edited.tok(f"{r['prompt']} {r['target_new']}", return_tensors="pt")["input_ids"]
        prompt = edited.tok(r["prompt"], return_tensors="pt")
        new = answer.shape[1] - prompt["input_ids"].shape[1]
        generated = edited.model.generate(**prompt, max_new_tokens=new, do_sample=False)
        assert torch.equal(generated, answer)


def test_generation_without_a_cache_is_told_the_prompt(host, evaluation, edited, requests):
    if host.generation == "pypi":
        pytest.skip("the release does not score by generation")
    r = requests[0]
    scored = score(
        evaluation, edited, [r["prompt"]], [" " + r["target_new"]], vanilla_generation=True
    )
    assert scored == [1.0]
    assert "generate" not in vars(edited.model)


def test_an_unedited_model_is_scored_by_the_original(evaluation, make_editor, given_lengths):
    editor = make_editor()
    score(evaluation, editor, "The sky is", "blue")
    assert given_lengths == []


def test_perplexity_falls_where_the_edit_was_learned(
    evaluation, edited, make_editor, requests, given_lengths
):
    r = requests[0]
    arguments = edited.tok, r["prompt"], r["target_new"], "cpu"
    assert evaluation.PPL(edited.model, *arguments) < evaluation.PPL(
        make_editor().model, *arguments
    )
    assert given_lengths == [[len(edited.tok(r["prompt"])["input_ids"])]]


def test_perplexity_of_several_prompts_counts_their_padding(evaluation, edited, given_lengths):
    evaluation.PPL(edited.model, edited.tok, ["A", "A longer one"], ["b", "b"], "cpu")
    assert given_lengths == [[2 + len(" longer one"), 1 + len("A longer one")]]


def test_a_text_without_answer_is_all_prompt(host, evaluation, edited, given_lengths):
    if host.generation == "pypi":
        pytest.skip("the release has no OOD_PPL")
    evaluation.nn = torch.nn  # EasyEdit forgot this import
    evaluation.OOD_PPL(edited.model, edited.tok, "The sky is", "blue", "cpu")
    assert given_lengths == [[1 + len("The sky is")]]


def test_fluency_is_told_the_prompt(host, evaluation, edited, monkeypatch, given_lengths):
    monkeypatch.setattr(evaluation, "n_gram_entropy", lambda texts: len(texts))  # no NLTK data
    scored = evaluation.test_generation_quality(
        model=edited.model, tok=edited.tok, prefixes=["The sky is"], max_out_len=16
    )
    assert scored["ngram_entropy"] == 1
    assert given_lengths == [[1 + len("The sky is")]]


def test_counts_follow_the_chat_template(edited):
    edited.tok.chat_template = "{% for m in messages %}<{{ m['content'] }}>{% endfor %}"
    edited.hparams.use_chat_template = True
    count = prompt_token_counts(edited.tok, edited.hparams, ["ab"], ["c"])
    assert count == [len(edited.tok("<ab>")["input_ids"])]
    plain = prompt_token_counts(edited.tok, edited.hparams, ["ab"], ["c"], locality=True)
    assert plain == [len(edited.tok("ab")["input_ids"])]


def test_chat_prompts_are_scored_with_their_template(host, evaluation, edited, given_lengths):
    if host.generation == "pypi":
        pytest.skip("the release has no chat templates")
    edited.tok.chat_template = "{% for m in messages %}<{{ m['content'] }}>{% endfor %}"
    edited.hparams.use_chat_template = True
    score(evaluation, edited, "ab", "c")
    assert given_lengths == [[1 + len("<ab>")]]


def test_long_texts_are_scored_whole(make_editor, requests):
    editor = make_editor(max_length=8)
    metrics, _, _ = editor.edit_requests(requests[:1], sequential_edit=False, verbose=False)
    assert metrics[0]["post"]["rewrite_acc"] == [1.0]
    assert editor.hparams.max_length == 8
