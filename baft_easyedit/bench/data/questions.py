"""Readers of benchmarks that ask what follows from an edit: MQuAKE, WikiBigEdit, HalluEditBench.

They take and raise what those in `readers` do.
"""

import csv
from collections import Counter
from collections.abc import Mapping
from io import StringIO
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from baft_easyedit.bench.data.case import Answers, Case, Layout, MaybeText, Probe, Text, Texts, one
from baft_easyedit.bench.data.files import Source, find_file, read_cases, read_file, read_records
from baft_easyedit.bench.data.readers import Rewrite
from baft_easyedit.files.messages import short
from baft_easyedit.files.paths import expanded, read_text
from baft_easyedit.files.validation import validated


class _Hop(Rewrite):
    """One link of a chain."""

    question: Text


class _Mquake(Layout):
    """Facts to rewrite, and questions that need them all."""

    case_id: int | str
    requested_rewrite: Annotated[tuple[_Hop, ...], Field(min_length=1)]
    questions: Annotated[Texts, Field(min_length=1)]
    new_answer: Text
    new_answer_alias: Texts = ()

    @property
    def asked(self) -> tuple[Probe, ...]:
        """The questions with all their answers."""
        answers = (self.new_answer, *self.new_answer_alias)
        return tuple(Probe(prompt=text, ground_truth=answers) for text in self.questions)

    def joined(self) -> Case:
        facts = [hop.case() for hop in self.requested_rewrite]
        return Case(
            case_id=self.case_id,
            prompt="".join(f"{fact.prompt}?" for fact in facts),
            target_new=",".join(fact.target_new for fact in facts),
            rephrase_prompt="".join(hop.question for hop in self.requested_rewrite),
            portability={"multi_hop": self.asked},
        )

    def cases(self) -> list[Case]:
        last = len(self.requested_rewrite) - 1
        return [
            hop.case(
                case_id=f"{self.case_id}-{i}",
                rephrase_prompt=hop.question,
                portability={"multi_hop": self.asked if i == last else ()},
            )
            for i, hop in enumerate(self.requested_rewrite)
        ]


def read_mquake(path: Path | None, *, joined: bool = False) -> Source:
    """Read MQuAKE, one edit per rewritten fact, or as EasyEdit joins the facts of a case into one.

    Each fact of a case is an edit of its own, with its question as the rephrased prompt; they
    follow each other, and the last one carries the case's multi-hop questions as
    `portability.multi_hop`. Those can only be answered where all facts of the case are edited and
    not yet restored: in continual or batched runs whose chunks hold whole cases. `case_id` is the
    file's with the number of the fact, such as `7417-0`.

    Args:
        path: The file.
        joined: Whether a case is one edit, without a subject: its prompts one behind the other,
            and its targets with commas between them, as in EasyEdit's MQuAKEDataset.
    """
    records, file = read_records(find_file(path), lambda _: _Mquake)
    if joined:
        return Source([record.joined() for record in records], [file], [])
    lengths = Counter(len(record.requested_rewrite) for record in records)
    counts = ", ".join(f"{lengths[n]} with {n}" for n in sorted(lengths))
    note = (
        f"cases by their number of facts: {counts}; the multi-hop questions are asked with a "
        "case's last fact, and need all of them edited in one chunk"
    )
    return Source([case for record in records for case in record.cases()], [file], [note])


class _WikiBigEdit(Layout):
    """A fact that changed, and what is asked of it; all but the fact may be missing."""

    update: Text
    ans: Text
    subject: MaybeText = None
    ground_truth: Answers = ()
    rephrase: MaybeText = None
    personas: MaybeText = None
    mhop: MaybeText = None
    mhop_ans: MaybeText = None
    loc: MaybeText = None
    loc_ans: MaybeText = None

    def case(self) -> Case:
        return Case(
            prompt=self.update,
            target_new=self.ans,
            ground_truth=self.ground_truth,
            subject=self.subject,
            rephrase_prompt=self.rephrase,
            locality={"locality": one(self.loc, self.loc_ans)},
            portability={
                "personas": one(self.personas, self.ans),
                "mhop": one(self.mhop, self.mhop_ans),
            },
        )


def read_wikibigedit(path: Path | None) -> Source:
    """Read WikiBigEdit as EasyEdit's WikiBigEditDataset does.

    Args:
        path: A file, or a directory of those of several periods, which follow each other by name:
            those of the benchmark begin alike and end in their dates.
    """
    files = sorted(expanded(path).glob("*.json")) if path is not None else []
    read = [read_cases(_WikiBigEdit, (), file) for file in files or [find_file(path)]]
    cases = [case for source in read for case in source.cases]
    return Source(cases, [file for source in read for file in source.files], [])


_ASKED = {
    "industry": "What is the industry of {}?",
    "headquarters": "Where is the headquarters of {}?",
    "location": "Where is the headquarters of {}?",
    "founded": "When was {} founded?",
    "founder": "Who founded {}?",
}
"""Prompts of relations that have these words in their names; EasyEdit's."""


def read_halluedit(path: Path | None) -> Source:
    """Read a CSV file of HalluEditBench with the prompts of EasyEdit's class of that name.

    The multi-hop questions are `portability`. Yes, no, multiple-choice and reversed questions, and
    that on another fact, are `probes`. A multiple-choice question begins with the question itself,
    as in EasyEdit's run_Hallueditbench.py.
    """
    table = find_file(path)
    _, file = read_file(table)
    text = read_text(table).removeprefix("\ufeff")
    try:
        lines = [line for line in csv.reader(StringIO(text, newline=""), strict=True) if line]
    except csv.Error as error:
        raise ValueError(f"{file.name} must be CSV, and is not: {error}") from None
    columns, rows = (lines or [[]])[0], lines[1:]
    missing = {"subject", "relation", "object"} - {*columns}
    if missing or not rows:
        raise ValueError(
            f"{file.name} must be CSV with the columns subject, relation and object, and a row; "
            f"got {len(rows)} rows with the columns {short(columns)}"
        )
    if len({*columns}) < len(columns):
        raise ValueError(f"{file.name} must have each column once; got {short(columns)}")
    cases = []
    for i, row in enumerate(rows):
        if len(row) > len(columns):
            raise ValueError(
                f"{file.name}, record {i}: no more than {len(columns)} values must be there, one a "
                f"column; got {len(row)}: put a value with a comma in quotes"
            )
        values = dict(zip_longest(columns, row))
        cases.append(validated(Case, _halluedit(values), f"{file.name}, record {i}"))
    return Source(cases, [file], [])


def _halluedit(row: Mapping[str, Any]) -> dict[str, Any]:
    subject, relation, answer = row["subject"], row["relation"] or "", row["object"]
    other = f"What is the {relation} of {{}}?"
    template = next((text for word, text in _ASKED.items() if word in relation.lower()), other)
    prompt = template.replace("{}", subject) if subject else ""
    choices = row.get("multiple_choice_with_letters")
    asked = {
        "yes": one(row.get("yes_question"), "Yes"),
        "no": one(row.get("no_question"), "No"),
        "mcq": one(
            choices and f"{row.get('question') or prompt} {choices}",
            row.get("multiple_choice_labels"),
        ),
        "reversed": one(row.get("reversed_relation_question"), subject),
    }
    unrelated = Probe(prompt=row.get("locality_question"), ground_truth=())
    return {
        "prompt": prompt,
        "target_new": answer,
        "ground_truth": answer,
        "subject": subject,
        "rephrase_prompt": row.get("paraphrased_question"),
        "portability": {
            f"{n}hop": one(row.get(f"question_{n}hop"), row.get(f"answer_{n}hop"))
            for n in range(2, 7)
        },
        "probes": {**asked, "locality": (unrelated,) if unrelated.prompt else ()},
    }
