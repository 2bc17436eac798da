"""Requests of random words, with an exact number of tokens."""

import random
from typing import Any

from baft_easyedit.facts import edit_requests

_ANSWER_LENGTH = 4
_MAX_TRIES = 200


def random_requests(
    tokenizer: Any, prompt_length: int, count: int, seed: int
) -> list[dict[str, Any]]:
    """Make requests with EasyEdit's keys; the same ones for the same arguments.

    Args:
        tokenizer: The model's tokenizer.
        prompt_length: Tokens of each prompt, with those that begin a text; answers add four.
        count: Number of requests.
        seed: Seed of the words.

    Raises:
        ValueError: If no text of that length was found.
    """
    rng = random.Random(seed)
    words = sorted({word for r in edit_requests("eval") for word in r["prompt"].split()})
    requests = []
    for _ in range(count):
        prompt = _longer(tokenizer, rng, words, "", prompt_length)
        end = _length(tokenizer, prompt) + _ANSWER_LENGTH
        answers = [_longer(tokenizer, rng, words, prompt, end) for _ in range(2)]
        target_new, ground_truth = (answer.removeprefix(prompt).strip() for answer in answers)
        requests.append(
            {
                "prompt": prompt,
                "target_new": target_new,
                "ground_truth": ground_truth,
                "subject": max(prompt.split(), key=len),
            }
        )
    return requests


def _longer(tokenizer: Any, rng: random.Random, words: list[str], begin: str, length: int) -> str:
    """Add random words to a text until it has so many tokens."""
    for _ in range(_MAX_TRIES):
        text = begin
        while _length(tokenizer, text) < length:
            text = f"{text} {rng.choice(words)}".strip()
        if text != begin and _length(tokenizer, text) == length:
            return text
    raise ValueError(
        f"prompt_length must be one that this tokenizer reaches with whole words; got {length} "
        "tokens in all: try a longer prompt"
    )


def _length(tokenizer: Any, text: str) -> int:
    """Return the number of tokens of a text, special ones included."""
    return len(tokenizer(text)["input_ids"])
