"""The scores of other papers' tables: CounterFact's by probability and fluency, ZsRE's specificity.

CounterFact's are those of ROME and MEMIT (Meng et al. 2022, 2023), which AlphaEdit has too.
Specificity is accuracy against the gold answers of locality probes, which AlphaEdit and UltraEdit
call Spe on ZsRE: not agreement with the unedited model.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from math import exp, log2
from statistics import fmean
from typing import Any

import torch

from baft_easyedit.bench.questions import Question, questions_of, section_means
from baft_easyedit.easyedit.likelihoods import Likelihood
from baft_easyedit.easyedit.session import Session
from baft_easyedit.model.prompt_format import PromptFormat

Request = Mapping[str, Any]
Asked = tuple[str, str, bool]
"""A prompt, an answer, and whether it is about other facts than the edit."""
Found = Mapping[Asked, Likelihood]

_WORD = re.compile(r"\w+(?:[-./]\w+|[,:]\d+)*|'\w+|[^\w\s]")
"""As NLTK's `word_tokenize` parts English, which needs files of its own."""
_BY_PROBABILITY = ("rewrite", "paraphrase", "neighborhood")
_TEXT_LENGTH, _TOP_K = 100, 5
"""Tokens of a text whose fluency is measured, its prompt among them, and what each is drawn of."""


def field_scores(
    session: Session, requests: Sequence[Request], with_texts: bool
) -> list[dict[str, Any]]:
    """Score requests on the model as it is now, which writes texts for their fluency if wanted.

    Returns:
        The names of `scores.FIELD_SCORES` that each case has the parts for; `texts`, those written.
    """
    asked = list(dict.fromkeys(q for request in requests for q in _questions(request)))
    found = dict(zip(asked, session.likelihoods(asked), strict=True)) if asked else {}
    scored: list[dict[str, Any]] = [
        {**_counterfact(request, found), **_specificity(request, found)} for request in requests
    ]
    for request, scores in zip(requests, scored, strict=True):
        prompts = _parts(request).get("generation")
        if with_texts and prompts:
            scores["texts"] = _texts(session, prompts)
            scores["ngram_entropy"] = fmean(map(ngram_entropy, scores["texts"]))
    return scored


def _parts(request: Request) -> Mapping[str, Sequence[str]]:
    """Return CounterFact's prompts by kind; empty for other data, and without a true answer."""
    parts = request.get("counterfact")
    if parts is None or request["ground_truth"] is None:
        return {}
    return {"rewrite": [request["prompt"]], **parts}


def _questions(request: Request) -> Iterator[Asked]:
    parts = _parts(request)
    for part in _BY_PROBABILITY:
        for answer in (request["target_new"], request["ground_truth"]) if parts else ():
            yield from ((p, answer, part == "neighborhood") for p in parts.get(part, ()))
    yield from ((q.prompt, str(q.answer), True) for q in _locality(request))


def _locality(request: Request) -> list[Question]:
    return [question for question in questions_of(request) if question.section == "locality"]


def _counterfact(request: Request, found: Found) -> dict[str, float]:
    """Return success (the wanted answer is likelier) and magnitude (by how much) of each part."""
    scores = {}
    for part, prompts in _parts(request).items():
        if part not in _BY_PROBABILITY:
            continue
        is_local = part == "neighborhood"
        answers = [request["target_new"], request["ground_truth"]]
        wanted, other = reversed(answers) if is_local else answers
        pairs = [(found[p, wanted, is_local].nll, found[p, other, is_local].nll) for p in prompts]
        scores[f"{part}_success"] = fmean(float(a < b) for a, b in pairs)
        scores[f"{part}_magnitude"] = fmean(exp(-a) - exp(-b) for a, b in pairs)
    return scores


def _specificity(request: Request, found: Found) -> dict[str, float]:
    """Return the accuracy of the locality probes, a mean over kinds; none where there are none."""
    asked = _locality(request)
    hits = [found[q.prompt, str(q.answer), True].accuracy for q in asked]
    sections, _ = section_means(asked, hits)
    return {"specificity_acc": sections["locality"]} if asked else {}


def _texts(session: Session, prompts: Sequence[str]) -> list[str]:
    """Let the model go on with prompts; the same draws each time, and nobody else's change."""
    form, tok = PromptFormat.of(session.editor.hparams), session.editor.tok
    rows = [form.prompt_ids(prompt, tok) for prompt in prompts]
    limits = [max(1, _TEXT_LENGTH - len(row)) for row in rows]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        written = session.answers(rows, limits, _TOP_K)
    return [f"{prompt} {text}" for prompt, text in zip(prompts, written, strict=True)]


def ngram_entropy(text: str) -> float:
    """Return ROME's fluency of a text: entropies of its bigrams and trigrams, weighted, in bits.

    Low where a text repeats itself.
    """
    words = _WORD.findall(text)
    return fmean(weight * _entropy(words, n) for n, weight in ((2, 2 / 3), (3, 4 / 3)))


def _entropy(words: Sequence[str], n: int) -> float:
    """Return the entropy of a text's n-grams; 0 if it has none."""
    counts = Counter(zip(*(words[i:] for i in range(n)), strict=False))
    total = counts.total()
    return sum(count / total * log2(total / count) for count in counts.values())
