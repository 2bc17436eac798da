"""KnowEdit's four fact sets: ZsRE, WikiData_recent, WikiData_counterfact and WikiBio."""

from pathlib import Path

from pydantic import AliasChoices, Field

from baft_easyedit.bench.datasets.files import find_file, read_records
from baft_easyedit.bench.datasets.schema import (
    Answers,
    Case,
    Layout,
    Probes,
    Source,
    Text,
    check_all,
)


class _Record(Layout):
    """A record of any of the four; WikiBio has names of its own."""

    subject: Text = Field(validation_alias=AliasChoices("subject", "concept"))
    prompt: Text = Field(validation_alias=AliasChoices("prompt", "text"))
    target_new: Text = Field(validation_alias=AliasChoices("target_new", "labels"))
    ground_truth: Answers | None = None
    rephrase_prompt: Text | None = Field(
        None, validation_alias=AliasChoices("rephrase_prompt", "rephrase")
    )
    locality: Probes
    portability: Probes | None = None


def read_knowedit(file_name: str, path: Path | None) -> Source:
    """Read a set of KnowEdit.

    Kinds of probes are called as in the requests of EasyEdit's run_knowedit_llama2.py, where
    `Reasoning` is `reasoning`. That script asks no rephrased prompt, also where the file has one;
    here it is read.

    Args:
        file_name: What the set's file is called.
        path: The file, or its directory.

    Raises:
        ValueError: If a record breaks a rule.
        TypeError: If the file holds no list.
        FileNotFoundError: If the file is missing.
    """
    records, file = read_records(find_file(path, file_name))
    return Source([_case(record) for record in check_all(_Record, records, file.name)], [file], [])


def _case(record: _Record) -> Case:
    """Turn a record into a case."""
    portability = dict(record.portability or {})
    if "Reasoning" in portability:
        portability["reasoning"] = portability.pop("Reasoning")
    return Case(
        prompt=record.prompt,
        target_new=record.target_new,
        ground_truth=record.ground_truth,
        subject=record.subject,
        rephrase_prompt=record.rephrase_prompt,
        locality=record.locality,
        portability=portability,
    )
