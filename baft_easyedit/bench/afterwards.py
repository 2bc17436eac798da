"""Scores of answers by what is not the model: a judge, a model of sentences, reference texts.

They are added to the cases after the run, and may be asked for later: the answers are on disk.
"""

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from baft_easyedit.bench.config import JudgeConfig, read_config
from baft_easyedit.bench.data.case import Layout
from baft_easyedit.bench.data.files import find_file, read_records
from baft_easyedit.bench.questions import questions_of, section_means, wild_questions
from baft_easyedit.bench.scores import SHORT
from baft_easyedit.bench.store import KeptFile, RunDirectory, read_json, write_json
from baft_easyedit.files.messages import short

Scores = dict[str, float]
Case = Mapping[str, Any]
_Scorer = Callable[[Case, Mapping[str, Any]], Scores]
"""Scores a case, given its request."""

_TASK = """\
Grade an answer to a question by the expected answer. Write A if it is correct, else B.
An answer is correct if it has all that matters of the expected answer and nothing that \
contradicts it; its wording, length and case do not matter. It is not correct if something is \
missing or added that makes it another answer, or if it says the same again and again.

Question: {}
Expected answer: {}
Answer to grade: {}

Write only the letter, A or B."""
"""WILD's criteria in words of our own."""
_GRADE = re.compile(
    r"(?:.*</think>)?\W*(?:answer\W+)?([AB])\W*(?:(?:in)?correct)?\W*", re.IGNORECASE | re.DOTALL
)


class _Verdict(KeptFile):
    """What a judge said."""

    reply: str


def add_scores(directory: RunDirectory) -> None:
    """Add to the cases of a run the scores that a judge or files of others give to their answers.

    Raises:
        ConnectionError: If the judge does not answer; verdicts so far are kept.
        ValueError: If the judge gives no grade, or the snippets are not ROME's.
    """
    config, requests = read_config(directory.config), read_json(directory.requests)
    scorers: list[_Scorer] = []
    if config.judge is not None:
        scorers.append(_Judge(directory, config.judge).scores)
    if config.similarity_model is not None:
        scorers.append(_similarity(config.similarity_model))
    if config.snippets is not None:
        scorers.append(_consistency(Path(config.snippets)))
    rows = [(m.name, protocol) for m in config.methods for protocol in config.protocols]
    for method, protocol in rows if scorers else ():
        for case in directory.cases_of(method, protocol):
            scores = dict(case["scores"])
            for scorer in scorers:
                scores |= scorer(case, requests[case["index"]])
            if scores != case["scores"]:
                file = directory.case(method, protocol, case["index"])
                write_json(file, {**case, "scores": scores})


class _Judge:
    """Grades answers, each once: every verdict is a file of the run."""

    def __init__(self, directory: RunDirectory, config: JudgeConfig) -> None:
        from openai import OpenAI

        self._directory, self._config = directory, config
        key = os.environ.get(config.key_variable) or "none"
        self._client = OpenAI(api_key=key, base_url=config.address, timeout=config.timeout_s)

    def scores(self, case: Case, request: Mapping[str, Any]) -> Scores:
        """Return the grades of a case's answers, without locality, where no target is wanted."""
        pairs = zip(wild_questions(request), case["wild"]["post"], strict=True)
        asked = [(question, answer) for question, answer in pairs if question.section != "locality"]
        grades = [self._grade(q.prompt, str(q.answer), answer) for q, answer in asked]
        means, _ = section_means([question for question, _ in asked], grades)
        return {f"wild.{SHORT[section]} judged": mean for section, mean in means.items()}

    def _grade(self, question: str, target: str, answer: str) -> float:
        """Return 1 for a correct answer, else 0."""
        if not answer:
            return 0.0
        model, text = self._config.model, _TASK.format(question, target, answer)
        told = {"judge": model, "question": question, "target": target, "answer": answer}
        kept = self._directory.kept(
            "verdicts", [model, text], lambda: {**told, "reply": self._reply(text)}, _Verdict
        )
        grade = _GRADE.fullmatch(kept["reply"])
        return float(grade is not None and grade[1].upper() == "A")

    def _reply(self, text: str) -> str:
        """Ask the judge for a reply that has a grade."""
        from openai import OpenAIError

        name = self._config.model
        messages: Any = [{"role": "user", "content": text}]
        try:
            reply = self._client.chat.completions.create(
                model=name, messages=messages, temperature=0.0
            )
            said = reply.choices[0].message.content or ""
        except (OpenAIError, AttributeError, IndexError, TypeError) as error:
            raise ConnectionError(
                f"judge must answer as {name} at {self._config.address}, with the key in "
                f"{self._config.key_variable} if it wants one; got "
                f"{type(error).__name__}: {error}. What was run and graded is kept, and the same "
                "command goes on from there"
            ) from None
        if _GRADE.fullmatch(said) is None:
            raise ValueError(
                f"judge must answer with the letter A or B; {name} said {short(said)}: name "
                "another model. What was run and graded is kept"
            )
        return said


def _similarity(model: str) -> _Scorer:
    """Return what compares long answers with their targets: the cosine of their embeddings."""
    from sentence_transformers import SentenceTransformer

    encoder: Any = SentenceTransformer(model, device="cpu", local_files_only=True)

    def scores(case: Case, request: Mapping[str, Any]) -> Scores:
        if not request.get("long_answer"):
            return {}
        titles = {"rewrite": "original", "rephrase": "para"}
        pairs = zip(questions_of(request), case["answers"]["post"], strict=False)
        found = {}
        for question, answer in pairs:
            if question.section in titles:
                a, b = encoder.encode([question.answer, answer], normalize_embeddings=True)
                found[f"long.{titles[question.section]} similarity"] = float(a @ b)
        return found

    return scores


class _Sample(Layout):
    """A reference text."""

    text: str


class _Snippets(Layout):
    """Texts about subjects that have the same answer to a relation."""

    relation_id: str
    target_id: str
    samples: tuple[_Sample, ...]


def _consistency(file: Path) -> _Scorer:
    """Return what compares written texts with reference texts: ROME's RS, the cosine of TF-IDF.

    The statistics are those of all snippets, as ROME collects them.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    snippets, _ = read_records(find_file(file, "attribute_snippets.json"), lambda _: _Snippets)
    texts: dict[tuple[str, str], list[str]] = {}
    for of_answer in snippets:
        key = of_answer.relation_id, of_answer.target_id
        texts.setdefault(key, []).extend(sample.text for sample in of_answer.samples)
    counts = TfidfVectorizer().fit(text for several in texts.values() for text in several)

    def scores(case: Case, request: Mapping[str, Any]) -> Scores:
        key = tuple((request.get("counterfact") or {}).get("reference", ()))
        written = case.get("texts") or {}
        if key not in texts or not written.get("post"):
            return {}
        shown = [" ".join(written[moment]) for moment in ("post", "pre")]
        post, pre, reference = counts.transform([*shown, " ".join(texts[key])])
        found = {"reference_score": post, "pre_reference_score": pre}
        return {name: float((row @ reference.T).sum()) for name, row in found.items()}

    return scores
