"""A case: one edit with its probes, whatever file it came from, as an EasyEdit request.

EasyEdit scores `prompt + ' ' + target`: texts lose the blanks at their ends, and an empty one is an
error.
"""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, StringConstraints

Text = Annotated[str, StringConstraints(strict=True, strip_whitespace=True, min_length=1)]
"""Text without blanks at its ends, not empty."""


def _texts(answer: Any) -> Iterator[Any]:
    """Walk `text`, `[text, ...]` or `[[alias, ...], ...]`, in order, without what is blank."""
    if isinstance(answer, list | tuple):
        for part in answer:
            yield from _texts(part)
    elif not _is_blank(answer):
        yield answer


def _is_blank(text: Any) -> bool:
    """Tell whether a field says nothing; pandas writes NaN for that."""
    return text is None or text != text or (isinstance(text, str) and not text.strip())


MaybeText = Annotated[Text | None, BeforeValidator(lambda text: None if _is_blank(text) else text)]
"""Text of a part that a record may lack; an empty one is as none."""
Texts = Annotated[tuple[Text, ...], BeforeValidator(lambda texts: tuple(_texts(texts)))]
"""Texts in one list, without empty ones."""
Answers = Annotated[Texts, AfterValidator(lambda texts: tuple(dict.fromkeys(texts)))]
"""Accepted answers, each once; the first is the one that EasyEdit keeps. May be none."""


class Layout(BaseModel):
    """Part of a file; fields that it does not name are not read."""

    model_config = ConfigDict(frozen=True)


class Probe(Layout):
    """A prompt, and the answers that count as right; one that lacks either is not asked."""

    prompt: MaybeText
    ground_truth: Answers

    @property
    def is_whole(self) -> bool:
        """Whether it has both."""
        return bool(self.prompt and self.ground_truth)


def none_is_empty(probes: Any) -> Any:
    """Return probes, or an empty mapping for null."""
    return {} if probes is None else probes


Probes = Annotated[dict[str, tuple[Probe, ...]], BeforeValidator(none_is_empty)]
"""Probes by kind, such as `neighborhood`; a kind may be missing or empty."""


def one(prompt: str | None, *answers: str | None) -> tuple[Probe, ...]:
    """Return a probe as the only one of its kind; none if it lacks its prompt or its answers."""
    probe = Probe.model_validate({"prompt": prompt, "ground_truth": answers})
    return (probe,) if probe.is_whole else ()


Part = Literal["paraphrase", "neighborhood", "generation", "reference"]
"""`reference` is no prompts but names the relation and the new answer in ROME's reference texts."""


class Case(Layout):
    """One edit with its probes."""

    case_id: int | str | None = None
    prompt: Text
    target_new: Text
    ground_truth: Answers = ()
    subject: MaybeText = None
    rephrase_prompt: MaybeText = None
    loc_prompt: Answers = ()
    locality: Probes = {}
    portability: Probes = {}
    probes: Probes = {}
    """What is asked by generation only; a probe without an answer asks for that of before."""
    long_answer: bool = False
    """Whether answers are compared by the words that they share with the target."""
    counterfact: dict[Part, tuple[Text, ...]] | None = None
    """What CounterFact's scores by probability ask beside `prompt`; any part may be missing."""

    def case(self) -> "Case":
        """Return the case of a record; other layouts make theirs."""
        return self

    def as_request(self, index: int) -> dict[str, Any]:
        """Return the case as one of EasyEdit's request dicts; `index` is for one without `case_id`.

        A probe is `{"prompt": [...], "ground_truth": [...], "aliases": [[...], ...]}`, its lists
        parallel: EasyEdit reads the first two, and `aliases` has all accepted answers. `subject`,
        `rephrase_prompt`, `loc_prompt`, `counterfact`, `probes` and `long_answer` are left out
        where there are none.
        """
        texts, more = self.loc_prompt, self.counterfact
        optional = {
            "subject": self.subject,
            "rephrase_prompt": self.rephrase_prompt,
            "loc_prompt": list(texts) if len(texts) > 1 else next(iter(texts), None),
            "counterfact": None if more is None else {k: [*v] for k, v in more.items() if v},
            "probes": _parallel_lists(self.probes, needs_answer=False) or None,
            "long_answer": self.long_answer or None,
        }
        return {
            **(self.model_extra or {}),
            "case_id": index if self.case_id is None else self.case_id,
            "prompt": self.prompt,
            "target_new": self.target_new,
            "ground_truth": next(iter(self.ground_truth), None),
            **{key: value for key, value in optional.items() if value is not None},
            "locality": _parallel_lists(self.locality),
            "portability": _parallel_lists(self.portability),
        }

    @property
    def num_left_out(self) -> int:
        """Probes that lack their prompt or their answers."""
        kinds = [*self.locality.values(), *self.portability.values()]
        return sum(not probe.is_whole for probes in kinds for probe in probes)


def _parallel_lists(probes: Probes, needs_answer: bool = True) -> dict[str, dict[str, list[Any]]]:
    """Return probes in EasyEdit's form, without kinds that have none.

    A probe without an answer is left out, or has None in its place.
    """
    lists: dict[str, dict[str, list[Any]]] = {}
    for kind, members in probes.items():
        asked = [p for p in members if p.prompt and (p.ground_truth or not needs_answer)]
        answers: list[Any] = [[*p.ground_truth] or [None] for p in asked]
        if asked:
            lists[kind] = {
                "prompt": [probe.prompt for probe in asked],
                "ground_truth": [accepted[0] for accepted in answers],
                "aliases": answers,
            }
    return lists
