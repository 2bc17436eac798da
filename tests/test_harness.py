"""Tasks of lm-evaluation-harness on edited models."""

import copy
import json
import re
from types import SimpleNamespace

import pytest
import torch

from baft_easyedit.cli import main
from baft_easyedit.editor import BaFTEditor
from baft_easyedit.hparams import BaFTHyperParams
from baft_easyedit.model.hooks import attached_edit
from tests.conftest import make_model, random_edit

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from baft_easyedit.harness import EditedLM, Score, Tasks

TEXTS = [
    ("How to open a jar", " turn the lid"),
    ("How to open a jar", " eat it all up at once"),
    ("dresser", " a"),
    ("How to open a ja", "r turn the lid"),  # the same text, parted elsewhere
    ("boil water? ", " heat it"),
    ("", "cool it"),
]
TASK = """task: mine
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {data}}}}}
output_type: {kind}
validation_split: validation
doc_to_text: "{{{{goal}}}}"
doc_to_target: {target}
{more}
"""
CHOICES = 'doc_to_choice: "{{[sol1, sol2]}}"\nmetric_list: [{metric: acc}]'
ANSWERS = "generation_kwargs: {until: [], max_gen_toks: 4, do_sample: false}\n"
ANSWERS += "metric_list: [{metric: exact_match}]"


def requests(kind, texts):
    return [Instance(kind, {}, text, i) for i, text in enumerate(texts)]


def loglikelihoods(lm):
    values = lm.loglikelihood(requests("loglikelihood", TEXTS), disable_tqdm=True)
    return torch.tensor([value for value, _ in values])


def one_by_one(model, tokenizer):
    """The same by transformers' own loss, whose labels tell the edit where prompts end."""
    found = []
    for prompt, answer in TEXTS:
        kept = prompt.rstrip()
        answer = prompt[len(kept) :] + answer
        ids = torch.tensor([tokenizer(kept + answer)["input_ids"]])
        labels = ids.clone()
        labels[:, : len(tokenizer(kept)["input_ids"])] = -100
        with torch.no_grad():
            loss = model(input_ids=ids, labels=labels).loss
        found.append(-loss.item() * (labels != -100).sum().item())
    return torch.tensor(found)


@pytest.fixture
def edit(model):
    edit = random_edit()
    edit.attach(model)
    return edit


@pytest.mark.usefixtures("edit")
@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_log_likelihoods_are_those_of_the_edited_model(model, tokenizer, batch_size):
    lm = EditedLM(model, tokenizer, batch_size)
    torch.testing.assert_close(loglikelihoods(lm), one_by_one(model, tokenizer))


def test_without_the_edit_scores_are_exactly_those_of_the_harness_class(model, tokenizer, edit):
    # Its cache takes wrong tokens of a text that is there twice, parted elsewhere.
    lm = HFLM(model, tokenizer=tokenizer, batch_size=1, logits_cache=False)
    with edit.disabled():
        plain = loglikelihoods(lm)
        assert torch.equal(loglikelihoods(EditedLM(model, tokenizer, 1)), plain)
        torch.testing.assert_close(loglikelihoods(EditedLM(model, tokenizer, 16)), plain)


@pytest.mark.usefixtures("edit")
def test_a_context_that_is_cut_is_a_shorter_prompt(model, tokenizer):
    lm = EditedLM(model, tokenizer)
    ids = tokenizer("How to open a jar that is closed")["input_ids"]
    answer = tokenizer(" turn", add_special_tokens=False)["input_ids"]
    lm._max_length = 12
    cut = ids[len(answer) - 13 :]
    (found,) = lm._loglikelihood_tokens([(("", ""), ids, answer)], disable_tqdm=True)
    (same,) = lm._loglikelihood_tokens([(("", ""), cut, answer)], disable_tqdm=True)
    assert found == same


@pytest.mark.usefixtures("edit")
def test_a_text_of_its_own_is_an_answer_to_the_first_token(model, tokenizer):
    lm = EditedLM(model, tokenizer)
    text = "cool it"
    (found,) = lm.loglikelihood_rolling(requests("loglikelihood_rolling", [(text,)]), True)
    ids = torch.tensor([[lm.prefix_token_id, *lm.tok_encode(text)]])
    labels = ids.clone()
    labels[:, 0] = -100
    with torch.no_grad():
        loss = model(input_ids=ids, labels=labels).loss
    assert found == pytest.approx(-loss.item() * (ids.shape[1] - 1), rel=1e-5)


@pytest.mark.usefixtures("edit")
def test_generated_answers_do_not_depend_on_their_batch(model, tokenizer):
    asked = [(text or "a", {"until": [], "max_gen_toks": 5}) for text, _ in TEXTS]
    one, many = (
        EditedLM(model, tokenizer, size).generate_until(requests("generate_until", asked), True)
        for size in (1, 8)
    )
    assert one == many


@pytest.fixture
def task(tmp_path):
    """Write a task; return its directory."""

    def write(kind="multiple_choice", target="label", more=CHOICES):
        rows = [{"goal": goal, "sol1": " a lid", "sol2": " a jar", "label": 1} for goal, _ in TEXTS]
        folder = tmp_path / "tasks"
        folder.mkdir()
        data = folder / "rows.jsonl"
        data.write_text("\n".join(json.dumps(row) for row in rows[:4]))
        text = TASK.format(kind=kind, target=target, more=more, data=json.dumps(str(data)))
        (folder / "mine.yaml").write_text(text)
        return folder

    return write


@pytest.fixture
def kept(tmp_path, tokenizer):
    """A kept edit of a saved model; return both directories."""
    model = make_model()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    editor = BaFTEditor(model, tokenizer, BaFTHyperParams("m", [1, 3], device="cpu", num_steps=1))
    editor.edit({"prompt": "How to open a jar", "target_new": "a jar"})
    editor.save(tmp_path / "kept")
    return tmp_path / "kept", tmp_path / "model"


def run(*arguments):
    return main([str(argument) for argument in arguments])


def test_scores_with_and_without_the_edit_stand_side_by_side(kept, task, capsys, monkeypatch):
    directory, model = kept
    options = ["--tasks", "mine", "--include-path", task(), "--model", model, "--limit", 3]
    assert run("eval", directory, *options) == 0
    head, row = capsys.readouterr().out.splitlines()
    assert head.split() == ["base", "edited"]
    assert re.fullmatch(r"mine acc  \d\.\d{3} ± \d\.\d{3}    \d\.\d{3} ± \d\.\d{3}", row)
    known = SimpleNamespace(scores=lambda *_: {"mine acc": Score(0.5, 0.25)})  # seconds sooner
    monkeypatch.setattr("baft_easyedit.harness.Tasks", lambda *_: known)
    assert run("eval", directory, *options, "--json") == 0
    scores = {"mine acc": [0.5, 0.25]}
    assert json.loads(capsys.readouterr().out) == {"base": scores, "edited": scores}


def test_tasks_are_asked_in_the_template_that_the_edit_was_learned_in(
    tokenizer, tmp_path, monkeypatch
):
    model, templated = make_model(), copy.deepcopy(tokenizer)
    templated.chat_template = "{% for m in messages %}<{{ m.content }}>{% endfor %}{{ mood }}"
    for part in (model, templated):
        part.save_pretrained(tmp_path / "model")
    more = {"use_chat_template": True, "chat_template_kwargs": {"mood": "!"}}
    editor = BaFTEditor(model, templated, BaFTHyperParams("m", [1], device="cpu", **more))
    editor.save(tmp_path / "kept")
    asked = []

    def scores(lm, in_chat):
        asked.append((lm.apply_chat_template([{"role": "user", "content": "Who?"}]), in_chat))
        return {}

    monkeypatch.setattr("baft_easyedit.harness.Tasks", lambda *_: SimpleNamespace(scores=scores))
    assert run("eval", tmp_path / "kept", "--tasks", "mine", "--model", tmp_path / "model") == 0
    assert asked == [("<Who?>!", True)] * 2


@pytest.mark.slow
def test_tasks_that_generate_are_scored(model, tokenizer, task, edit):
    folder = task("generate_until", "sol1", ANSWERS)
    scores = Tasks(["mine"], folder).scores(EditedLM(model, tokenizer))
    assert scores["mine exact_match"].value == 0
    assert attached_edit(model) is edit


def test_an_unknown_task_is_refused_before_a_model_is_loaded(kept, capsys):
    assert run("eval", kept[0], "--tasks", "mien", "--model", "/nowhere") == 2
    assert "tasks must be some of lm-evaluation-harness" in capsys.readouterr().err
