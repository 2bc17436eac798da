"""ZsRE as MEND and WISE lay it out: one file to edit, another one for irrelevant prompts."""

from itertools import cycle
from pathlib import Path
from typing import Annotated

from pydantic import Field, StringConstraints

from baft_easyedit.bench.datasets.files import FileHash, find_file, read_records
from baft_easyedit.bench.datasets.schema import (
    Answers,
    Case,
    Layout,
    Probe,
    Source,
    Text,
    check_all,
)

_EDIT_FILE, _TRAIN_FILE = "zsre_mend_edit.json", "zsre_mend_train.json"


class _Irrelevant(Layout):
    """The part of a record that is read as an irrelevant prompt."""

    loc: Text
    loc_ans: Text


class _OneHop(Layout):
    """A question whose answer follows from the edit."""

    prompt: Text = Field(alias="New Question")
    answer: Answers = Field(alias="New Answer")


class _Record(_Irrelevant):
    """A record to edit."""

    subject: Text
    src: Text
    alt: Annotated[str, StringConstraints(strict=True, strip_whitespace=True)]
    answers: Answers
    rephrase: Text
    portability: _OneHop | None = None


def read_zsre(path: Path | None, *, loc_prompts: bool = True) -> Source:
    """Read ZsRE as EasyEdit's run_wise_editing.py does.

    `loc_prompt` of record i is `loc` and `loc_ans` of the train file's record i, which starts again
    at its end where EasyEdit would shuffle. Records with an empty `alt` are skipped, as EasyEdit's
    ZsreDataset does.

    Args:
        path: The directory of zsre_mend_edit.json and zsre_mend_train.json, or a file to edit with
            the train file beside it.
        loc_prompts: Whether to read the train file at all.

    Raises:
        ValueError: If a record breaks a rule.
        TypeError: If a file holds no list, or `loc_prompts` is not a bool.
        FileNotFoundError: If a file is missing.
    """
    if not isinstance(loc_prompts, bool):
        raise TypeError(f"loc_prompts must be true or false; got {loc_prompts!r}")
    edit_file = find_file(path, _EDIT_FILE)
    content, file = read_records(edit_file)
    records = check_all(_Record, content, file.name)
    files, notes = [file], []
    texts: list[str] = []
    if loc_prompts:
        texts, train_file = _read_loc_prompts(edit_file.with_name(_TRAIN_FILE))
        files.append(train_file)
        if len(texts) < len(records):
            notes.append(f"{len(texts)} loc prompts are used in turn for {len(records)} records")
    skipped = [i for i, record in enumerate(records) if not record.alt]
    if skipped:
        notes.append(f"records skipped, for their alt is empty: {skipped}")
    pairs = zip(records, cycle(texts or [None]), strict=False)
    cases = [_case(i, record, text) for i, (record, text) in enumerate(pairs) if record.alt]
    return Source(cases, files, notes)


def _read_loc_prompts(path: Path) -> tuple[list[str], FileHash]:
    """Read the irrelevant prompts with their answers."""
    content, file = read_records(find_file(path))
    return [f"{r.loc} {r.loc_ans}" for r in check_all(_Irrelevant, content, file.name)], file


def _case(index: int, record: _Record, loc_prompt: str | None) -> Case:
    """Turn a record into a case."""
    one_hop = record.portability
    portability = Probe(prompt=one_hop.prompt, ground_truth=one_hop.answer) if one_hop else None
    return Case(
        case_id=index,
        prompt=record.src,
        target_new=record.alt,
        ground_truth=record.answers,
        subject=record.subject,
        rephrase_prompt=record.rephrase,
        loc_prompt=(loc_prompt,) if loc_prompt else None,
        locality={"neighborhood": (Probe(prompt=record.loc, ground_truth=(record.loc_ans,)),)},
        portability={"one_hop": (portability,)} if portability else None,
    )
