"""A tokenizer that gives EasyEdit's evaluators the tokens that edits are learned on.

The evaluators tokenise `prompt` and `prompt + " " + target` themselves, and so put a second
beginning-of-sequence token before a chat template, the tokenizer's end-of-sequence token, if it
adds one, between prompt and answer, and a space into scripts written without spaces.
`LearnedTokens` wraps the tokenizer, recognises these texts, and gives them the tokens of
`PromptFormat`, as in training. A text with none of these faults keeps the tokenizer's own tokens.
"""

from collections.abc import Sequence
from typing import Any

from baft_easyedit.model.batching import padded
from baft_easyedit.model.prompt_format import PromptFormat, token_ids

_RELEASES_END = " <|endoftext|>"
"""Text that EasyEdit's release appends to texts whose perplexity it measures."""


def as_list(value: Any) -> list[Any]:
    """Return one text, or several, as a list."""
    return [value] if isinstance(value, str) else list(value)


class LearnedTokens:
    """Wraps a tokenizer, with the interface that EasyEdit's evaluators use."""

    def __init__(self, tok: Any, prompt_format: PromptFormat) -> None:
        while isinstance(tok, LearnedTokens):
            tok = tok._tok
        end = prompt_format.template_end(tok) if prompt_format.use_chat_template else ""
        self.__dict__.update(  # assigned attributes go to the tokenizer (`__setattr__`)
            _tok=tok,
            _format=prompt_format,
            _texts={},
            _templated=set(),
            _template_end="" if prompt_format.separator_after("") else end,
        )

    def expect(self, prompts: Sequence[str], targets: Sequence[str]) -> list[int]:
        """Register prompts and targets to be scored; return the prompts' lengths in tokens."""
        prompt_format, tok, lengths = self._format, self._tok, []
        for prompt, target in zip(prompts, targets, strict=True):
            shown = prompt_format.prompt_text(prompt, tok)
            as_easyedit_has_it = shown if prompt_format.use_chat_template else prompt
            self._texts[as_easyedit_has_it] = shown
            whole = prompt_format.whole_text(prompt, target, tok)
            for end in ("", _RELEASES_END):
                self._texts[f"{as_easyedit_has_it} {target}{end}"] = whole + end
            if prompt_format.use_chat_template:
                self._templated.add(shown)
            lengths.append(len(prompt_format.prompt_ids(prompt, tok)))
        return lengths

    def expect_answers(self, answers: Sequence[str]) -> None:
        """Register answers that will be tokenised alone; in a template they lose their space."""
        spaced = [f" {answer.removeprefix(' ')}" for answer in answers]
        self._texts.update({text: text[1:] for text in spaced if self._template_end})

    def ids(self, text: str) -> tuple[int, ...]:
        """Return the token ids of a text, those that edits are learned on."""
        is_templated = text.startswith(tuple(self._templated))
        known = self._texts.get(text)
        if known is None:
            known = self._behind_template(text)
        return token_ids(known, self._tok, is_templated=is_templated)

    def _behind_template(self, text: str) -> str:
        """Return a text without the space that EasyEdit puts between a template and an answer."""
        end = self._template_end
        template, found, answer = text.rpartition(f"{end} ") if end else ("", "", "")
        return f"{template}{end}{answer.removeprefix(' ')}" if found else text

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any:
        """Apply the chat template with the format's arguments, and remember the resulting texts."""
        options = {**(self._format.chat_template_kwargs or {}), **options}
        shown = self._tok.apply_chat_template(conversation, **options)
        if options.get("tokenize") is False:
            self._templated.update([shown] if isinstance(shown, str) else shown)
        return shown

    def encode(self, text: str, **options: Any) -> Any:
        """Return the token ids of a text; a call with options is passed on to the tokenizer."""
        return self._tok.encode(text, **options) if options else list(self.ids(text))

    def __call__(self, text: Any, **options: Any) -> Any:
        """Tokenise one text or several; calls with `add_special_tokens` go to the tokenizer."""
        if "add_special_tokens" in options or not isinstance(text, (str, list, tuple)):
            return self._tok(text, **options)
        from transformers import BatchEncoding

        texts = [text] if isinstance(text, str) else list(text)
        limit = options.get("max_length") or self._tok.model_max_length
        rows = [self.ids(t)[: limit if options.get("truncation") else None] for t in texts]
        if options.get("return_tensors") == "pt":
            return BatchEncoding(padded(rows, self._tok, self._tok.padding_side))
        plain = [list(row) for row in rows]
        return BatchEncoding({"input_ids": plain[0] if isinstance(text, str) else plain})

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tok, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._tok, name, value)

    def __len__(self) -> int:
        return len(self._tok)
