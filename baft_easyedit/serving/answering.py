"""Answer requests one at a time, each with the edits that it names. Uses transformers.

`app` turns a request into a `Wish`, and runs `Answerer.answer` on it through a `Queue`.
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from baft_easyedit.generation import PLAIN_DECODING
from baft_easyedit.model.named import NamedEdits

T = TypeVar("T")

_MOST_QUEUED = 32
"""Longest queue: each waiting request holds one of the server's 40 threads."""
_CONTEXT = 8
"""Tokens of the prompt that tell how the text after them begins."""


class FullError(RuntimeError):
    """The queue has no room for another request."""


class Queue:
    """Runs jobs one at a time, in one thread; at most `size` of them run or wait.

    Raises:
        ValueError: If `size` is not in [1, 32].
    """

    def __init__(self, size: int) -> None:
        if not 1 <= size <= _MOST_QUEUED:
            raise ValueError(f"queue must be in [1, {_MOST_QUEUED}]; got {size}")
        self._size = size
        self._room = threading.BoundedSemaphore(size)
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="answers")

    def submit(self, job: Callable[[], T]) -> "Future[T]":
        """Queue a job, which runs after those submitted before; FullError if there is no room."""
        if not self._room.acquire(blocking=False):
            raise FullError(f"at most {self._size} requests may run or wait: try again later")
        future = self._pool.submit(job)
        future.add_done_callback(lambda _: self._room.release())
        return future


@dataclass(frozen=True)
class Wish:
    """A request: the tokens of its prompt, the edits to use, and how to generate."""

    edits: tuple[str, ...]
    """Names of the edits; empty for the unedited model."""
    prompt: Sequence[int]
    max_tokens: int
    temperature: float = 0.0
    """0 for greedy decoding."""
    top_p: float = 1.0
    seed: int | None = None
    """Seed of the sampling; None leaves torch's random numbers as they are."""
    stop: tuple[str, ...] = ()
    """Stop texts: the answer ends before the first of them."""
    goes_on: bool = False
    """Whether the answer's text goes on from the prompt's, so that a space may begin it."""


@dataclass(frozen=True)
class Answer:
    """A complete answer: its text, without special tokens, and how many tokens were generated."""

    text: str
    num_tokens: int
    is_cut: bool
    """Whether `max_tokens` ended the answer."""


class Answerer:
    """Generates answers with a model and its named edits, which are attached to it."""

    def __init__(self, model: Any, tokenizer: Any, edits: NamedEdits) -> None:
        self.model, self.tokenizer, self.edits = model, tokenizer, edits

    @torch.no_grad()
    def answer(self, wish: Wish, say: Callable[[str], bool]) -> Answer:
        """Answer a request, and `say` each new piece of the text, possibly empty.

        The answer ends if `say` returns False.
        """
        from transformers import StoppingCriteriaList

        prompt = torch.tensor([list(wish.prompt)], device=self.model.device)
        text = _Text(self.tokenizer, wish, say)
        sampling = {"temperature": wish.temperature, "top_p": wish.top_p, "top_k": 0}
        seeds = wish.temperature > 0 and wish.seed is not None
        with self.edits.active(*wish.edits), torch.random.fork_rng(enabled=seeds):
            if seeds:
                torch.manual_seed(wish.seed)
            self.model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=wish.max_tokens,
                pad_token_id=self.tokenizer.pad_token_id,
                stopping_criteria=StoppingCriteriaList([text.after_token]),
                do_sample=wish.temperature > 0,
                **PLAIN_DECODING | (sampling if wish.temperature > 0 else {}),
            )
        text.finish()
        ends = self.model.generation_config.eos_token_id
        is_over = text.has_stopped or text.last in (ends if isinstance(ends, list) else [ends])
        is_cut = text.num_tokens == wish.max_tokens and not is_over
        return Answer(text.said, text.num_tokens, is_cut)


class _Text:
    """The text of an answer, passed on in pieces; what may begin a stop text is held back."""

    def __init__(self, tokenizer: Any, wish: Wish, say: Callable[[str], bool]) -> None:
        self._tokenizer, self._wish, self._say = tokenizer, wish, say
        self._whole = ""
        self._context = list(wish.prompt[-_CONTEXT:]) if wish.goes_on else []
        self.said, self.num_tokens, self.last = "", 0, -1
        self.has_stopped = False

    def after_token(self, ids: torch.Tensor, _scores: Any, **_: Any) -> torch.Tensor:
        """Pass on new text, as a stopping criterion: take prompt and answer [1, T], return [1]."""
        new = ids[0, len(self._wish.prompt) :].tolist()
        self.num_tokens, self.last = len(new), new[-1]
        self._whole = self._decoded(self._context + new)[len(self._decoded(self._context)) :]
        found = [at for stop in self._wish.stop if (at := self._whole.find(stop)) >= 0]
        self.has_stopped = bool(found)
        if found:
            self._whole = self._whole[: min(found)]
        held = 0 if found else max(map(len, self._wish.stop), default=1) - 1
        sure = self._whole[: max(0, len(self._whole) - held)]
        is_wanted = self._speak(sure.rstrip("\ufffd"))  # a character's first bytes
        return torch.tensor([self.has_stopped or not is_wanted], device=ids.device)

    def _decoded(self, ids: Sequence[int]) -> str:
        """Return a text as the model wrote it; cleaning up would change what was said already."""
        return self._tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def finish(self) -> None:
        """Pass on what was held back."""
        self._speak(self._whole)

    def _speak(self, text: str) -> bool:
        """Pass on the part of a text that is new; return whether the caller wants more."""
        if not text.startswith(self.said):
            text = self.said
        piece, self.said = text[len(self.said) :], text
        return self._say(piece)
