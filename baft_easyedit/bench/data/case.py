"""A case: one edit with its probes, whatever file it came from, as an EasyEdit request.

EasyEdit scores `prompt + ' ' + target`: texts lose the blanks at their ends, and an empty one is an
error.
"""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, StringConstraints

Text = Annotated[str, StringConstraints(strict=True, strip_whitespace=True, min_length=1)]
"""Text without blanks at its ends, not empty."""


def _texts(answer: Any) -> Iterator[Any]:
    """Walk `text`, `[text, ...]` or `[[alias, ...], ...]`, in order."""
    if not isinstance(answer, list | tuple):
        yield answer
        return
    if not answer:
        raise ValueError("a list of answers must not be empty")
    for part in answer:
        yield from _texts(part)


Answers = Annotated[
    tuple[Text, ...],
    BeforeValidator(lambda answer: tuple(_texts(answer))),
    AfterValidator(lambda texts: tuple(dict.fromkeys(texts))),
]
"""Accepted answers, each once; the first is the one that EasyEdit keeps."""


class Layout(BaseModel):
    """Part of a file; fields that it does not name are not read."""

    model_config = ConfigDict(frozen=True)


class Probe(Layout):
    """A prompt, and the answers that count as right."""

    prompt: Text
    ground_truth: Answers


Probes = dict[str, tuple[Probe, ...]]
"""Probes by kind, such as `neighborhood`; a kind may be missing or empty."""


Part = Literal["paraphrase", "neighborhood", "generation"]


class Case(Layout):
    """One edit with its probes."""

    case_id: int | str | None = None
    prompt: Text
    target_new: Text
    ground_truth: Answers | None = None
    subject: Text | None = None
    rephrase_prompt: Text | None = None
    loc_prompt: Answers | None = None
    locality: Probes | None = None
    portability: Probes | None = None
    counterfact: dict[Part, tuple[Text, ...]] | None = None
    """What CounterFact's scores by probability ask beside `prompt`; any part may be missing."""

    def as_request(self, index: int) -> dict[str, Any]:
        """Return the case as one of EasyEdit's request dicts.

        A probe is `{"prompt": [...], "ground_truth": [...], "aliases": [[...], ...]}`, its lists
        parallel: EasyEdit reads the first two, and `aliases` has all accepted answers. `subject`,
        `rephrase_prompt`, `loc_prompt` and `counterfact` are left out where there are none.

        Args:
            index: The `case_id` of a case that has none.
        """
        texts = self.loc_prompt or ()
        more = self.counterfact
        optional = {
            "subject": self.subject,
            "rephrase_prompt": self.rephrase_prompt,
            "loc_prompt": list(texts) if len(texts) > 1 else next(iter(texts), None),
            "counterfact": None if more is None else {k: [*v] for k, v in more.items() if v},
        }
        return {
            **(self.model_extra or {}),
            "case_id": index if self.case_id is None else self.case_id,
            "prompt": self.prompt,
            "target_new": self.target_new,
            "ground_truth": self.ground_truth[0] if self.ground_truth else None,
            **{key: value for key, value in optional.items() if value is not None},
            "locality": _parallel_lists(self.locality or {}),
            "portability": _parallel_lists(self.portability or {}),
        }


def _parallel_lists(probes: Mapping[str, tuple[Probe, ...]]) -> dict[str, dict[str, list[Any]]]:
    """Return probes in EasyEdit's form; kinds without a probe are left out."""
    return {
        kind: {
            "prompt": [probe.prompt for probe in members],
            "ground_truth": [probe.ground_truth[0] for probe in members],
            "aliases": [list(probe.ground_truth) for probe in members],
        }
        for kind, members in probes.items()
        if members
    }
