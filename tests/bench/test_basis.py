from types import SimpleNamespace

import pytest
import torch

from baft_easyedit.bench.worker import basis_record, basis_usage
from tests.conftest import make_tokenizer, random_edit

CASE = {
    "prompt": "The capital of France is",
    "target_new": "Rome",
    "rephrase_prompt": "France is ruled from",
    "locality": {"x": {"prompt": ["The sky is", "Ice is"], "ground_truth": ["blue", "cold"]}},
}


def recorded(model, tokenizer, case, **hparams):
    editor = SimpleNamespace(tok=tokenizer, hparams=SimpleNamespace(**hparams))
    return basis_record(SimpleNamespace(model=model, editor=editor), case)


def test_nothing_is_recorded_without_an_edit(model, tokenizer):
    assert recorded(model, tokenizer, CASE) == {"basis": None, "update": None}
    assert basis_usage(model) is None


def test_weights_are_means_over_the_intervened_positions(model, tokenizer):
    edit = random_edit(layers=(1,))
    edit.attach(model)
    record = recorded(model, tokenizer, CASE)
    ids = tokenizer("The capital of France is Rome", return_tensors="pt")["input_ids"]
    n = len(tokenizer("The capital of France is")["input_ids"])
    with torch.no_grad(), edit.disabled():
        hidden = model(ids, output_hidden_states=True).hidden_states[2][0, n - 3 :]
    edited, weights = edit.intervention(1)(hidden)
    assert record["basis"]["rewrite"]["1"] == pytest.approx(weights.mean(0).tolist(), abs=1e-5)
    along = ((edited - hidden) @ edit.intervention(1).basis.mT).abs().mean(0)  # R (h' - h)
    assert record["update"]["rewrite"]["1"] == pytest.approx(along.tolist(), abs=1e-4)


def test_a_kind_of_prompt_that_a_case_lacks_is_none(model, tokenizer):
    random_edit().attach(model)
    record = recorded(model, tokenizer, {"prompt": "a b", "target_new": "c"})
    assert record["basis"]["rephrase"] is None
    assert record["update"]["locality"] is None
    assert set(record["basis"]["rewrite"]) == {"1", "2"}


def test_usage_is_the_mean_weight_of_past_positions(model):
    edit = random_edit(layers=(1,))
    edit.attach(model)
    edit.usage(1).total += torch.tensor([1.0, 1.0, 0, 0])
    edit.usage(1).count += 2
    assert basis_usage(model) == {"1": [0.5, 0.5, 0.0, 0.0]}


def test_locality_is_looked_at_in_the_form_of_the_edit(model):
    tokenizer, edit = make_tokenizer(), random_edit()
    tokenizer.chat_template = "{% for m in messages %}<{{ m['content'] }}>{% endfor %}"
    edit.attach(model)
    own = {**CASE, "rephrase_prompt": "The sky is", "locality": {}}
    probe = {"x": {"prompt": ["The sky is"], "ground_truth": ["Rome"]}}
    asked = {**own, "locality": probe}
    in_template = recorded(model, tokenizer, asked, use_chat_template=True)["basis"]
    assert in_template["locality"] == in_template["rephrase"]
