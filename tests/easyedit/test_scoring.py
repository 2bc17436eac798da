"""EasyEdit's scoring functions know where the prompt ends, and agree with generation."""

import copy
import importlib
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import CAPITALS, make_request
from tokenizers import processors

from baft_easyedit import BaFTHyperParams, ModelEdit, attached_edit
from baft_easyedit.easyedit.compat import honoured_device
from baft_easyedit.easyedit.learned_tokens import LearnedTokens
from baft_easyedit.easyedit.plugin import apply_baft_to_model
from baft_easyedit.model.prompt_format import PromptFormat
from baft_easyedit.training.requests import as_requests, text_rows

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
    monkeypatch.setattr(learned.hparams, "chat_template_kwargs", None)
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


@contextmanager
def unedited(model):
    edit = attached_edit(model)
    edit.detach()
    yield
    edit.attach(model)


def score(evaluation, editor, prompts, targets, **options):
    return evaluation.test_prediction_acc(
        editor.model, editor.tok, editor.hparams, prompts, targets, "cpu", **options
    )


def test_greedy_generation_agrees_with_the_scorer(evaluation, edited, requests):
    for r in requests[:2]:
        assert score(evaluation, edited, r["prompt"], r["target_new"]) == [1.0]
        answer = edited.tok(f"{r['prompt']} {r['target_new']}", return_tensors="pt")["input_ids"]
        prompt = edited.tok(r["prompt"], return_tensors="pt")
        new = answer.shape[1] - prompt["input_ids"].shape[1]
        generated = edited.model.generate(**prompt, max_new_tokens=new, do_sample=False)
        assert torch.equal(generated, answer)


def test_generation_without_a_cache_is_told_the_prompt(current, evaluation, edited, requests):
    r = requests[0]
    scored = score(
        evaluation, edited, [r["prompt"]], [" " + r["target_new"]], vanilla_generation=True
    )
    assert scored == [1.0]


def test_perplexity_of_several_prompts_counts_their_padding(evaluation, edited, given_lengths):
    evaluation.PPL(edited.model, edited.tok, ["A", "A longer one"], ["b", "b"], "cpu")
    assert given_lengths == [[2 + len(" longer one"), 1 + len("A longer one")]]


def test_a_text_without_answer_is_all_prompt(current, evaluation, edited, given_lengths):
    evaluation.nn = torch.nn  # EasyEdit forgot this import
    evaluation.OOD_PPL(edited.model, edited.tok, "The sky is", "blue", "cpu")
    assert given_lengths == [[1 + len("The sky is")]]


CHAT = "<s>{% for m in messages %}<{{ m['content'] }}{{ mood }}>{% endfor %}"


def test_chat_prompts_are_scored_with_their_template(current, evaluation, edited, given_lengths):
    edited.tok.chat_template = CHAT
    edited.hparams.use_chat_template = True
    edited.hparams.chat_template_kwargs = {"mood": "!"}
    score(evaluation, edited, "ab", "c")
    score(evaluation, edited, "ab", "c", locality=True)
    assert given_lengths == [[1 + len("<ab!>")], [1 + len("ab")]]


@pytest.fixture
def seen_ids(edited):
    """The tokens that the model is run on."""
    seen = []
    hook = edited.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].tolist()), with_kwargs=True
    )
    yield seen
    hook.remove()


def ends_texts(tok):
    """A tokenizer that puts its end behind every text, as one with `add_eos_token` does."""
    ending = copy.deepcopy(tok)
    begin, end = tok.bos_token, tok.eos_token
    ending.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A {end}",
        special_tokens=[(begin, tok.bos_token_id), (end, tok.eos_token_id)],
    )
    return ending


SEAMS = {
    "plain": ("The sky is", "blue", {}, None),
    "end": ("The sky is", "blue", {}, ends_texts),
    "space": ("The sky is ", " blue", {}, None),
    "chinese": ("\u4e2d\u56fd\u7684\u9996\u90fd\u662f", "\u7ebd\u7ea6", {}, None),
    "separator": ("The sky is", "blue", {"separator": ": "}, None),
}


@pytest.mark.parametrize("seam", SEAMS)
@pytest.mark.parametrize("is_edited", [True, False])
def test_what_is_scored_is_what_is_learned(
    evaluation, edited, given_lengths, seen_ids, monkeypatch, seam, is_edited
):
    prompt, target, settings, change = SEAMS[seam]
    for name, value in settings.items():
        monkeypatch.setattr(edited.hparams, name, value)
    tok = edited.tok if change is None else change(edited.tok)
    monkeypatch.setattr(edited, "tok", tok)
    form = PromptFormat.of(edited.hparams)
    (row,) = text_rows(
        as_requests({"prompt": prompt, "target_new": target}), tok, prompt_format=form
    )
    with nullcontext() if is_edited else unedited(edited.model):
        scored = score(evaluation, edited, prompt, target)
    assert seen_ids == [[list(row.ids)]]
    assert given_lengths == ([[row.prompt_length]] if is_edited else [])
    num_right = np.mean(scored) * (len(row.ids) - row.prompt_length)
    assert num_right == pytest.approx(round(num_right))  # one score for each token of the answer


def test_other_methods_are_scored_on_easyedits_own_text(evaluation, edited, seen_ids):
    others = SimpleNamespace(max_length=40)
    with unedited(edited.model):
        evaluation.test_prediction_acc(edited.model, edited.tok, others, "Ice is ", "hot", "cpu")
    assert seen_ids == [[edited.tok("Ice is  hot")["input_ids"]]]


def test_perplexity_is_that_of_the_learned_text(evaluation, edited, given_lengths, seen_ids):
    evaluation.PPL(edited.model, edited.tok, "Ice is ", " hot", "cpu")
    learned = edited.tok("Ice is hot")["input_ids"]
    assert seen_ids[0][0][: len(learned)] == learned  # the release goes on with an end
    assert given_lengths == [[1 + len("Ice is")]]


@pytest.mark.parametrize("side", ["left", "right"])
def test_learned_tokens_are_the_tokenizers_own_where_there_is_nothing_to_put_right(edited, side):
    tok, texts = edited.tok, ["The sky", "Ice is cold"]
    ours = LearnedTokens(LearnedTokens(tok, PromptFormat()), PromptFormat())
    before, ours.padding_side = tok.padding_side, side
    assert tok.padding_side == side
    options = {"padding": True, "truncation": True, "max_length": 8, "return_tensors": "pt"}
    expected, found = tok(texts, **options), ours(texts, **options)
    assert ours("Ice", return_tensors="pt")["input_ids"].tolist() == [tok("Ice")["input_ids"]]
    tok.padding_side = before
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert ours(texts)["input_ids"] == tok(texts)["input_ids"]
    assert ours("Ice")["input_ids"] == tok("Ice")["input_ids"] == ours.encode("Ice")
    bare = {"add_special_tokens": False}
    assert ours.encode("Ice", **bare) == tok.encode("Ice", **bare) == ours("Ice", **bare).input_ids
    assert len(ours) == len(tok)


def test_long_texts_are_scored_whole(make_editor, requests):
    editor = make_editor(max_length=8)
    metrics, _, _ = editor.edit_requests(requests[:1], sequential_edit=False, verbose=False)
    assert metrics[0]["post"]["rewrite_acc"] == [1.0]
    assert editor.hparams.max_length == 8
