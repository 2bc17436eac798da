"""What is edited: benchmark records, or texts of an exact number of tokens."""

import random
from typing import Any

from baft_easyedit.bench.data import load_dataset
from baft_easyedit.speed.options import SpeedOptions

_NUM_WORDS = 256
_MIN_WORDS = 16
_MAX_TRIED = 20_000
_MAX_TRIES = 50


def records(options: SpeedOptions, count: int) -> list[dict[str, Any]]:
    """Return benchmark records, as many as asked for; none if the options name no data.

    Raises:
        ValueError: If there are fewer, or one breaks a rule.
        FileNotFoundError: If the file is missing.
    """
    if options.data is None:
        return []
    kind, _, path = options.data.partition("=")
    return load_dataset(kind, path or None, start=options.start, limit=count).requests


class PromptMaker:
    """Makes requests of random words that are one token each after a space.

    Args:
        tokenizer: The model's tokenizer.

    Raises:
        ValueError: If the vocabulary has too few such words.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._words = self._find_words()

    def requests(
        self, prompt_length: int, answer_length: int, count: int, seed: int
    ) -> list[dict[str, Any]]:
        """Make requests with EasyEdit's keys; the same ones for the same arguments.

        Args:
            prompt_length: Tokens of each prompt, with those that begin a text.
            answer_length: Tokens that each target adds.
            count: Number of requests.
            seed: Seed of the words.

        Raises:
            ValueError: If no text of that length was found.
        """
        rng = random.Random(seed)
        return [self._request(rng, prompt_length, answer_length) for _ in range(count)]

    def texts(self, count: int, seed: int, length: int = 32) -> list[str]:
        """Make plain texts of random words."""
        return [r["prompt"] for r in self.requests(length, 1, count, seed)]

    def _request(
        self, rng: random.Random, prompt_length: int, answer_length: int
    ) -> dict[str, Any]:
        """Draw words until the lengths are right: texts may begin with a token or two more."""
        num_words = prompt_length
        for _ in range(_MAX_TRIES):
            subject = rng.choice(self._words)
            others = [word for word in self._words if subject not in word]
            words = rng.choices(others, k=num_words)
            words[num_words // 2] = subject
            prompt = " ".join(words)
            answers = [" ".join(rng.choices(others, k=answer_length)) for _ in range(2)]
            excess = self._length(prompt) - prompt_length
            if excess == 0 and self._added(prompt, answers[0]) == answer_length:
                keys = ("prompt", "target_new", "ground_truth", "subject")
                return dict(zip(keys, (prompt, *answers, subject), strict=True))
            num_words = max(1, num_words - excess)
        raise ValueError(
            f"prompt_length must be one that this tokenizer can reach with single-token words; got "
            f"{prompt_length}, with answers of {answer_length}: try a longer prompt"
        )

    def _find_words(self) -> list[str]:
        """Look for single-token words in a fixed random order of the vocabulary."""
        ids = list(range(len(self._tokenizer)))
        random.Random(0).shuffle(ids)
        words: dict[str, None] = {}
        for token in ids[:_MAX_TRIED]:
            word = self._tokenizer.decode([token]).strip()
            if word.isascii() and word.isalpha() and self._added("of", word) == 1:
                words[word] = None
            if len(words) == _NUM_WORDS:
                break
        if len(words) < _MIN_WORDS:
            raise ValueError(
                f"the tokenizer must have at least {_MIN_WORDS} words that are one token after a "
                f"space; got {len(words)} in {type(self._tokenizer).__name__}: give another model"
            )
        return list(words)

    def _added(self, before: str, text: str) -> int:
        """Return how many tokens a text adds after another one and a space."""
        return self._length(f"{before} {text}") - self._length(before)

    def _length(self, text: str) -> int:
        """Return the number of tokens of a text, special ones included."""
        return len(self._tokenizer(text)["input_ids"])
