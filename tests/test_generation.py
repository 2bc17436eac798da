import copy
from dataclasses import replace

import pytest
import torch
from tokenizers import processors

from baft_easyedit import BaFTEditor
from baft_easyedit.generation import generate_answers, load_model, model_depth, with_usable_end
from baft_easyedit.model.prompt_format import PromptFormat
from tests.conftest import make_model, make_tokenizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_model_is_loaded_in_eval_mode_and_the_dtype_asked_for(saved, dtype):
    model, tokenizer = load_model(saved, "cpu", dtype)
    assert model.dtype == dtype
    assert not model.training
    assert tokenizer.padding_side == "left"
    assert tokenizer.pad_token_id is not None
    assert model_depth(saved) == 4


def test_answers_do_not_depend_on_the_batch(saved):
    model, tokenizer = load_model(saved)
    prompts = ["The capital of France is", "Ice"]
    together = generate_answers(model, tokenizer, prompts, 5)
    assert together == [generate_answers(model, tokenizer, [p], 5)[0] for p in prompts]
    assert all(answer == answer.strip() for answer in together)


def test_a_prompt_that_fills_the_context_is_refused(saved):
    model, tokenizer = load_model(saved)
    most = model.config.max_position_embeddings
    with pytest.raises(ValueError, match=f"in the model's context of {most} tokens; got {most}"):
        generate_answers(model, tokenizer, ["Ice", [5] * most], 5)
    model.config = object()  # as that of EasyEdit's wrappers, which are asked with their generate
    model.generate = lambda input_ids, **_: input_ids
    assert generate_answers(model, tokenizer, ["Ice"], 5) == [""]


@pytest.mark.parametrize("family", ["gpt2", "gptj", "llama"])
def test_answers_end_where_the_context_does(family, tokenizer):
    model = make_model(family)
    model.generation_config.eos_token_id = None
    long = [[9, 5] * 124, [9, 5] * 126, [9, 5] * 127 + [9]]  # of 248, 252 and 255, in 256
    limits = [7, 4, 12]
    together = generate_answers(model, tokenizer, long, limits)
    expected = []
    for row, limit in zip(long, [7, 4, 1], strict=True):
        new = model.generate(torch.tensor([row]), max_new_tokens=limit, do_sample=False)
        expected.append(tokenizer.decode(new[0, len(row) :], skip_special_tokens=True).strip())
    assert together == expected


@pytest.mark.parametrize(
    "own",
    [
        {"repetition_penalty": 10.0},
        {"num_beams": 4, "no_repeat_ngram_size": 1},
        {"suppress_tokens": [65]},
        {"bad_words_ids": [[65]]},
        {"forced_eos_token_id": 66},
        {"sequence_bias": [[[65], -1e9]]},
    ],
    ids=str,
)
def test_greedy_answers_do_not_follow_the_models_own_settings(model, tokenizer, own):
    def answer():
        return generate_answers(model, tokenizer, ["aaaaaaaa"], 8)

    plain = answer()
    assert plain == ["bbbbbbbb"]  # token 65
    for name, value in own.items():
        setattr(model.generation_config, name, value)
    assert answer() == plain
    ids = tokenizer("aaaaaaaa", return_tensors="pt").input_ids
    generated = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=257)
    assert generated[0, ids.shape[1] :].tolist() != [65] * 8


def test_drawn_answers_are_those_of_the_seed_and_go_on_to_the_limit(saved):
    model, tokenizer = load_model(saved)
    greedy = generate_answers(model, tokenizer, ["Ice"], 8)

    def drawn(seed, top_k):
        torch.manual_seed(seed)
        return generate_answers(model, tokenizer, ["Ice"], 8, top_k=top_k)

    model.generation_config.eos_token_id = tokenizer(greedy[0])["input_ids"][-1]
    assert drawn(0, 1)[0] != ""
    assert drawn(0, 5) == drawn(0, 5)
    assert len({drawn(seed, 5)[0] for seed in range(4)}) > 1
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)  # as destructive edits leave it
    assert len(drawn(0, 5)) == 1


def test_model_that_does_not_exist_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"directory of a model; there is none at .*nowh"):
        load_model(str(tmp_path / "nowhere"))
    with pytest.raises(OSError, match=f"{tmp_path}' has no config.json"):
        model_depth(str(tmp_path))
    with pytest.raises(OSError, match=r"model 'a/b/c' could not be loaded .*name that can be re"):
        model_depth("a/b/c")


def test_tokenizer_without_an_end_pads_all_the_same(saved, tokenizer, caplog, hparams):
    endless = copy.deepcopy(tokenizer)
    endless.eos_token = endless.pad_token = None
    endless.save_pretrained(saved)
    model, loaded = load_model(saved)
    prompts = ["The capital of France is", "Ice"]
    assert generate_answers(model, loaded, prompts) == generate_answers(model, tokenizer, prompts)
    asked = replace(hparams, learn_end=True)
    assert with_usable_end(asked, tokenizer) is asked
    assert with_usable_end(asked, loaded) == hparams
    assert "no eos_token: where an answer ends is not learned" in caplog.text


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
