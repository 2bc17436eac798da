"""Score one case on the model as a session has it: teacher forced, by generation, any alias.

The unedited model's scores are needed for every method and protocol: they are computed once, and
kept under a key of everything that they depend on.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from baft_easyedit.bench.scores import metric_scores, plain
from baft_easyedit.bench.store import SCHEMA, read_json, write_json
from baft_easyedit.easyedit.session import Session
from baft_easyedit.requests import format_prompt

Request = Mapping[str, Any]

_SLACK = 4
"""Tokens that an answer may have beyond its target before it is cut: one of them is its end."""
_SHORTEST_ANSWER = 16


class Question(NamedTuple):
    """One prompt that a case is asked by generation."""

    section: str
    """rewrite, rephrase, locality or portability."""
    key: str
    prompt: str
    answer: str


def questions_of(request: Request) -> list[Question]:
    """Return what a case is asked: its prompt, its rephrasing and its probes."""
    target = request["target_new"]
    asked = [Question("rewrite", "", request["prompt"], target)]
    if request.get("rephrase_prompt"):
        asked.append(Question("rephrase", "", request["rephrase_prompt"], target))
    for section in ("locality", "portability"):
        for key, probe in (request.get(section) or {}).items():
            pairs = zip(as_list(probe["prompt"]), as_list(probe["ground_truth"]), strict=True)
            asked += [Question(section, key, prompt, truth) for prompt, truth in pairs]
    return asked


def as_list(value: Any) -> list[Any]:
    """Return one text, or several, as a list."""
    return [value] if isinstance(value, str) else list(value)


def answer_questions(session: Session, request: Request) -> list[str]:
    """Let the model answer a case's questions by greedy generation."""
    tok, hparams = session.editor.tok, session.editor.hparams
    asked = questions_of(request)
    longest = max(len(tok(q.answer, add_special_tokens=False)["input_ids"]) for q in asked)
    chat = bool(getattr(hparams, "use_chat_template", False))
    prompts = [format_prompt(q.prompt, tok, chat and q.section != "locality") for q in asked]
    return session.answers(prompts, max(longest + _SLACK, _SHORTEST_ANSWER))


def generation_scores(
    request: Request, before: list[str], after: list[str]
) -> dict[str, float | None]:
    """Score answers: exact match with the target, or for locality with the answer before the edit.

    Args:
        request: The case.
        before: Answers of the unedited model to `questions_of` the case.
        after: Those of the edited one.

    Returns:
        The `gen_*` scores; means over prompts, then over keys.
    """
    found: dict[str, dict[str, list[float]]] = {}
    for question, old, new in zip(questions_of(request), before, after, strict=True):
        wanted = old if question.section == "locality" else question.answer.strip()
        keys = found.setdefault(question.section, {})
        keys.setdefault(question.key, []).append(float(new == wanted))
    return {
        f"gen_{section}_acc": fmean(map(fmean, found[section].values()))
        if section in found
        else None
        for section in ("rewrite", "rephrase", "locality", "portability")
    }


def any_alias_portability(
    session: Session, request: Request, post: Mapping[str, Any]
) -> float | None:
    """Score portability with the best of all accepted answers; None if no probe has several.

    EasyEdit scores the first answer only. None for GRACE too, whose first answer EasyEdit scores by
    generation.

    Args:
        session: With the edited model.
        request: A case whose probes may have `aliases`, a list of answers for each prompt.
        post: EasyEdit's metrics of it.
    """
    probes = request.get("portability") or {}
    several = any(len(names) > 1 for p in probes.values() for names in p.get("aliases", ()))
    if not several or session.editor.alg_name == "GRACE":
        return None
    means = []
    for key, probe in probes.items():
        best = [float(score) for score in post["portability"][f"{key}_acc"]]
        others = [
            (i, prompt, alias)
            for i, (prompt, names) in enumerate(
                zip(as_list(probe["prompt"]), probe.get("aliases", ()), strict=False)
            )
            for alias in names[1:]
        ]
        if others:
            scores = session.token_accuracies([o[1] for o in others], [o[2] for o in others])
            for (i, _, _), score in zip(others, scores, strict=True):
                best[i] = max(best[i], score)
        means.append(fmean(best))
    return fmean(means)


@dataclass(frozen=True)
class PreEditScores:
    """The unedited model's scores, computed once for each key and case.

    Attributes:
        file_of: Path of the record of a key and an index.
        depends_on: What all of this run's scores depend on, such as the model's hash.
        with_answers: Whether the cases are scored by generation too.
    """

    file_of: Callable[[str, int], Path]
    depends_on: Mapping[str, Any]
    with_answers: bool

    def get(self, session: Session, index: int, request: Request) -> dict[str, Any]:
        """Return `metrics` and `answers` of a case; computed on the session's unedited model."""
        file = self.file_of(self._key(session), index)
        digest = _digest(request)
        if file.is_file():
            record = read_json(file)
            if record["request"] == digest:
                return record
        record = {
            "schema": SCHEMA,
            "request": digest,
            "metrics": plain(session.score(request)),
            "answers": answer_questions(session, request) if self.with_answers else None,
        }
        write_json(file, record)
        return record

    def _key(self, session: Session) -> str:
        """Hash what the scores depend on, beside the case."""
        editor = session.editor
        settings = {
            name: getattr(editor.hparams, name, None)
            for name in ("max_length", "use_chat_template", "evaluation_type", "fp16")
        }
        scored_by_generation = editor.alg_name == "GRACE"
        return _digest(
            {
                **self.depends_on,
                **settings,
                "padding": editor.tok.padding_side,
                "by_generation": scored_by_generation,
                "answers": self.with_answers,
            }
        )[:16]


def _digest(content: Any) -> str:
    """Hash plain data."""
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def score_case(
    session: Session, request: Request, pre: Mapping[str, Any], with_answers: bool
) -> dict[str, Any]:
    """Score a case after the edits.

    Returns:
        `teacher_forced`: EasyEdit's metrics; `answers` before and after, or None; and `scores`.
    """
    metrics = plain(session.score_against(pre["metrics"], request))
    scores = metric_scores(metrics["post"])
    scores["any_alias_portability_acc"] = any_alias_portability(session, request, metrics["post"])
    answers = None
    if with_answers:
        answers = {"pre": pre["answers"], "post": answer_questions(session, request)}
        scores.update(generation_scores(request, answers["pre"], answers["post"]))
    return {"teacher_forced": metrics, "answers": answers, "scores": scores}


def immediate_scores(session: Session, request: Request) -> dict[str, float | None]:
    """Score a case's prompt and rephrasing right after its own edit."""
    alone = {**request, "locality": {}, "portability": {}}
    scores = metric_scores(session.score(alone))
    return {f"immediate_{name}": scores[name] for name in ("rewrite_acc", "rephrase_acc")}
