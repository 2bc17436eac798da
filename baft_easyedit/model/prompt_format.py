"""Join a prompt and its answer into one text, and tokenise that text.

Training, generation and scoring all use this module, so that they agree on the tokens. Special
tokens that the tokenizer puts before a text are kept; those that it puts behind are left out, as an
end-of-sequence token would stand between a prompt and its answer. A chat template brings its own
special tokens.
"""

import unicodedata
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

_UNSPACED_SCRIPTS = (
    "CJK", "IDEOGRAPHIC", "HIRAGANA", "KATAKANA", "BOPOMOFO", "YI", "THAI", "LAO", "KHMER",
    "MYANMAR",
)  # fmt: skip
"""First words of the Unicode names of letters in scripts that put no spaces between words."""

Frame = tuple[tuple[int, ...], tuple[int, ...]]
"""The tokens that a chat template puts before and behind a prompt."""

_SYSTEM_MESSAGES = (
    "You are a helpful assistant.",
    "Answer the question in a few words.",
    "You are an expert. Think before you answer, and explain your answer.",
)
"""Those of the frames in which a model's own texts are written."""


@dataclass(frozen=True)
class PromptFormat:
    """The text of prompts as a model sees them. The fields are those of `BaFTHyperParams`."""

    use_chat_template: bool = False
    """Put prompts into the tokenizer's chat template, as the user's message."""
    chat_template_kwargs: Mapping[str, Any] | None = None
    """Further arguments of the template."""
    separator: str | None = None
    """The text between prompt and answer. None stands for a space, but for nothing after a prompt
    in a script without spaces, and after a chat template, where answers begin without a space."""

    @classmethod
    def of(cls, hparams: Any) -> "PromptFormat":
        """Return the format that hyper-parameters set.

        Args:
            hparams: Hyper-parameters of any method of EasyEdit; without a `separator` of their own
                they get a space, as EasyEdit's methods do.
        """
        in_template = bool(getattr(hparams, "use_chat_template", False))
        return cls(
            use_chat_template=in_template,
            chat_template_kwargs=getattr(hparams, "chat_template_kwargs", None),
            separator=getattr(hparams, "separator", None if in_template else " "),
        )

    def with_template(self, is_wanted: bool | None) -> "PromptFormat":
        """Return a format with or without the chat template; None for this one as it is."""
        if is_wanted in (None, self.use_chat_template):
            return self
        return PromptFormat(use_chat_template=bool(is_wanted))

    def without_template(self) -> "PromptFormat":
        """Return this format without the chat template, as locality probes need it."""
        return PromptFormat(separator=self.separator)

    def separator_after(self, prompt: str) -> str:
        """Return the text between a prompt (without its template) and its answer."""
        if self.separator is not None:
            return self.separator
        if self.use_chat_template:
            return ""
        last = next((c for c in reversed(prompt) if c.isalpha()), " ")
        return "" if is_unspaced(last) else " "

    def prompt_text(self, prompt: str, tokenizer: Any, system: str | None = None) -> str:
        """Return the text of a prompt as the model sees it, without a separator at its end.

        Args:
            prompt: The prompt.
            tokenizer: The model's tokenizer.
            system: A system message for the chat template; None for the template's own, if any.

        Raises:
            ValueError: If there is no chat template.
        """
        if not self.use_chat_template:
            return prompt.removesuffix(self.separator_after(prompt))
        if getattr(tokenizer, "chat_template", "") is None:
            raise ValueError(
                "use_chat_template must be false, as the tokenizer has no chat_template: set it to "
                "false, or give the tokenizer the template of its model"
            )
        given = [] if system is None else [{"role": "system", "content": system}]
        shown: str = tokenizer.apply_chat_template(
            [*given, {"role": "user", "content": prompt}],
            add_generation_prompt=True,
            tokenize=False,
            **(self.chat_template_kwargs or {}),
        )
        return shown

    def whole_text(self, prompt: str, answer: str, tokenizer: Any) -> str:
        """Return a prompt and its answer with one separator between them."""
        separator = self.separator_after(prompt)
        given = separator or (" " if self.use_chat_template else "")  # some answers begin with one
        return self.prompt_text(prompt, tokenizer) + separator + answer.removeprefix(given)

    def template_end(self, tokenizer: Any) -> str:
        """Return the text that the chat template puts behind every prompt; empty without one."""
        return self.prompt_text("@@", tokenizer).rpartition("@@")[2]

    def frames(self, tokenizer: Any) -> tuple[Frame, ...]:
        """Return the chat template's frames: its own, and those with system messages if it can."""
        if not self.use_chat_template:
            return ()
        found = [self._frame(tokenizer, None)]
        for system in _SYSTEM_MESSAGES:
            with suppress(Exception):  # each template refuses system messages in its own way
                found.append(self._frame(tokenizer, system))
        return tuple(dict.fromkeys(found))

    def _frame(self, tokenizer: Any, system: str | None) -> Frame:
        """Return the tokens that two prompts have in common at their beginning and end."""
        shown = [self.prompt_text(prompt, tokenizer, system) for prompt in ("who", "Name a city")]
        one, other = (token_ids(text, tokenizer, is_templated=True) for text in shown)
        before = _shared(one, other)
        behind = _shared(one[len(before) :][::-1], other[len(before) :][::-1])
        return before, behind[::-1]

    def prompt_ids(self, prompt: str, tokenizer: Any) -> tuple[int, ...]:
        """Return the tokens of a prompt without its answer."""
        text = self.prompt_text(prompt, tokenizer)
        return token_ids(text, tokenizer, is_templated=self.use_chat_template)

    def whole_ids(self, prompt: str, answer: str, tokenizer: Any) -> tuple[int, ...]:
        """Return the tokens of a prompt and its answer."""
        text = self.whole_text(prompt, answer, tokenizer)
        return token_ids(text, tokenizer, is_templated=self.use_chat_template)


def is_unspaced(character: str) -> bool:
    """Tell whether a character is of a script that puts no spaces between words."""
    return unicodedata.name(character, "").startswith(_UNSPACED_SCRIPTS)


def _shared(one: tuple[int, ...], other: tuple[int, ...]) -> tuple[int, ...]:
    """Return the tokens with which both begin."""
    pairs = takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    return tuple(token for token, _ in pairs)


def token_ids(text: str, tokenizer: Any, *, is_templated: bool = False) -> tuple[int, ...]:
    """Return the tokens of a text.

    Args:
        text: The text.
        tokenizer: A tokenizer of transformers.
        is_templated: Whether the text contains its special tokens already.
    """
    if is_templated:
        return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    ids = tokenizer(text)["input_ids"]
    return tuple(ids[: len(ids) - _num_behind(tokenizer)])


def _num_behind(tokenizer: Any) -> int:
    """Count the special tokens that a tokenizer puts behind every text."""
    of_nothing, of_letter = (tokenizer(text)["input_ids"] for text in ("", "a"))
    pairs = zip(reversed(of_nothing), reversed(of_letter), strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), len(of_nothing))
