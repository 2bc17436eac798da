"""Evaluate an edited model on tasks of lm-evaluation-harness: log-likelihoods, and generation.

An edit acts on the last tokens of the prompt and on the answer, so it must know where prompts end.
The harness' own class for Hugging Face models does not say, and its log-likelihoods are almost
those of the unedited model; our subclass `EditedLM` does. Needs the extra `eval`.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from baft_easyedit.files.messages import short
from baft_easyedit.model.hooks import with_prompt_lengths

try:
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
except ImportError as error:
    raise ImportError(
        f"tasks are asked through lm-evaluation-harness, which cannot be imported ({error}): "
        "pip install 'baft_easyedit[eval]'"
    ) from None

Encoded = tuple[Any, list[int], list[int]]
"""A request as the harness encodes it: texts, tokens of the context and of the continuation."""


class Score(NamedTuple):
    """A model's score in a task, by one metric."""

    value: float
    error: float | None
    """Standard error of the value; None if the harness gives none."""

    def __str__(self) -> str:
        return f"{self.value:.3f}" + (f" ± {self.error:.3f}" if self.error is not None else "")


class EditedLM(HFLM):  # type: ignore[misc]  # no types
    """The harness' model class, for a model that may carry an edit.

    For log-likelihoods, the context is the prompt, and the continuation is the answer. A text
    without a context (`loglikelihood_rolling`, perplexity) counts as the answer to the one token
    that the harness puts before it: the edit acts on every token, as if the model wrote the text.
    Generation needs no help, as `generate` of an edited model knows its prompts.

    `asked` is evaluated in place of `model`, such as a wrapper that EasyEdit made of it.
    `chat_template_kwargs` are those of the edit's hyper-parameters.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        batch_size: int = 8,
        asked: Any = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=batch_size,
            chat_template_args=dict(chat_template_kwargs or {}),
        )
        self.asked = model if asked is None else asked

    def _model_call(self, inps: Tensor, *_: Any, **__: Any) -> Tensor:
        """Return the logits [B, T, V] of tokens [B, T]."""
        with torch.no_grad():
            output = self.asked(input_ids=inps)
        return output if isinstance(output, Tensor) else output.logits

    def _loglikelihood_tokens(
        self, requests: Sequence[Encoded], disable_tqdm: bool = False, **more: Any
    ) -> list[tuple[float, bool]]:
        """Score continuations in batches whose prompts all have one length, as the edit needs.

        The unedited model gets the same batches, so that only the edit makes a difference.
        """
        lengths = [self._prompt_length(*tokens) for _, *tokens in requests]
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        answers: dict[int, tuple[float, bool]] = {}
        with tqdm(total=len(order), disable=disable_tqdm, leave=False) as bar:
            for length, group in groupby(order, lengths.__getitem__):
                part = [*group]
                with with_prompt_lengths(self.asked, [length]):
                    found = super()._loglikelihood_tokens([requests[i] for i in part], True, **more)
                answers |= zip(part, found, strict=True)
                bar.update(len(part))
        return [answers[i] for i in range(len(lengths))]

    def _prompt_length(self, context: Sequence[int], continuation: Sequence[int]) -> int:
        """Return how many tokens of a context remain: long texts lose tokens at the beginning."""
        return len(context) - max(0, len(context) + len(continuation) - self.max_length - 1)


class Tasks:
    """Tasks of the harness, to evaluate one or more models on.

    Args:
        names: Tasks or groups of tasks, such as `piqa`, `mmlu` and `gsm8k`.
        include_path: A directory of further task files, which may run code; they take precedence
            over the harness' own tasks of the same name.
        limit: Number of questions of each task; all if None.
        num_fewshot: Examples before each question; the task's own number if None.

    Raises:
        ValueError: If a task does not exist.
    """

    def __init__(
        self,
        names: Sequence[str],
        include_path: Path | None = None,
        limit: int | None = None,
        num_fewshot: int | None = None,
    ) -> None:
        self._manager = TaskManager(include_path=include_path)
        for name in names:
            if not self._manager.match_tasks([name]):
                raise ValueError(
                    f"tasks must be some of lm-evaluation-harness, or in the include path; got "
                    f"{short(name)}: `lm_eval ls tasks` lists them"
                )
        self._options = {"tasks": self._manager.match_tasks([*names]), "limit": limit}
        self._options |= {"num_fewshot": num_fewshot}

    def scores(self, lm: EditedLM, use_chat_template: bool = False) -> dict[str, Score]:
        """Return a model's scores by task and metric, such as `piqa acc`.

        Raises:
            OSError: If a data set cannot be loaded.
        """
        seeds = dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed"))
        results = simple_evaluate(
            lm,
            task_manager=self._manager,
            apply_chat_template=use_chat_template,
            log_samples=False,
            **self._options,
            **seeds,  # None: the harness must not reseed the caller's random numbers
        )
        return {
            f"{task} {name}": score
            for task, found in results["results"].items()
            for name, score in _by_metric(found)
        }


def _by_metric(found: Mapping[str, Any]) -> Iterator[tuple[str, Score]]:
    """Yield the scores of a task by metric; the name includes the answer filter, if any."""
    for key, value in found.items():
        metric, _, kind = key.partition(",")  # as in `exact_match,strict-match` and `acc,none`
        if kind and not metric.endswith("_stderr") and isinstance(value, float | int):
            error = found.get(f"{metric}_stderr,{kind}")
            name = metric if kind == "none" else f"{metric} {kind}"
            yield name, Score(value, error if isinstance(error, float) else None)
