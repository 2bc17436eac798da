"""CounterFact and MQuAKE, whose records hold ROME's `requested_rewrite`."""

from collections import Counter
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from baft_easyedit.bench.datasets.files import find_file, read_records
from baft_easyedit.bench.datasets.schema import (
    Case,
    Layout,
    Probe,
    Source,
    Text,
    check,
    check_all,
)


def _with_one_slot(template: str) -> str:
    """Return a template, checked."""
    if template.count("{}") != 1:
        raise ValueError("must have one {} for the subject")
    return template


class _Entity(Layout):
    """An answer; its Wikidata identifier is not read."""

    text: Text = Field(alias="str")


class _Rewrite(Layout):
    """A fact to rewrite."""

    prompt: Annotated[Text, AfterValidator(_with_one_slot)]
    subject: Text
    target_new: _Entity
    target_true: _Entity

    @property
    def filled_prompt(self) -> str:
        """The prompt about its subject."""
        return self.prompt.replace("{}", self.subject)


_Texts = Annotated[tuple[Text, ...], Field(min_length=1)]


class _RomeRecord(Layout):
    """CounterFact as ROME publishes it."""

    case_id: int | str
    requested_rewrite: _Rewrite
    paraphrase_prompts: _Texts
    neighborhood_prompts: _Texts


class _FlatRecord(Layout):
    """CounterFact as EasyEdit's CounterFactDataset reads it."""

    case_id: int | str | None = None
    prompt: Text
    target_new: Text
    ground_truth: Text
    subject: Text | None = None
    rephrase_prompt: Text
    locality_prompt: Text
    locality_ground_truth: Text


def read_counterfact(path: Path | None) -> Source:
    """Read CounterFact, as ROME publishes it or as EasyEdit flattens it.

    ROME's neighbours share the true answer, which is what the probes `neighborhood` give; the first
    paraphrase is the rephrased prompt; other paraphrases, attributes and generation prompts are not
    read.

    Args:
        path: The file.

    Raises:
        ValueError: If a record breaks a rule.
        TypeError: If the file holds no list.
        FileNotFoundError: If the file is missing.
    """
    records, file = read_records(find_file(path))
    cases = [_counterfact(record, f"{file.name}, record {i}") for i, record in enumerate(records)]
    return Source(cases, [file], [])


def _counterfact(content: Any, place: str) -> Case:
    """Turn a record of either layout into a case."""
    if isinstance(content, dict) and "requested_rewrite" in content:
        record = check(_RomeRecord, content, place)
        rewrite = record.requested_rewrite
        true_answer = (rewrite.target_true.text,)
        neighbours = [
            Probe(prompt=text, ground_truth=true_answer) for text in record.neighborhood_prompts
        ]
        return Case(
            case_id=record.case_id,
            prompt=rewrite.filled_prompt,
            target_new=rewrite.target_new.text,
            ground_truth=true_answer,
            subject=rewrite.subject,
            rephrase_prompt=record.paraphrase_prompts[0],
            locality={"neighborhood": tuple(neighbours)},
        )
    flat = check(_FlatRecord, content, place)
    neighbour = Probe(prompt=flat.locality_prompt, ground_truth=(flat.locality_ground_truth,))
    return Case(
        case_id=flat.case_id,
        prompt=flat.prompt,
        target_new=flat.target_new,
        ground_truth=(flat.ground_truth,),
        subject=flat.subject,
        rephrase_prompt=flat.rephrase_prompt,
        locality={"neighborhood": (neighbour,)},
    )


class _Hop(_Rewrite):
    """One link of a chain."""

    question: Text


class _ChainRecord(Layout):
    """A record of MQuAKE: facts to rewrite, and questions that need them all."""

    case_id: int | str
    requested_rewrite: Annotated[tuple[_Hop, ...], Field(min_length=1)]
    questions: _Texts
    new_answer: Text
    new_answer_alias: tuple[Text, ...] = ()


def read_mquake(path: Path | None) -> Source:
    """Read MQuAKE, one edit per rewritten fact.

    EasyEdit's MQuAKEDataset joins the prompts of a case, and its targets, into one edit. Here each
    fact of a case is an edit of its own, with its question as the rephrased prompt; they follow
    each other, and the last one carries the case's multi-hop questions as `portability.multi_hop`.
    Those can only be answered where all facts of the case are edited and not yet restored: in
    continual or batched runs whose chunks hold whole cases. `case_id` is the file's with the number
    of the fact, such as `7417-0`.

    Args:
        path: The file.

    Raises:
        ValueError: If a record breaks a rule.
        TypeError: If the file holds no list.
        FileNotFoundError: If the file is missing.
    """
    content, file = read_records(find_file(path))
    records = check_all(_ChainRecord, content, file.name)
    lengths = Counter(len(record.requested_rewrite) for record in records)
    facts = ", ".join(f"{lengths[n]} with {n}" for n in sorted(lengths))
    note = (
        f"cases by their number of facts: {facts}; the multi-hop questions are asked with a case's "
        "last fact, and need all of them edited in one chunk"
    )
    return Source([case for record in records for case in _chain(record)], [file], [note])


def _chain(record: _ChainRecord) -> list[Case]:
    """Turn a record into its edits; the last one has the questions."""
    answers = (record.new_answer, *record.new_answer_alias)
    questions = tuple(Probe(prompt=text, ground_truth=answers) for text in record.questions)
    last = len(record.requested_rewrite) - 1
    return [
        Case(
            case_id=f"{record.case_id}-{i}",
            prompt=hop.filled_prompt,
            target_new=hop.target_new.text,
            ground_truth=(hop.target_true.text,),
            subject=hop.subject,
            rephrase_prompt=hop.question,
            portability={"multi_hop": questions} if i == last else None,
        )
        for i, hop in enumerate(record.requested_rewrite)
    ]
