"""Scores of generated text that other papers print: WILD's, and the words of long answers.

WILD is the evaluation of Yang et al. 2025: a question is asked in a context, the answer ends where
the model ends it or at its first full stop or line, and is compared with the whole target.
"""

import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

from baft_easyedit.bench.questions import Question, section_means, wild_questions

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
WILD_TOKENS = 50
"""Most tokens of an answer."""
SHORT = {"rewrite": "Rel", "rephrase": "Gen", "locality": "Loc", "portability": "Por"}
"""Titles of the scores of each section."""


def normalised(text: str) -> str:
    """Return text in lower case, without punctuation and articles, as SQuAD compares answers."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def contains(answer: str, target: str) -> bool:
    """Tell whether an answer has the target in it, whatever case, punctuation and articles."""
    return f" {normalised(target)} " in f" {normalised(answer)} "


def first_sentence(text: str) -> str:
    """Cut an answer where WILD stops it: at its first full stop or line."""
    return re.split(r"[.\n]", text, maxsplit=1)[0].strip()


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
