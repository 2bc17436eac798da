"""What all readers share: checked texts, answers and probes, and a case as an EasyEdit request.

A reader describes its file's records as a `Layout`, whose errors name the file's own fields, and
turns each into `Case`s. EasyEdit scores `prompt + ' ' + target`, so texts lose the blanks at their
ends; an empty one is an error.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, NamedTuple, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    StringConstraints,
    ValidationError,
)

from baft_easyedit.bench.datasets.files import FileHash
from baft_easyedit.files.messages import cut, short

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
    """A record of a file, checked; fields that it does not name are not read."""

    model_config = ConfigDict(frozen=True)


class Probe(Layout):
    """A prompt, and the answers that count as right."""

    prompt: Text
    ground_truth: Answers


Probes = dict[str, tuple[Probe, ...]]
"""Probes by kind, such as `neighborhood`; a kind may be missing or empty."""


class Case(Layout):
    """One edit with its probes, whatever file it came from."""

    model_config = ConfigDict(extra="forbid")

    case_id: int | str | None = None
    prompt: Text
    target_new: Text
    ground_truth: Answers | None = None
    subject: Text | None = None
    rephrase_prompt: Text | None = None
    loc_prompt: Answers | None = None
    locality: Probes | None = None
    portability: Probes | None = None

    def as_request(self, index: int) -> dict[str, Any]:
        """Return the case as one of EasyEdit's request dicts.

        A probe is `{"prompt": [...], "ground_truth": [...], "aliases": [[...], ...]}`, its lists
        parallel: EasyEdit reads the first two, and `aliases` has all accepted answers. `subject`,
        `rephrase_prompt` and `loc_prompt` are left out where there are none.

        Args:
            index: The `case_id` of a case that has none.
        """
        optional = {
            "subject": self.subject,
            "rephrase_prompt": self.rephrase_prompt,
            "loc_prompt": _one_or_list(self.loc_prompt),
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


def _one_or_list(texts: tuple[str, ...] | None) -> str | list[str] | None:
    """Return one text as it is, several as a list."""
    return texts[0] if texts and len(texts) == 1 else list(texts) if texts else None


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


class Source(NamedTuple):
    """What a reader makes of its files."""

    cases: Sequence[Case]
    files: list[FileHash]
    notes: list[str]


L = TypeVar("L", bound=Layout)


def check(layout: type[L], record: Any, place: str) -> L:
    """Read a record.

    Args:
        layout: What it must look like.
        record: What was parsed from JSON.
        place: File and record, for errors.

    Raises:
        ValueError: If the record breaks a rule; the message names the place, the field, the rule
            and what was found.
    """
    try:
        return layout.model_validate(record)
    except ValidationError as error:
        problems = error.errors(include_url=False)
        field = ".".join(map(str, problems[0]["loc"])) or "the record"
        rule = problems[0]["msg"].removeprefix("Value error, ")
        others = f" (and {len(problems) - 1} more problems)" if len(problems) > 1 else ""
        found = short(problems[0]["input"])
        raise ValueError(f"{place}: {cut(field, 200)}: {rule}; got {found}{others}") from None


def check_all(layout: type[L], records: list[Any], file: str) -> list[L]:
    """Read all records of a file, numbered from 0 in errors.

    Raises:
        ValueError: As `check`.
    """
    return [check(layout, record, f"{file}, record {i}") for i, record in enumerate(records)]
