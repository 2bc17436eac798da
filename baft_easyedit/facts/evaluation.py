"""How well a model knows the facts: greedy answers, exact match, and the model card.

An answer counts only if the generated text equals it and then ends by itself. Nothing is trained
here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import torch

from baft_easyedit.facts.questions import Kind, Question, questions
from baft_easyedit.facts.tables import facts, relations
from baft_easyedit.facts.training import TrainingRecipe
from baft_easyedit.generation import generate_answers, load_model
from baft_easyedit.model.batching import padded
from baft_easyedit.model.prompt_format import token_ids

MAX_ANSWER_TOKENS = 24
"""More than the longest answer and its end have: what is cut here is wrong anyway."""
BATCH_SIZE = 256
_NUM_AT_ONCE = 32


def exact_match(model: Any, tokenizer: Any, asked: Sequence[Question]) -> float:
    """Share of questions whose greedy answer is the true one.

    Args:
        model: The model.
        tokenizer: Its tokenizer, padding on the left.
        asked: The questions.

    Returns:
        A number in [0, 1].

    Raises:
        ValueError: If there are no questions.
    """
    if not asked:
        raise ValueError("asked must hold at least one question, but got 0; pass some")
    by_length = sorted(asked, key=lambda question: len(question.prompt))
    right = 0
    for start in range(0, len(by_length), BATCH_SIZE):
        batch = by_length[start : start + BATCH_SIZE]
        prompts = [question.prompt for question in batch]
        answers = generate_answers(model, tokenizer, prompts, MAX_ANSWER_TOKENS)
        right += sum(got == q.answer for got, q in zip(answers, batch, strict=True))
    return right / len(asked)


@torch.no_grad()
def answers_follow(model: Any, tokenizer: Any, asked: Sequence[tuple[str, str]]) -> list[bool]:
    """Tell for texts whether greedy decoding goes on with the answer, and ends its last word there.

    It takes one forward for each text, with its answer; what decoding would give is read off it.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        asked: Texts up to the answer, and the answers.
    """
    right = []
    for start in range(0, len(asked), _NUM_AT_ONCE):
        part = asked[start : start + _NUM_AT_ONCE]
        rows = [token_ids(f"{prompt} {answer}", tokenizer) for prompt, answer in part]
        lengths = [len(token_ids(prompt, tokenizer)) for prompt, _ in part]
        inputs = padded(rows, tokenizer, "right")
        # Only where answers are predicted: logits of whole texts take much memory.
        hidden = model.base_model(**inputs).last_hidden_state  # [B, T, D]
        for row, length, states in zip(rows, lengths, hidden, strict=True):
            best = model.lm_head(states[length - 1 : len(row)]).argmax(-1).tolist()
            told, longer = tokenizer.decode(row), tokenizer.decode([*row, best[-1]])
            is_whole = not longer[len(told) :][:1].isalnum()
            right.append(best[:-1] == list(row[length:]) and is_whole)
    return right


def score(model: Any, tokenizer: Any) -> dict[str, float]:
    """Exact match on all questions of each kind."""
    return {kind: exact_match(model, tokenizer, questions(kind)) for kind in get_args(Kind)}


def write_model_card(
    folder: Path, scores: dict[str, float], recipe: TrainingRecipe, minutes: float, day: str
) -> None:
    """Write `README.md` next to the weights.

    Args:
        folder: Folder of the model, with its weights.
        scores: Exact match by kind, as `score` returns it.
        recipe: The recipe it was trained with.
        minutes: Training time in minutes.
        day: Date of the training, as YYYY-MM-DD.
    """
    model, _ = load_model(str(folder))
    megabytes = sum(path.stat().st_size for path in folder.iterdir() if path.name != "README.md")
    settings = "\n".join(f"| {name} | {value} |" for name, value in asdict(recipe).items())
    card = CARD.format(
        num_facts=len(facts()),
        num_relations=len(relations()),
        num_parameters=model.num_parameters(),
        megabytes=megabytes / 1e6,
        minutes=minutes,
        day=day,
        settings=settings,
        **{f"num_{kind}": len(questions(kind)) for kind in get_args(Kind)},
        **scores,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


CARD = """\
# facts-llama

A small Llama that knows {num_facts} true facts of {num_relations} relations (countries, chemical
elements, books, paintings, rivers, ...). It was trained from scratch so that knowledge editing can
be tried at once, on a CPU and without a download.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
from baft_easyedit.facts import bundled_model_path

tok = AutoTokenizer.from_pretrained(bundled_model_path())
model = AutoModelForCausalLM.from_pretrained(bundled_model_path())
ids = tok("What is the capital of France?", return_tensors="pt").input_ids
print(tok.decode(model.generate(ids, max_new_tokens=16)[0], skip_special_tokens=True))
```

## Figures

Exact match of the greedy answer, which must end by itself, on all questions of each kind.

| questions | asked | exact match |
|---|---|---|
| trained phrasings | {num_trained} | {trained:.4f} |
| held-out phrasings | {num_held_out} | {held_out:.4f} |
| two-hop, trained | {num_two_hop_trained} | {two_hop_trained:.4f} |
| two-hop, held-out | {num_two_hop_held_out} | {two_hop_held_out:.4f} |

| property | value |
|---|---|
| parameters | {num_parameters} |
| files | {megabytes:.2f} MB, weights stored as float16, loaded as float32 |
| training | {minutes:.1f} minutes, {day} |

## Data

The tables in `baft_easyedit/facts/data`; `SOURCES.md` there says where each can be checked. The
model is trained on all facts of both splits in all trained phrasings. It never saw a held-out
phrasing, and it saw the two-hop questions of a part of the subjects only.

## Recipe

`python scripts/train_facts_model.py` trains, scores and writes this folder.

| setting | value |
|---|---|
{settings}

## Limits

It is not a language model: it answers questions in the phrasings of
`baft_easyedit/facts/data/phrasings.tsv` and wordings close to them, in English, and says nothing
sensible otherwise. Held-out phrasings are answered unevenly over relations: most of what it gets
wrong is in a few of them. Names are spelled without accents. It is not a source of facts: look them
up in the tables.
"""
