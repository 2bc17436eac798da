"""One text of prompt and answer, and its tokens, for learning, asking and scoring."""

from types import SimpleNamespace

import pytest
from tokenizers import processors

from baft_easyedit import BaFTHyperParams
from baft_easyedit.model.prompt_format import PromptFormat, token_ids
from tests.conftest import make_tokenizer

CHAT = "<s>{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<{{ mood }}>"


@pytest.fixture
def own_tokenizer():
    """A tokenizer that a test may change."""
    return make_tokenizer()


def ending(tokenizer, single):
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[("<s>", 256), ("</s>", 257)]
    )
    return tokenizer


@pytest.mark.parametrize(
    ("prompt", "answer", "separator", "text"),
    [
        ("Ice is", "hot", None, "Ice is hot"),
        ("Ice is ", "hot", None, "Ice is hot"),
        ("Ice is", " hot", None, "Ice is hot"),
        ("Ice is ", " hot", None, "Ice is hot"),
        ("Ice is  ", "hot", None, "Ice is  hot"),
        ("\u4e2d\u56fd\u7684\u9996\u90fd\u662f", "\u7ebd\u7ea6", None, None),
        ("\u9996\u90fd\u662f\u54ea\u91cc\uff1f", "\u7ebd\u7ea6", None, None),
        ("\u3053\u308c\u306f", "\u6c34", None, None),
        ("\u0e40\u0e21\u0e37\u0e2d\u0e07", "\u0e01", None, None),
        ("\ud55c\uad6d", "\uc218\ub3c4", None, "\ud55c\uad6d \uc218\ub3c4"),  # Korean has spaces
        ("The capital of \u4e2d\u56fd is", "Rome", None, "The capital of \u4e2d\u56fd is Rome"),
        ("1 + 1 =", "3", None, "1 + 1 = 3"),
        ("\u4e2d\u56fd\u7684", "b", " ", "\u4e2d\u56fd\u7684 b"),
        ("Q: ", "b", "", "Q: b"),
        ("Q:\n", "b", "\n", "Q:\nb"),
    ],
)
def test_one_separator_stands_between_prompt_and_answer(prompt, answer, separator, text, tokenizer):
    form = PromptFormat(separator=separator)
    assert form.whole_text(prompt, answer, tokenizer) == (text or prompt + answer)
    whole, before = form.whole_ids(prompt, answer, tokenizer), form.prompt_ids(prompt, tokenizer)
    assert whole[: len(before)] == before


@pytest.mark.parametrize(
    ("single", "expected"),
    [("<s> $A </s>", "<s>a b"), ("$A </s>", "a b"), ("$A", "a b"), ("<s> <s> $A </s> </s>", 2)],
)
def test_what_a_tokenizer_puts_behind_a_text_is_left_out(own_tokenizer, single, expected):
    expected = "<s><s>a b" if expected == 2 else expected
    tokenizer = ending(own_tokenizer, single)
    assert tokenizer.decode(token_ids("a b", tokenizer)) == expected
    assert tokenizer.decode(PromptFormat().whole_ids("a", "b", tokenizer)) == expected


def test_chat_template_brings_its_own_special_tokens_and_is_given_what_is_set(own_tokenizer):
    own_tokenizer.chat_template = CHAT
    form = PromptFormat(True, {"mood": "glad"})
    ids = form.whole_ids("Hi ", "you", own_tokenizer)
    assert own_tokenizer.decode(ids) == "<s><user>Hi <glad>you"
    templated = own_tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi "}], add_generation_prompt=True, mood="glad"
    )
    templated = getattr(templated, "input_ids", templated)  # transformers 5 returns a dict
    assert form.prompt_ids("Hi ", own_tokenizer) == tuple(templated)
    plain = form.without_template()
    assert own_tokenizer.decode(plain.prompt_ids("Hi", own_tokenizer)) == "<s>Hi"


def test_format_is_that_of_the_hyper_parameters():
    ours = BaFTHyperParams("x", [1], use_chat_template=True, chat_template_kwargs={"a": 1})
    assert PromptFormat.of(ours) == PromptFormat(True, {"a": 1}, None)
    assert PromptFormat.of(SimpleNamespace(max_length=40)) == PromptFormat(separator=" ")


@pytest.mark.parametrize("answer", ["2006", " 2006"])
def test_nothing_stands_between_a_template_and_an_answer(own_tokenizer, answer):
    own_tokenizer.chat_template = CHAT
    form = PromptFormat(use_chat_template=True, chat_template_kwargs={"mood": "!"})
    assert form.whole_text("When?", answer, own_tokenizer) == "<s><user>When?<!>2006"
    assert form.template_end(own_tokenizer) == "<!>"
    assert PromptFormat().template_end(own_tokenizer) == ""
    spaced = PromptFormat(True, {"mood": "!"}, " ")
    assert spaced.whole_text("When?", answer, own_tokenizer) == "<s><user>When?<!> 2006"


def test_frames_are_what_the_template_puts_around_prompts(own_tokenizer):
    assert PromptFormat().frames(own_tokenizer) == ()
    own_tokenizer.chat_template = CHAT
    form = PromptFormat(True, {"mood": "!"})
    first, *others = form.frames(own_tokenizer)
    assert len(others) == 3
    assert first[0] + token_ids("When?", own_tokenizer, is_templated=True) + first[1] == (
        form.prompt_ids("When?", own_tokenizer)
    )
    assert own_tokenizer.decode(others[0][0]).startswith("<s><system>You are a helpful")
    assert all(behind == first[1] for _, behind in others)


@pytest.mark.parametrize(
    "system",
    ["{{ raise_exception('no system message') }}", "{{ 1 + 'a' }}", ""],
    ids=["refused", "failing", "left out"],
)
def test_a_template_without_system_messages_has_one_frame(own_tokenizer, system):
    messages = "{% if m['role'] == 'system' %}" + system + "{% else %}{{ m['content'] }}{% endif %}"
    own_tokenizer.chat_template = "{% for m in messages %}" + messages + "{% endfor %}!"
    ((before, behind),) = PromptFormat(use_chat_template=True).frames(own_tokenizer)
    assert (before, own_tokenizer.decode(behind)) == ((), "!")


def test_frames_have_the_tokens_of_real_prompts_where_words_begin_with_a_mark(own_tokenizer):
    """As those of SentencePiece, which mark the first word of what is tokenised alone."""
    own_tokenizer.chat_template = "[{% for m in messages %}{{ m['content'] }}{% endfor %} ]"

    def marking(text, **_):
        return {"input_ids": [256, *map(ord, text)]}

    tokenizer = type("Marking", (), {"__call__": staticmethod(marking)})()
    tokenizer.apply_chat_template = own_tokenizer.apply_chat_template
    frame, *_ = PromptFormat(use_chat_template=True).frames(tokenizer)
    assert frame == ((256, ord("[")), (ord(" "), ord("]")))


def test_a_tokenizer_without_a_chat_template_is_refused(own_tokenizer):
    own_tokenizer.chat_template = None
    with pytest.raises(
        ValueError, match="use_chat_template must be false, as the tokenizer has no"
    ):
        PromptFormat(use_chat_template=True).prompt_ids("who", own_tokenizer)
    assert PromptFormat().prompt_ids("who", own_tokenizer)
