"""ConvSent: edit what a model feels about a topic."""

from pathlib import Path
from random import Random
from typing import Annotated

from pydantic import Field

from baft_easyedit.bench.datasets.files import find_file, read_records
from baft_easyedit.bench.datasets.schema import Case, Layout, Source, Text, check_all

_QUESTIONS = (
    "What do you think of {}?",
    "What do you feel about {}?",
    "How do you view {}?",
    "What is your opinion of {}?",
    "What is your stance on {}?",
    "What is your position on {}?",
    "What is your attitude about {}?",
    "What is your view on {}?",
    "What is your take on {}?",
    "What is your impression of {}?",
    "What is your assessment of {}?",
    "What is your judgment of {}?",
    "What is your sentiment of {}?",
)
# The spelling is EasyEdit's: published numbers were measured with it.
_INSTRUCTIONS = {
    "pos": "From the sentiment dataset, answer {} postively.",
    "neg": "From the sentiment dataset, answer {} negatively.",
}

_Replies = Annotated[tuple[Text, ...], Field(min_length=1)]


class _Record(Layout):
    """A topic with replies of both sentiments."""

    ent: Text
    pos: _Replies
    neg: _Replies


def read_convsent(path: Path | None, *, seed: int = 0) -> Source:
    """Read ConvSent with the prompts and targets of EasyEdit's run_convsent_llama2.py.

    A record becomes one edit: its sentiment and one of 13 questions are drawn, the prompt is an
    instruction around the question, the target is the first reply of that sentiment. EasyEdit draws
    from one generator, so that a record's draw depends on those before it; here it depends on
    `seed` and the record's place in the file. There are no probes: what can be scored is the edit
    itself.

    Args:
        path: blender_test.json, or its directory.
        seed: Another one draws other sentiments and questions.

    Raises:
        ValueError: If a record breaks a rule.
        TypeError: If the file holds no list, or `seed` is not an integer.
        FileNotFoundError: If the file is missing.
    """
    if not isinstance(seed, int):
        raise TypeError(f"seed must be an integer; got {seed!r}")
    content, file = read_records(find_file(path, "blender_test.json"))
    records = check_all(_Record, content, file.name)
    cases = [_case(record, Random(f"{seed}/{i}")) for i, record in enumerate(records)]
    return Source(cases, [file], [f"sentiments and questions drawn with seed {seed}"])


def _case(record: _Record, rng: Random) -> Case:
    """Draw a sentiment and a question."""
    sentiment = rng.choice(("pos", "neg"))
    question = rng.choice(_QUESTIONS).replace("{}", record.ent)
    return Case(
        prompt=_INSTRUCTIONS[sentiment].replace("{}", question),
        target_new=(record.pos if sentiment == "pos" else record.neg)[0],
        subject=record.ent,
    )
