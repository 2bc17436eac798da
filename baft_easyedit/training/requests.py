"""Edit requests with EasyEdit's keys: validation, and tokenisation.

A prompt and its target are tokenised as one text (see `prompt_format`); the tokens after the
prompt's own belong to the target, as EasyEdit's evaluators count them.
"""

import hashlib
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from baft_easyedit.files.messages import short
from baft_easyedit.files.reading import closest
from baft_easyedit.model.prompt_format import PromptFormat, token_ids

_PLACEHOLDER = "{}"
"""The placeholder for the subject in ROME's prompts."""
_KEYS = (
    *("prompt", "target_new", "subject", "loc_prompt"),
    *("ground_truth", "rephrase_prompt", "target_neg", "locality", "portability", "case_id"),
)
"""Keys of EasyEdit's requests: those read here, and those that only its evaluators read."""
_ARGUMENTS = {"locality_inputs": "locality", "portability_inputs": "portability"}
"""Arguments of EasyEdit's `edit`, and the request keys that it turns them into."""
_LIKENESS = 0.85
"""Likeness from which a key counts as a known key misspelt (`loc_prompts`, `promt`). Keys of
records (`locality_prompt`, `target_true`) and notes (`subject_id`) are less alike."""


@dataclass(frozen=True)
class EditRequest:
    """One fact to learn, checked.

    Attributes:
        prompt: Text that the target completes; outside a chat template, a separator (a space, in
            most scripts) at its end is not a part of it.
        target_new: The new answer; a space before it is not a part of it.
        subject: What the fact is about, a part of the prompt; None if not known.
        loc_prompts: Irrelevant texts on which the model should not change.

    Raises:
        ValueError: If a text is blank or holds half a surrogate pair, the subject is not a part of
            the prompt, or the prompt has a placeholder in its place.
        TypeError: If a value is not text.
    """

    prompt: str
    target_new: str
    subject: str | None = None
    loc_prompts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for key, text in (("prompt", self.prompt), ("target_new", self.target_new)):
            _check_text(key, text)
        for text in self.loc_prompts:
            _check_text("loc_prompt", text)
        if self.subject is not None:
            _check_text("subject", self.subject)
        has_subject = self.subject is not None and same_form(self.subject) in same_form(self.prompt)
        if _PLACEHOLDER in self.prompt and not has_subject:
            filled = self.prompt.replace(_PLACEHOLDER, self.subject or "France")
            raise ValueError(
                f"prompt must have its subject where {short(self.prompt)} has {{}}: write, for "
                f"example, {short(filled)} (if {{}} is meant, give as subject a part of the prompt)"
            )
        if self.subject is not None and not has_subject:
            raise ValueError(
                f"subject must be a part of the prompt; {short(self.subject)} is not in "
                f"{short(self.prompt)}"
            )

    @classmethod
    def from_dict(cls, request: Mapping[str, Any]) -> "EditRequest":
        """Read one of EasyEdit's request dicts.

        Keys that only the evaluators read are ignored, and unknown keys too, unless they look like
        a misspelt known key.

        Raises:
            TypeError: If `request` is not a mapping, or a value has the wrong type.
            ValueError: If `prompt` or `target_new` is missing, a key is misspelt, or a value breaks
                a rule above.
        """
        if not isinstance(request, Mapping):
            raise TypeError(
                "a request must be a dict with the keys prompt and target_new; got "
                f"{type(request).__name__}"
            )
        _check_keys([key for key in request if isinstance(key, str)])
        irrelevant = request.get("loc_prompt") or ()
        if not isinstance(irrelevant, (str, list, tuple)):
            raise TypeError(
                f"loc_prompt must be a string or a list of strings; got {short(irrelevant)}"
            )
        return cls(
            prompt=request["prompt"],
            target_new=request["target_new"],
            subject=request.get("subject"),
            loc_prompts=(irrelevant,) if isinstance(irrelevant, str) else tuple(irrelevant),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the request as EasyEdit's dict, for `from_dict`; JSON values only."""
        content: dict[str, Any] = {"prompt": self.prompt, "target_new": self.target_new}
        if self.subject is not None:
            content["subject"] = self.subject
        if self.loc_prompts:
            content["loc_prompt"] = list(self.loc_prompts)
        return content


def same_form(text: str) -> str:
    """Return a text in Unicode's composed form, so that letters with accents can be compared."""
    return unicodedata.normalize("NFC", text)


def _check_keys(keys: Sequence[str]) -> None:
    """Raise ValueError if a key is a misspelt known one, or a required key is missing."""
    for key in keys:
        meant = _ARGUMENTS.get(key) or closest(key, _KEYS, _LIKENESS)
        if key not in _KEYS and meant is not None:
            raise ValueError(f"a request must have the key {meant!r}, not {short(key)}")
    for needed in ("prompt", "target_new"):
        if needed not in keys:
            hint = ": rename 'target'" if needed == "target_new" and "target" in keys else ""
            got = short(sorted(keys))
            raise ValueError(f"a request must have the key {needed!r}; got {got}{hint}")


def _check_text(key: str, text: object) -> None:
    """Raise unless `text` is a string that is not blank and can be encoded."""
    if not isinstance(text, str):
        raise TypeError(f"{key} must be a string; got {short(text)}")
    if not text.strip():
        raise ValueError(f"{key} must not be empty; got {short(text)}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{key} must be text without half surrogate pairs; it has one at character "
            f"{error.start}: {short(text[error.start])}"
        ) from None


def as_requests(requests: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> list[EditRequest]:
    """Read one request dict or a list of them.

    Raises:
        ValueError: If the list is empty or a request breaks a rule of `EditRequest`.
        TypeError: If there is neither a list nor a dict, or a request is not a dict of strings.
    """
    if not isinstance(requests, Iterable):
        raise TypeError(f"requests must be a dict, or a list of dicts; got {short(requests)}")
    dicts = [requests] if isinstance(requests, Mapping) else list(requests)
    if not dicts:
        raise ValueError("requests must hold at least one request; got an empty list")
    return [EditRequest.from_dict(request) for request in dicts]


@dataclass(frozen=True)
class TextRow:
    """One tokenised text: an edit, or an irrelevant prompt."""

    ids: tuple[int, ...]
    """The tokens of the text, special tokens included."""
    prompt_length: int
    """Number of tokens before the answer. An irrelevant prompt has no answer, but the intervention
    treats its tokens from here on as one: it acts on them, and on the P tokens before."""
    is_edit: bool
    """True if the answer is learned, False for an irrelevant prompt."""
    siblings: tuple[tuple[int, ...], ...] = field(default=(), compare=False)
    """The tokens of prompts of an edit's form about other subjects."""

    def hashes(self) -> list[int]:
        """Return a hash of the tokens up to each token, in [1, 2^63), the same in all processes."""
        digest, hashes = hashlib.blake2b(digest_size=8), []
        for token in self.ids:
            digest.update(token.to_bytes(4, "little"))
            hashes.append(int.from_bytes(digest.digest(), "little") >> 1 or 1)
        return hashes


def text_rows(
    requests: Sequence[EditRequest],
    tokenizer: Any,
    *,
    max_context: int | None = None,
    prompt_format: PromptFormat | None = None,
    with_irrelevant: bool = True,
    last_only: bool = False,
    with_end: bool = False,
    stand_ins: Sequence[str] = (),
    siblings: Sequence[Sequence[str]] = (),
) -> list[TextRow]:
    """Tokenise requests, in their order, and then their irrelevant prompts.

    Args:
        requests: The edits.
        tokenizer: Their model's tokenizer.
        max_context: Longest input of the model, in tokens; None for no limit.
        prompt_format: Format of the prompts; None for plain texts. In a chat template, irrelevant
            prompts are learned twice: as plain texts, as EasyEdit's evaluators ask them, and in
            the template, where the edit will be used; there only the last P tokens count.
        with_irrelevant: Add the irrelevant prompts.
        last_only: Of an irrelevant prompt, let only the last P tokens count, not all.
        with_end: Append the tokenizer's end-of-sequence token to each target.
        stand_ins: Irrelevant prompts in the format of the prompts (see the module `stand_ins`);
            like irrelevant prompts in the template, those longer than `max_context` are left out.
        siblings: Prompts of the form of each request about other subjects, for `TextRow.siblings`;
            none where one is longer than `max_context`.

    Raises:
        ValueError: If a target has no token of its own or shares one with its prompt, a prompt has
            two targets, a text is longer than `max_context`, or the tokenizer has no
            end-of-sequence token.
    """
    end = _end(tokenizer) if with_end else ()
    form = prompt_format or PromptFormat()
    rows = [_edit_row(request, tokenizer, form, end) for request in requests]
    _check_agree(requests, rows)
    for i, prompts in enumerate(siblings):
        found = tuple(form.prompt_ids(prompt, tokenizer) for prompt in prompts)
        if max_context is None or all(len(ids) <= max_context for ids in found):
            rows[i] = replace(rows[i], siblings=found)
    if with_irrelevant:
        texts = [text for request in requests for text in request.loc_prompts]
        plain = [token_ids(text, tokenizer) for text in texts]
        framed = [*texts, *stand_ins] if form.use_chat_template else stand_ins
        others = [form.prompt_ids(prompt, tokenizer) for prompt in framed]
        others = [one for one in others if max_context is None or len(one) <= max_context]
        ends = last_only or form.use_chat_template  # before them is the template's beginning
        rows += [TextRow(one, len(one) if last_only else 0, is_edit=False) for one in plain]
        rows += [TextRow(one, len(one) if ends else 0, is_edit=False) for one in others]
    longest = max(len(row.ids) for row in rows)
    if max_context is not None and longest > max_context:
        raise ValueError(
            f"prompt and target must fit the model's context of {max_context} tokens; the longest "
            f"text has {longest}"
        )
    return rows


def _check_agree(requests: Sequence[EditRequest], rows: Sequence[TextRow]) -> None:
    """Raise ValueError if two requests ask for different answers to one prompt."""
    answers: dict[tuple[int, ...], tuple[TextRow, EditRequest]] = {}
    for request, row in zip(requests, rows, strict=True):
        other, first = answers.setdefault(row.ids[: row.prompt_length], (row, request))
        if other.ids != row.ids:
            raise ValueError(
                "requests learned together must not give one prompt two targets; "
                f"{short(request.prompt)} has {short(first.target_new)} and "
                f"{short(request.target_new)}: keep one"
            )


def _end(tokenizer: Any) -> tuple[int]:
    """Return the token that ends an answer."""
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "tokenizer must have an eos_token to learn where an answer ends; got None: set one, or "
            "learn_end to false"
        )
    return (tokenizer.eos_token_id,)


def _edit_row(
    request: EditRequest, tokenizer: Any, form: PromptFormat, end: tuple[int, ...]
) -> TextRow:
    """Tokenise a prompt and its target, and append the token that ends the answer, if any."""
    prompt, target = request.prompt, request.target_new
    ids = form.whole_ids(prompt, target, tokenizer)
    before = form.prompt_ids(prompt, tokenizer)
    if len(ids) <= len(before):
        raise ValueError(
            f"target_new must have at least one token; {short(target)} adds none to {short(prompt)}"
        )
    if ids[: len(before)] != before:
        raise ValueError(
            f"target_new must begin with a token of its own; the tokenizer joins the end of "
            f"{short(prompt)} with {short(target)}: let the prompt end in a whole word, without "
            "spaces, or set separator in the hyper-parameters to what stands between them"
        )
    return TextRow(ids + end, len(before), is_edit=True)
