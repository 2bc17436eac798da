"""PIQA, to see what editing did to a model: questions of everyday physics with two solutions.

(Liu et al. 2025, Table 8.) The model chooses the solution of lower perplexity. Shapes: B texts, T
tokens, V vocabulary.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from baft_easyedit.bench.data.case import Layout, Text
from baft_easyedit.bench.data.files import FileHash, find_file, read_file, select
from baft_easyedit.bench.validation import validated
from baft_easyedit.files.messages import short
from baft_easyedit.files.reading import parse_json
from baft_easyedit.model.batching import padded
from baft_easyedit.model.hooks import attached_edit
from baft_easyedit.model.prompt_format import PromptFormat

_BATCH = 32


class PiqaItem(Layout):
    """A goal and two ways to reach it."""

    goal: Text
    sol1: Text
    sol2: Text
    label: Literal[0, 1]
    """0 if `sol1` is right, 1 if `sol2` is."""


def load_piqa(path: str | Path, limit: int | None = None) -> tuple[list[PiqaItem], list[FileHash]]:
    """Read PIQA's questions, and what identifies their files.

    Args:
        path: The directory of valid.jsonl and valid-labels.lst, or a `<name>.jsonl` with its
            `<name>-labels.lst` beside it.
        limit: Number of items, from the first on; all if None.

    Raises:
        ValueError: If a line is not JSON, breaks a rule, or has no label, or there are fewer items
            than `limit`.
        TypeError: If a line is not a JSON object.
        FileNotFoundError: If a file is missing.
    """
    questions_file = find_file(Path(path), "valid.jsonl")
    labels_file = find_file(questions_file.with_name(f"{questions_file.stem}-labels.lst"))
    # Only a line feed ends a line, for JSON may hold other separators.
    (questions, labels), hashes = zip(*map(read_file, (questions_file, labels_file)), strict=True)
    lines, marks = questions.rstrip().split(b"\n"), labels.rstrip().split(b"\n")
    if len(lines) != len(marks):
        raise ValueError(
            f"{labels_file.name} must have a label for each of the {len(lines)} lines of "
            f"{questions_file.name}; got {len(marks)}"
        )
    items = []
    for i, (line, mark) in enumerate(zip(lines, marks, strict=True)):
        place = f"{questions_file.name}, record {i}"
        record = parse_json(line, place)
        if not isinstance(record, dict):
            raise TypeError(
                f"{place} must be an object with goal, sol1 and sol2; got {short(record)}"
            )
        label = {b"0": 0, b"1": 1}.get(mark.strip(), mark)
        items.append(validated(PiqaItem, {**record, "label": label}, place))
    return select(items, 0, limit, "piqa"), list(hashes)


@torch.no_grad()
def piqa_accuracy(model: Any, tok: Any, items: Sequence[PiqaItem]) -> float:
    """Return how often a model finds the right solution of a goal the less surprising one.

    Args:
        model: A causal language model, edited or not, that takes token ids and a mask.
        tok: Its tokenizer.
        items: Questions, at least one.
    """
    pairs = [(item.goal, solution) for item in items for solution in (item.sol1, item.sol2)]
    losses = torch.cat(
        [_nats_per_token(model, tok, pairs[i : i + _BATCH]) for i in range(0, len(pairs), _BATCH)]
    )
    chosen = losses.reshape(-1, 2).argmin(-1)  # [number of items]
    right = torch.tensor([item.label for item in items])
    return float((chosen == right).float().mean())


def _nats_per_token(model: Any, tok: Any, pairs: Sequence[tuple[str, str]]) -> Tensor:
    """Return the mean loss [B] of each solution after its goal; log perplexity."""
    form = PromptFormat()
    batch = padded([form.whole_ids(goal, solution, tok) for goal, solution in pairs], tok, "right")
    lengths = torch.tensor([len(form.prompt_ids(goal, tok)) for goal, _ in pairs])  # [B]
    edit = attached_edit(model) if isinstance(model, torch.nn.Module) else None
    device = next(model.parameters()).device
    ids, mask = batch["input_ids"].to(device), batch["attention_mask"].to(device)
    with edit.prompt_lengths(lengths) if edit is not None else nullcontext():
        output = model(input_ids=ids, attention_mask=mask)
    logits = output if isinstance(output, Tensor) else output.logits  # [B, T, V]
    loss = F.cross_entropy(logits[:, :-1].float().mT, ids[:, 1:], reduction="none")  # [B, T - 1]
    columns = torch.arange(1, ids.shape[1], device=device)
    scored = mask[:, 1:].bool() & (columns >= lengths.to(device)[:, None])
    return ((loss * scored).sum(-1) / scored.sum(-1).clamp_min(1)).cpu()
