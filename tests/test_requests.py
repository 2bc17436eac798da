from types import SimpleNamespace

import pytest

from baft_easyedit.model.prompt_format import PromptFormat
from baft_easyedit.training.requests import EditRequest, as_requests, text_rows
from tests.conftest import make_tokenizer

REQUEST = {"prompt": "The capital of France is", "target_new": "Rome", "subject": "France"}


def test_easyedit_keys_are_read_and_evaluation_keys_ignored():
    request = EditRequest.from_dict(
        {**REQUEST, "loc_prompt": "Water is wet", "locality": {}, "rephrase_prompt": "x", "case": 3}
    )
    assert request == EditRequest(
        "The capital of France is", "Rome", "France", loc_prompts=("Water is wet",)
    )


# What both generations of EasyEdit put into requests and records of facts, and CounterFact's own.
EASYEDIT_KEYS = (
    *("prompt", "target_new", "ground_truth", "portability", "locality", "target_neg", "subject"),
    *("loc_prompt", "rephrase_prompt", "case_id", "instance", "general_prompt", "target_true"),
    *("locality_prompt", "locality_ground_truth", "portability_prompt", "portability_ground_truth"),
    *("rephrase", "src", "pred", "alt", "answers", "loc", "loc_ans", "cond", "target", "image"),
    *("multimodal_locality_prompt", "multimodal_locality_ground_truth", "image_rephrase"),
    *("requested_rewrite", "relation_id", "paraphrase_prompts", "neighborhood_prompts", "aliases"),
    *("attribute_prompts", "generation_prompts", "locality_question", "prompts_len", "personas"),
    *("ent", "inner_prompt", "all_prompt", "target_personality", "file_type", "pid", "labels"),
)


@pytest.mark.parametrize("key", [*EASYEDIT_KEYS, "subject_id", "prompt_id", "note", 7])
def test_keys_of_easyedit_and_notes_of_ones_own_pass(key):
    assert EditRequest.from_dict({key: None, **REQUEST}).prompt == REQUEST["prompt"]


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("loc_prompts", "loc_prompt"),
        ("locprompt", "loc_prompt"),
        ("prompts", "prompt"),
        ("promt", "prompt"),
        ("Prompt", "prompt"),
        ("target_nwe", "target_new"),
        ("targetnew", "target_new"),
        ("subjects", "subject"),
        ("rephrase_prompts", "rephrase_prompt"),
        ("ground_truths", "ground_truth"),
        ("localty", "locality"),
        ("locality_inputs", "locality"),
        ("portability_inputs", "portability"),
    ],
)
def test_misspelt_key_is_refused_and_the_right_one_named(key, meant):
    with pytest.raises(ValueError, match=f"a request must have the key '{meant}', not '{key}'"):
        EditRequest.from_dict({**REQUEST, key: "x"})


@pytest.mark.parametrize("absent", [None, "", []])
def test_absent_loc_prompt_means_none(absent):
    assert EditRequest.from_dict({**REQUEST, "loc_prompt": absent}).loc_prompts == ()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"prompt": ""}, ValueError, "prompt must not be empty; got ''"),
        ({"target_new": "  "}, ValueError, "target_new must not be empty; got '  '"),
        ({"target_new": 7}, TypeError, "target_new must be a string; got 7"),
        ({"loc_prompt": 5}, TypeError, "loc_prompt must be a string or a list of strings; got 5"),
        ({"loc_prompt": {"a": 1}}, TypeError, "loc_prompt must be a string or a list"),
        ({"subject": "Spain"}, ValueError, "subject must be a part of the prompt; 'Spain' is not"),
        (
            {"prompt": "a\ud800"},
            ValueError,
            "without half surrogate pairs; it has one at character 1",
        ),
        ({"loc_prompt": ["\udfff"]}, ValueError, "loc_prompt must be text without half surrogate"),
        ({"subject": ""}, ValueError, "subject must not be empty"),
        ({"loc_prompt": ["ok", ""]}, ValueError, "loc_prompt must not be empty"),
    ],
)
def test_unusable_values_are_refused(change, error, message):
    with pytest.raises(error, match=message):
        EditRequest.from_dict({**REQUEST, **change})


def test_requests_of_another_kind_are_refused():
    with pytest.raises(TypeError, match=r"a request must be a dict .*; got str"):
        as_requests(["The capital of France is"])
    with pytest.raises(TypeError, match=r"requests must be a dict, or a list of dicts; got 5"):
        as_requests(5)
    with pytest.raises(ValueError, match=r"must have the key 'target_new'; got \['prompt'\]"):
        as_requests({"prompt": "x"})
    with pytest.raises(ValueError, match=r"got \['prompt', 'target'\]: rename 'target'"):
        as_requests({"prompt": "a", "target": "b"})
    with pytest.raises(ValueError, match="at least one request; got an empty list"):
        as_requests([])


def test_a_row_holds_the_target_after_its_space(tokenizer):
    rows = text_rows(as_requests([REQUEST, {"prompt": "A", "target_new": "bc"}]), tokenizer)
    assert [row.is_edit for row in rows] == [True, True]
    assert [row.prompt_length for row in rows] == [25, 2]  # bytes, and <s>
    for row, text in zip(rows, [" Rome", " bc"], strict=True):
        assert tokenizer.decode(row.ids[row.prompt_length :]) == text


@pytest.mark.parametrize(("last_only", "length"), [(False, 0), (True, 13)])
def test_irrelevant_prompts_follow_the_edits(tokenizer, last_only, length):
    requests = as_requests({**REQUEST, "loc_prompt": ["Water is wet", "Snow is cold"]})
    rows = text_rows(requests, tokenizer, last_only=last_only)
    assert [row.is_edit for row in rows] == [True, False, False]
    assert [row.prompt_length for row in rows] == [25, length, length]
    assert len(text_rows(requests, tokenizer, with_irrelevant=False)) == 1


def test_in_a_chat_template_irrelevant_prompts_are_learned_in_it_too():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m['content'] }}>{% endfor %}"
    requests = as_requests({**REQUEST, "loc_prompt": ["Ice", "Water is wet"]})
    options = {"prompt_format": PromptFormat(use_chat_template=True), "stand_ins": ["Fog"]}
    _, *rows = text_rows(requests, tokenizer, **options)
    shown = [tokenizer.decode(row.ids) for row in rows]
    assert shown == ["<s>Ice", "<s>Water is wet", "<Ice>", "<Water is wet>", "<Fog>"]
    assert [row.prompt_length for row in rows] == [0, 0, 5, 14, 5]
    most = len(text_rows(requests, tokenizer, with_irrelevant=False, **options)[0].ids)
    long = "w" * (most - 1)
    requests = as_requests({**REQUEST, "loc_prompt": ["Ice", long]})
    _, *rows = text_rows(requests, tokenizer, max_context=most, **options)
    shown = [tokenizer.decode(row.ids) for row in rows]
    assert shown == ["<s>Ice", f"<s>{long}", "<Ice>", "<Fog>"]


def test_the_end_of_an_answer_is_its_last_token(tokenizer):
    without, irrelevant = text_rows(as_requests({**REQUEST, "loc_prompt": "Ice"}), tokenizer)
    rows = text_rows(as_requests({**REQUEST, "loc_prompt": "Ice"}), tokenizer, with_end=True)
    assert rows[0].ids == (*without.ids, tokenizer.eos_token_id)
    assert rows[0].prompt_length == without.prompt_length
    assert rows[1] == irrelevant
    with pytest.raises(ValueError, match="must have an eos_token to learn where an answer ends"):
        text_rows(as_requests(REQUEST), SimpleNamespace(eos_token_id=None), with_end=True)


def test_subject_may_be_in_another_unicode_form():
    composed, decomposed = "Malm\u00f6", "Malmo\u0308"
    for prompt, subject in ((composed, decomposed), (decomposed, composed)):
        EditRequest(f"{prompt} is in", "Spain", subject)
    with pytest.raises(ValueError, match="subject must be a part of the prompt"):
        EditRequest("Malmo is in", "Spain", composed)


@pytest.mark.parametrize(
    ("subject", "example"), [("Malta", "The capital of Malta is"), (None, "The capital of France")]
)
def test_prompt_with_a_placeholder_for_its_subject_is_refused(subject, example):
    with pytest.raises(ValueError, match=rf"prompt must have its subject where.*{example}"):
        EditRequest("The capital of {} is", "Rome", subject)
    assert "{}" in EditRequest("In Python an empty dict is {}, or", "dict()", "Python").prompt


def test_target_that_shares_a_token_with_its_prompt_is_refused():
    def joining(text):  # a token for each two characters
        return {"input_ids": [text[i : i + 2] for i in range(0, len(text), 2)]}

    form = PromptFormat(separator="")
    with pytest.raises(ValueError, match=r"target_new must begin with a token of.*separator"):
        text_rows(as_requests({"prompt": "abc", "target_new": "def"}), joining, prompt_format=form)
    text_rows(as_requests({"prompt": "abcd", "target_new": "ef"}), joining, prompt_format=form)


def test_text_beyond_the_context_is_refused(tokenizer):
    with pytest.raises(ValueError, match="context of 20 tokens; the longest text has 30"):
        text_rows(as_requests(REQUEST), tokenizer, max_context=20)


def test_target_without_a_token_is_refused():
    def deaf(text):
        return {"input_ids": [0, *text.split()[:2]]}

    with pytest.raises(ValueError, match="target_new must have at least one token; 'Rome' adds"):
        text_rows(as_requests(REQUEST), deaf)
