"""Scores of generated text: exact match, and those that other papers print.

WILD is the evaluation of Yang et al. 2025: a question is asked in a context, the answer ends where
the model ends it or at its first full stop or line, and is compared with the whole target.
"""

import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

from baft_easyedit.bench.questions import Question, questions_of, section_means, wild_questions
from baft_easyedit.bench.scores import SHORT
from baft_easyedit.model.prompt_format import is_unspaced

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
WILD_TOKENS = 50
"""Most tokens of an answer."""


def normalised(text: str) -> str:
    """Return text in lower case, without punctuation and articles, as SQuAD compares answers.

    Where nothing else is in it, these stay: the option `A` is no empty answer.
    """
    words = text.lower().translate(_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", words).split() or words.split() or text.split())


def contains(answer: str, target: str) -> bool:
    """Tell whether an answer has the target in it, whatever case, punctuation and articles.

    It must be there in whole words; in a script without spaces between words, in whole characters.
    A target of articles or punctuation alone must be there as it is written.
    """
    if not _ARTICLES.sub(" ", target.lower().translate(_PUNCTUATION)).strip():
        own, given = (" ".join(re.findall(r"\w+|[^\w\s]", text)) for text in (target, answer))
        return f" {own} " in f" {given} "
    return f" {_words(target)} " in f" {_words(answer)} "


def _words(text: str) -> str:
    """Return normalised text in which each character of a script without spaces is a word."""
    return normalised("".join(f" {c} " if is_unspaced(c) else c for c in text))


def first_sentence(text: str) -> str:
    """Cut an answer where WILD stops it: at its first full stop or line."""
    return re.split(r"[.\n]", text, maxsplit=1)[0].strip()


def generation_scores(
    request: Mapping[str, Any], before: Sequence[str], after: Sequence[str]
) -> dict[str, float | None]:
    """Score answers: exact match with the target, or for locality with the answer before the edit.

    Returns:
        The `gen_*` scores, means over prompts, then over keys; those of each kind, of probes also
        how often an answer contains what is wanted; and those of long answers.
    """
    questions = questions_of(request)
    wanted = [q.wanted(old) for q, old in zip(questions, before, strict=True)]
    pairs = list(zip(after, wanted, strict=True))
    sections, kinds = section_means(questions, [float(new == right) for new, right in pairs])
    _, within = section_means(questions, [float(contains(new, right)) for new, right in pairs])
    named = {
        f"probes.{key}" if section == "probes" else f"exact.{SHORT[section]}: {key}": value
        for (section, key), value in kinds.items()
        if key
    }
    contained = {
        f"contained.{q.key}": within[q.section, q.key]
        for q in questions
        if q.section == "probes" and q.answer is not None
    }
    return {
        **{f"gen_{section}_acc": sections.get(section) for section in SHORT},
        **named,
        **contained,
        **(long_scores(questions, after) if request.get("long_answer") else {}),
    }


def wild_scores(
    request: Mapping[str, Any], before: Sequence[str], after: Sequence[str]
) -> dict[str, float]:
    """Score answers by exact match and containment; locality by the same answer as before."""
    questions = wild_questions(request)
    wanted = [q.wanted(old) for q, old in zip(questions, before, strict=True)]
    pairs = list(zip(after, wanted, strict=True))
    equal, _ = section_means(questions, [float(normalised(a) == normalised(w)) for a, w in pairs])
    within, _ = section_means(questions, [float(contains(a, w)) for a, w in pairs])
    within.pop("locality", None)
    return {
        **{f"wild.{SHORT[section]} EM": value for section, value in equal.items()},
        **{f"wild.{SHORT[section]} contained": value for section, value in within.items()},
    }


def long_scores(questions: Sequence[Question], after: Sequence[str]) -> dict[str, float]:
    """Score long answers by the words they share with the targets, as EasyEdit scores UnKE.

    ROUGE is recall. BLEU is of letters, not of words, for EasyEdit hands NLTK texts in place of
    lists of words. The short questions on parts of the answer have no BLEU.
    """
    titles = {"rewrite": "original", "rephrase": "para", "probes": "sub"}
    asked = [(q, a) for q, a in zip(questions, after, strict=True) if q.section in titles]
    found = [_overlap(answer, str(q.answer)) for q, answer in asked]
    scores: dict[str, float] = {}
    for name in found[0]:
        means, _ = section_means([q for q, _ in asked], [overlap[name] for overlap in found])
        scores |= {f"long.{titles[section]} {name}": value for section, value in means.items()}
    scores.pop("long.sub BLEU", None)
    return scores


def _overlap(answer: str, target: str) -> dict[str, float]:
    """Return BLEU and ROUGE of an answer by the libraries that EasyEdit takes."""
    from nltk.translate.bleu_score import sentence_bleu
    from rouge import Rouge

    shown = answer if " " in answer else f"{answer} "
    recalls = Rouge().get_scores(shown, target)[0]
    rouge = {f"ROUGE-{n.upper()}": recalls[f"rouge-{n}"]["r"] for n in ("1", "2", "l")}
    return {"BLEU": float(sentence_bleu([target], shown)), **rouge}
