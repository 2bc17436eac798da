"""What a case is asked: its prompt, its rephrasing and its probes; and means over them."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from statistics import fmean
from typing import Any, NamedTuple


class Question(NamedTuple):
    """One prompt that a case is asked."""

    section: str
    """rewrite, rephrase, locality, portability or probes."""
    key: str
    prompt: str
    answer: str | None
    """None: the answer of before the edits is wanted, as it is for locality."""

    def wanted(self, before: str) -> str:
        """Return the answer that is right, from that of the unedited model."""
        is_kept = self.section == "locality" or self.answer is None
        return before if is_kept else str(self.answer).strip()


def questions_of(request: Mapping[str, Any]) -> list[Question]:
    """Return what a case is asked by generation."""
    target = request["target_new"]
    asked = [Question("rewrite", "", request["prompt"], target)]
    if request.get("rephrase_prompt"):
        asked.append(Question("rephrase", "", request["rephrase_prompt"], target))
    for section in ("locality", "portability", "probes"):
        for key, probe in (request.get(section) or {}).items():
            pairs = zip(probe["prompt"], probe["ground_truth"], strict=True)
            asked += [Question(section, key, prompt, truth) for prompt, truth in pairs]
    return asked


def wild_questions(request: Mapping[str, Any]) -> list[Question]:
    """Return what a case is asked in WILD's context."""
    return [question for question in questions_of(request) if question.section != "probes"]


def section_means(
    questions: Iterable[Question], values: Iterable[float]
) -> tuple[dict[str, float], dict[tuple[str, str], float]]:
    """Average a number of each question over kinds, then over sections.

    Returns:
        By section the mean over kinds of means over questions; and by section and kind the latter.
    """
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    for question, value in zip(questions, values, strict=True):
        found[question.section, question.key].append(value)
    kinds = {kind: fmean(of_kind) for kind, of_kind in found.items()}
    sections: dict[str, list[float]] = defaultdict(list)
    for (section, _), mean in kinds.items():
        sections[section].append(mean)
    return {section: fmean(means) for section, means in sections.items()}, kinds
