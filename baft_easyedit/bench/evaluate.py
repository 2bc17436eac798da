"""Score cases on the model as a session has it: teacher forced, by generation, any alias.

The unedited model's scores are needed for every method: they are computed once, and kept under a
key of everything that they depend on.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from statistics import fmean
from typing import Annotated, Any

from pydantic import BaseModel, Field

from baft_easyedit.bench.free_text import (
    WILD_TOKENS,
    first_sentence,
    generation_scores,
    wild_scores,
)
from baft_easyedit.bench.probabilities import field_scores
from baft_easyedit.bench.questions import Question, questions_of, wild_ids, wild_questions
from baft_easyedit.bench.scores import kind_scores, metric_scores
from baft_easyedit.bench.store import Kept, KeptFile
from baft_easyedit.easyedit.session import Session
from baft_easyedit.model.prompt_format import PromptFormat

Request = Mapping[str, Any]


class _Unedited(BaseModel, strict=True):
    """What a case is compared with."""

    metrics: dict[str, Any]
    field_scores: dict[str, Any]
    answers: list[str] = []
    wild: list[str] = []


class _PreEdit(KeptFile):
    """What the unedited model scores and says on the cases of a chunk."""

    cases: Annotated[list[_Unedited], Field(min_length=1)]


_SLACK = 4
"""Tokens that an answer may have beyond its target before it is cut: one of them is its end."""
_SHORTEST_ANSWER = 16
_SCORED_BY = (
    *("max_length", "use_chat_template", "chat_template_kwargs"),
    *("evaluation_type", "fp16", "bf16"),
)
"""Hyper-parameters that a score depends on; some methods lack some, which is as if false."""


_EXAMS: Mapping[str, tuple[Callable[[Request], list[Question]], Callable[..., Any]]] = {
    "answers": (questions_of, generation_scores),
    "wild": (wild_questions, wild_scores),
}
"""By its name in a case's file, what each asks, and how it scores a case's answers."""


def answer_questions(session: Session, requests: Sequence[Request], exam: str) -> list[list[str]]:
    """Let the model answer the questions of all cases together by greedy generation."""
    tok, form = session.editor.tok, PromptFormat.of(session.editor.hparams)
    cases = [_EXAMS[exam][0](request) for request in requests]
    ids: list[tuple[int, ...]] = []
    limits: list[int] = []
    for questions in cases:
        known = [q.answer for q in questions if q.answer is not None]
        longest = max(len(tok(text, add_special_tokens=False)["input_ids"]) for text in known)
        limit = WILD_TOKENS if exam == "wild" else max(longest + _SLACK, _SHORTEST_ANSWER)
        limits += [limit] * len(questions)
        ask = wild_ids if exam == "wild" else Question.ids
        ids += [ask(question, form, tok) for question in questions]
    answers = iter(session.answers(ids, limits))
    if exam == "wild":
        answers = map(first_sentence, answers)
    return [list(islice(answers, len(questions))) for questions in cases]


def any_alias_portability(
    session: Session, request: Request, post: Mapping[str, Any]
) -> float | None:
    """Score portability with the best of all accepted answers; None if no probe has several.

    EasyEdit scores the first answer only. None for GRACE too, whose first answer EasyEdit scores by
    generation.
    """
    probes = request.get("portability") or {}
    several = any(len(names) > 1 for p in probes.values() for names in p.get("aliases", ()))
    if not several or session.editor.alg_name == "GRACE":
        return None
    means = []
    for key, probe in probes.items():
        best = [float(score) for score in post["portability"][f"{key}_acc"]]
        answers = zip(probe["prompt"], probe.get("aliases", ()), strict=False)
        others = [
            (i, prompt, alias) for i, (prompt, names) in enumerate(answers) for alias in names[1:]
        ]
        if others:
            scores = session.token_accuracies([o[1] for o in others], [o[2] for o in others])
            for (i, _, _), score in zip(others, scores, strict=True):
                best[i] = max(best[i], score)
        means.append(fmean(best))
    return fmean(means)


def pre_edit_scores(
    kept: Kept, session: Session, requests: Sequence[Request], exams: Sequence[str]
) -> list[dict[str, Any]]:
    """Return `metrics`, `answers`, `wild` and `field_scores` of each case on the unedited model.

    The run keeps them for all methods, by what they depend on, such as the model's hash. They
    belong to the chunk because its questions are answered together, after the edits too: in half
    precision what else is in a batch makes a difference, which is no edit's doing. The `exams`
    are those of `answers` and `wild` that the run asks for.
    """
    editor = session.editor
    form = PromptFormat.of(editor.hparams)
    prompts = [question.prompt for r in requests for question in questions_of(r)]
    content = {
        **{name: getattr(editor.hparams, name, None) or None for name in _SCORED_BY},
        "separators": sorted({form.separator_after(prompt) for prompt in prompts}),
        "padding": editor.tok.padding_side,
        "by_generation": editor.alg_name == "GRACE",
        **{exam: exam in exams for exam in _EXAMS},
        "batch_size": session.batch_size,
        "cases": requests,
    }

    def make() -> dict[str, Any]:
        found: dict[str, Sequence[Any]] = {
            "metrics": session.score(requests),
            **{name: answer_questions(session, requests, name) for name in exams},
            "field_scores": field_scores(session, requests, "answers" in exams),
        }
        return {
            "cases": [{name: of[i] for name, of in found.items()} for i in range(len(requests))]
        }

    return kept(content, make, _PreEdit)["cases"]


def score_cases(
    session: Session,
    requests: Sequence[Request],
    pre: Sequence[Mapping[str, Any]],
    exams: Sequence[str],
) -> list[dict[str, Any]]:
    """Score cases after the edits.

    Returns:
        Of each `teacher_forced`: EasyEdit's metrics; the exams' answers and the `texts` of fluency,
        those before and after; and `scores`.
    """
    scored: list[dict[str, Any]] = []
    after = session.score_against([p["metrics"] for p in pre], requests)
    field = field_scores(session, requests, "answers" in exams)
    for request, metrics, before, now in zip(requests, after, pre, field, strict=True):
        post, then = metrics["post"], dict(before["field_scores"])
        texts = {"pre": then.pop("texts", None), "post": now.pop("texts", None)}
        scores = {
            **metric_scores(post),
            **kind_scores(post),
            "any_alias_portability_acc": any_alias_portability(session, request, post),
            **now,
            **{f"pre_{name}": value for name, value in then.items()},
        }
        written = texts if texts["post"] is not None else None
        scored.append(
            {"teacher_forced": metrics, "answers": None, "texts": written, "scores": scores}
        )
    for name in exams:
        answers = answer_questions(session, requests, name)
        for request, case, before, new in zip(requests, scored, pre, answers, strict=True):
            case[name] = {"pre": before[name], "post": new}
            case["scores"].update(_EXAMS[name][1](request, before[name], new))
    return scored


def immediate_scores(session: Session, request: Request) -> dict[str, float | None]:
    """Score a case's prompt and rephrasing right after its own edit."""
    alone = {**request, "locality": {}, "portability": {}}
    scores = metric_scores(session.score([alone])[0])
    return {f"immediate_{name}": scores[name] for name in ("rewrite_acc", "rephrase_acc")}
