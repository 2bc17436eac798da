"""What the files of a run hold, as far as it is read back; see `store` for which there are."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_Finite = Annotated[float, Field(allow_inf_nan=False)]
_Count = Annotated[int, Field(ge=0)]


def _of_one_rank(by_layer: dict[str, list[float]]) -> dict[str, list[float]]:
    """Raise ValueError unless each layer has as many numbers."""
    counts = {len(values) for values in by_layer.values()}
    if len(counts) > 1:
        raise ValueError(f"must have a number for each basis in every layer; got {sorted(counts)}")
    return by_layer


_ByLayer = Annotated[
    dict[Annotated[str, Field(pattern=r"^[0-9]+$")], list[float]], AfterValidator(_of_one_rank)
]
"""A number for each basis, by layer."""


class _Strict(BaseModel):
    """Of exactly these types; further keys are not read."""

    model_config = ConfigDict(strict=True)


class _File(_Strict):
    """A file that is an object."""

    schema_: Literal[1] = Field(alias="schema")


class _Source(_Strict):
    """A file that records are from."""

    name: str
    sha256: str
    bytes: _Count


class _Data(_Strict):
    """Which records are edited."""

    kind: str
    files: list[_Source]
    num_records: _Count
    sha256: str
    notes: list[str]


class _Git(_Strict):
    """The checkout that the run was made from."""

    commit: str
    dirty: bool


class RunRecord(_File):
    """`run.json`, as `provenance.run_record` makes it."""

    status: str
    command: list[str]
    date: str
    seed: int
    git: _Git | None
    versions: dict[str, str]
    easyedit: dict[str, str]
    hardware: dict[str, Any]
    model: dict[str, str]
    data: _Data
    inputs: dict[str, str]
    earlier: list[dict[str, Any]]
    locality_in_template: bool = False


class _Downstream(_Strict):
    """The accuracies on a task."""

    pre_acc: float
    post_acc: float


class ChunkFile(_File):
    """`RunDirectory.write_chunk` and `worker` make it."""

    chunk: _Count
    indices: Annotated[list[_Count], Field(min_length=1)]
    edit_times_s: list[Amount]
    trainable_parameters: _Count | None
    peak_memory_bytes: _Count | None
    basis_usage: _ByLayer | None
    downstream: _Downstream | None
    restored: bool | None
    notes: list[str]
    error: str | None


class _Answers(_Strict):
    """Those of before the edits, and after."""

    pre: list[str]
    post: list[str]


class CaseFile(_File):
    """`worker` makes it."""

    index: _Count
    chunk: _Count
    position: _Count
    chunk_length: Annotated[int, Field(ge=1)]
    scores: Annotated[dict[str, _Finite | None], Field(min_length=1)]
    answers: _Answers | None = None
    wild: _Answers | None = None
    texts: dict[str, list[str] | None] | None = None
    basis: dict[str, _ByLayer | None] | None
    update: dict[str, _ByLayer | None] | None


class _Unedited(_Strict):
    """What a case is compared with."""

    metrics: dict[str, Any]
    field_scores: dict[str, Any]
    answers: list[str] = []
    wild: list[str] = []


class PreEdit(_File):
    """What the unedited model scores and says on the cases of a chunk."""

    cases: Annotated[list[_Unedited], Field(min_length=1)]


class Paraphrases(_File):
    """What the unedited model says in other words."""

    paraphrases: Annotated[list[str], Field(min_length=1)]


class Verdict(_File):
    """What a judge said."""

    reply: str
