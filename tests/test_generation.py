from dataclasses import replace

import pytest
import torch
from tokenizers import processors

from baft_easyedit import BaFTEditor
from baft_easyedit.generation import generate_answers, load_model
from baft_easyedit.prompt_format import PromptFormat
from tests.conftest import make_model, make_tokenizer


@pytest.fixture
def saved(tmp_path, tokenizer):
    make_model().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return str(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_model_is_loaded_in_eval_mode_and_the_dtype_asked_for(saved, dtype):
    model, tokenizer = load_model(saved, "cpu", dtype)
    assert model.dtype == dtype
    assert not model.training
    assert tokenizer.padding_side == "left"
    assert tokenizer.pad_token_id is not None


def test_answers_do_not_depend_on_the_batch(saved):
    model, tokenizer = load_model(saved)
    prompts = ["The capital of France is", "Ice"]
    together = generate_answers(model, tokenizer, prompts, 5)
    assert together == [generate_answers(model, tokenizer, [p], 5)[0] for p in prompts]
    assert all(answer == answer.strip() for answer in together)


def test_model_that_does_not_exist_is_an_error(tmp_path):
    with pytest.raises((OSError, ValueError), match="nowhere"):
        load_model(str(tmp_path / "nowhere"))


def test_an_answer_whose_end_was_learned_stops_there(model, tokenizer, hparams, request_dict):
    editor = BaFTEditor(model, tokenizer, replace(hparams, learn_end=True, num_steps=100))
    assert editor.edit(request_dict).final_loss < 0.05
    (answer,) = generate_answers(model, tokenizer, [request_dict["prompt"]])
    assert answer.strip() == "Rome"


def test_what_is_asked_is_what_was_learned(model, hparams):
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 256), ("</s>", 257)]
    )
    tokenizer.chat_template = "<s>{% for m in messages %}<{{ m['content'] }}{{ mood }}>{% endfor %}"
    chat = {"use_chat_template": True, "chat_template_kwargs": {"mood": "!"}}
    for settings in ({}, {"separator": "="}, chat):
        own = replace(hparams, learn_end=True, num_steps=150, **settings)
        form = PromptFormat.of(own)
        editor = BaFTEditor(model, tokenizer, own)
        editor.edit({"prompt": "Ice is ", "target_new": "hot"})
        answers = generate_answers(model, tokenizer, ["Ice is "], prompt_format=form)
        answers += generate_answers(model, tokenizer, [form.prompt_ids("Ice is ", tokenizer)])
        assert [answer.strip("= ") for answer in answers] == ["hot", "hot"]
        editor.undo()
        editor.model_edit.detach()
