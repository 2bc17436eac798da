"""Edit requests with EasyEdit's keys: validation, and tokenisation into a batch.

A target's tokens are those of `prompt + " " + target_new` after the prompt's own, which is how
EasyEdit's evaluators count them. Shapes: B rows, T columns.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from baft_easyedit.positions import IGNORED_LABEL


@dataclass(frozen=True)
class EditRequest:
    """One fact to write, checked.

    Attributes:
        prompt: Text that the target completes.
        target_new: The new answer, without a leading space.
        subject: What the fact is about, a part of the prompt; None if not known.
        loc_prompts: Irrelevant texts on which the model should not change.

    Raises:
        ValueError: If the prompt or the target is empty, the subject is not a part of the prompt,
            or an irrelevant text is empty.
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
            if self.subject not in self.prompt:
                raise ValueError(
                    f"subject must be a part of the prompt; {self.subject!r} is not in "
                    f"{self.prompt!r}"
                )

    @classmethod
    def from_dict(cls, request: Mapping[str, Any]) -> "EditRequest":
        """Read one of EasyEdit's request dicts; keys that only the evaluators read are ignored.

        Raises:
            TypeError: If `request` is not a mapping, or a value has the wrong type.
            ValueError: If `prompt` or `target_new` is missing, or a value breaks a rule above.
        """
        if not isinstance(request, Mapping):
            raise TypeError(
                "a request must be a dict with the keys prompt and target_new; got "
                f"{type(request).__name__}"
            )
        for key in ("prompt", "target_new"):
            if key not in request:
                raise ValueError(f"a request must have the key {key!r}; got {sorted(request)}")
        irrelevant = request.get("loc_prompt") or ()
        if not isinstance(irrelevant, (str, list, tuple)):
            raise TypeError(f"loc_prompt must be a string or a list of strings; got {irrelevant!r}")
        return cls(
            prompt=request["prompt"],
            target_new=request["target_new"],
            subject=request.get("subject"),
            loc_prompts=(irrelevant,) if isinstance(irrelevant, str) else tuple(irrelevant),
        )


def _check_text(key: str, text: object) -> None:
    """Raise unless `text` is a string with something in it."""
    if not isinstance(text, str):
        raise TypeError(f"{key} must be a string; got {text!r}")
    if not text.strip():
        raise ValueError(f"{key} must not be empty; got {text!r}")


def as_requests(requests: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> list[EditRequest]:
    """Read one request dict or a list of them.

    Raises:
        ValueError: If the list is empty or a request breaks a rule of `EditRequest`.
        TypeError: If a request is not a dict of strings.
    """
    dicts = [requests] if isinstance(requests, Mapping) else list(requests)
    if not dicts:
        raise ValueError("requests must hold at least one request; got an empty list")
    return [EditRequest.from_dict(request) for request in dicts]


@dataclass(frozen=True)
class EditBatch:
    """Tokenised requests, padded on the left; the irrelevant prompts follow the edits as rows.

    Joined batches (`join_batches`) follow each other whole.
    """

    input_ids: Tensor
    """[B, T], int64."""
    attention_mask: Tensor
    """[B, T], int64, 1 for real tokens."""
    position_ids: Tensor
    """[B, T], int64, counted over real tokens."""
    labels: Tensor
    """[B, T], int64, the answer tokens; -100 elsewhere."""
    prompt_lengths: Tensor
    """[B], real tokens before the answer."""
    num_edits: int
    """Rows that are edits, of each of the joined batches; the others are irrelevant prompts."""

    @property
    def max_answer_length(self) -> int:
        """Longest answer of the batch, in tokens."""
        return int((self.labels != IGNORED_LABEL).sum(-1).max())


def build_batch(
    requests: Sequence[EditRequest],
    tokenizer: Any,
    *,
    max_context: int | None = None,
    use_chat_template: bool = False,
    with_irrelevant: bool = True,
    loc_positions: int | None = None,
    device: torch.device | str = "cpu",
) -> EditBatch:
    """Tokenise requests, and their irrelevant prompts, into one batch.

    Args:
        requests: The edits.
        tokenizer: Their model's tokenizer.
        max_context: Longest input of the model, in tokens; None for no limit.
        use_chat_template: Put prompts into the tokenizer's chat template, as EasyEdit does when its
            hyper-parameter of that name is set. Irrelevant prompts are left as they are.
        with_irrelevant: Add the irrelevant prompts as rows.
        loc_positions: How many of the last tokens of an irrelevant prompt count as its answer, so
            that the intervention applies to them too; None for all.
        device: Where the tensors go.

    Raises:
        ValueError: If a target has no token of its own, or a text is longer than `max_context`.
    """
    rows, lengths = [], []
    for request in requests:
        prompt = format_prompt(request.prompt, tokenizer, use_chat_template)
        ids = _token_ids(tokenizer, prompt + " " + request.target_new)
        length = len(_token_ids(tokenizer, prompt))
        if len(ids) <= length:
            raise ValueError(
                f"target_new must have at least one token; {request.target_new!r} adds none to "
                f"{prompt!r}"
            )
        rows.append(ids)
        lengths.append(length)
    irrelevant = [text for request in requests for text in request.loc_prompts]
    for text in irrelevant if with_irrelevant else []:
        ids = _token_ids(tokenizer, text)
        rows.append(ids)
        lengths.append(0 if loc_positions is None else max(0, len(ids) - loc_positions))
    if max_context is not None and max(map(len, rows)) > max_context:
        raise ValueError(
            f"prompt and target must fit the model's context of {max_context} tokens; the longest "
            f"text has {max(map(len, rows))}"
        )
    return _pad_left(rows, lengths, len(requests), tokenizer.pad_token_id or 0, device)


def format_prompt(prompt: str, tokenizer: Any, use_chat_template: bool) -> str:
    """Return the prompt as the evaluators will show it to the model."""
    if not use_chat_template:
        return prompt
    message = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)


def _token_ids(tokenizer: Any, text: str) -> list[int]:
    """Return the token ids of a text, special tokens included."""
    return list(tokenizer(text)["input_ids"])


def join_batches(batches: Sequence[EditBatch]) -> EditBatch:
    """Put batches of as many edits and rows below each other, padded on the left to one width."""
    width = max(batch.input_ids.shape[1] for batch in batches)

    def joined(name: str, padding: int = 0) -> Tensor:
        columns = [getattr(batch, name) for batch in batches]
        return torch.cat([F.pad(c, (width - c.shape[1], 0), value=padding) for c in columns])

    return EditBatch(
        input_ids=joined("input_ids"),
        attention_mask=joined("attention_mask"),
        position_ids=joined("position_ids"),
        labels=joined("labels", IGNORED_LABEL),
        prompt_lengths=torch.cat([batch.prompt_lengths for batch in batches]),
        num_edits=batches[0].num_edits,
    )


def _pad_left(
    rows: list[list[int]],
    prompt_lengths: list[int],
    num_edits: int,
    pad_id: int,
    device: torch.device | str,
) -> EditBatch:
    """Pad token rows on the left; only the first `num_edits` rows get labels."""
    width = max(map(len, rows))
    input_ids = torch.full((len(rows), width), pad_id)
    attention_mask = torch.zeros(len(rows), width, dtype=torch.long)
    labels = torch.full((len(rows), width), IGNORED_LABEL)
    for i, (ids, length) in enumerate(zip(rows, prompt_lengths, strict=True)):
        input_ids[i, width - len(ids) :] = torch.tensor(ids)
        attention_mask[i, width - len(ids) :] = 1
        if i < num_edits:
            labels[i, width - len(ids) + length :] = torch.tensor(ids[length:])
    return EditBatch(
        input_ids=input_ids.to(device),
        attention_mask=attention_mask.to(device),
        position_ids=(attention_mask.cumsum(-1) - 1).clamp(min=0).to(device),
        labels=labels.to(device),
        prompt_lengths=torch.tensor(prompt_lengths).to(device),
        num_edits=num_edits,
    )
