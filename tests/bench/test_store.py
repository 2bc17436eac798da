import numpy as np
import pytest
import torch

from baft_easyedit.bench.afterwards import _Verdict
from baft_easyedit.bench.protocol import Chunk, Protocol, chunks_of
from baft_easyedit.bench.store import RunDirectory, file_name, read_json, write_json

ROW = "+ss-w", Protocol(10, 1)
CHUNK = Chunk(*ROW, 2, range(20, 30))
CASE = {
    **dict.fromkeys(("schema", "chunk_length"), 1),
    **dict.fromkeys(("index", "chunk", "position"), 0),
    **dict.fromkeys(("basis", "update")),
    "scores": {"rewrite_acc": 1.0},
}


def test_records_lie_where_the_layout_says(tmp_path):
    run = RunDirectory(tmp_path)
    assert run.case(*ROW, 21) == tmp_path / "cases/+ss-w/continual-T10/00021.json"
    assert run.chunk(CHUNK) == tmp_path / "chunks/+ss-w/continual-T10/00002.json"


def test_cases_of_finished_chunks_are_read_in_order(tmp_path):
    run = RunDirectory(tmp_path)
    assert list(run.chunks_of(*ROW)) == []
    for i in (22, 3, 31, 41):  # the last of a chunk that was never finished
        write_json(run.case(*ROW, i), CASE | {"index": i})
    for chunk, error in ((Chunk(*ROW, 2, range(3, 23, 19)), None), (Chunk(*ROW, 3, (31,)), "no")):
        run.write_chunk(chunk, error)
        assert run.is_complete(chunk) == (error is None)
    assert [case["index"] for case in run.cases_of(*ROW)] == [3, 22]


def test_a_chunk_that_lacks_a_case_is_run_again(tmp_path):
    run = RunDirectory(tmp_path)
    run.write_chunk(CHUNK)
    assert not run.is_complete(CHUNK)
    with pytest.raises(ValueError, match=r"00020\.json must be there, for its chunk was run; run"):
        next(run.cases_of(*ROW))


ANEW = "delete it, and run the benchmark again, which makes it anew"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"x": ', r"must be JSON, and is not: .*"),
        ("null", "must be a mapping; got None"),
        ("[1]", r"must be a mapping; got \[1\]"),
        ("{}", r": schema must be given; got {} \(and \d+ more problems?\)"),
        ('{"schema": 99}', r": schema must be 1; got 99 \(and .*"),
    ],
)
def test_files_of_another_form_are_named_with_what_to_do(tmp_path, text, message):
    run = RunDirectory(tmp_path)
    kept = lambda: run.kept("verdicts", 1, lambda: {"reply": "A"}, _Verdict)  # noqa: E731
    assert kept()["reply"] == "A"
    (verdict,) = tmp_path.glob("verdicts/*.json")
    write_json(run.case(*ROW, 20), CASE)
    run.write_chunk(Chunk(*ROW, 2, range(20, 21)))
    reads = {
        run.case(*ROW, 20): lambda: list(run.cases_of(*ROW)),
        run.chunk(CHUNK): lambda: list(run.chunks_of(*ROW)),
        verdict: kept,
    }
    for file, read in reads.items():
        read()
        file.write_text(text)
        with pytest.raises(ValueError, match=rf"{file.name}:? ?{message}; {ANEW}"):
            read()


def test_every_layer_has_as_many_bases(tmp_path):
    run = RunDirectory(tmp_path)
    run.write_chunk(CHUNK, basis_usage={"1": [0.5, 0.5], "3": [0.5]})
    message = (
        r"json: basis_usage must have a number for each basis in every layer; got \[1, 2\]; del"
    )
    with pytest.raises(ValueError, match=message):
        list(run.chunks_of(*ROW))


def test_numpy_values_become_plain(tmp_path):
    write_json(tmp_path / "it.json", {"a": (np.float64(1.5), [np.array([1])]), "b": torch.ones(1)})
    assert read_json(tmp_path / "it.json") == {"a": [1.5, [[1]]], "b": [1.0]}


def test_file_names_are_safe_and_distinct():
    names = [
        "+ss-w&lr",
        "+ss-w lr",
        "../x",
        "BaFT",
        "R_loc x 0.1",
        "R loc x 0.1",
        ".",
        "..",
        "_1",
        "\u05f1",
        "\u03b1",
        ";1",
    ]
    made = [file_name(name) for name in names]
    assert len(set(made)) == len(names)
    assert not any("/" in name or " " in name or name[0] == "." for name in made)
    assert made[3] == "BaFT"


@pytest.mark.parametrize(
    ("protocol", "name", "slug"),
    [
        (Protocol(1, 1), "single", "single"),
        (Protocol(10, 1), "continual", "continual-T10"),
        (Protocol(1, 10), "batched", "batched-B10-T1"),
        (Protocol(5, 2), "batched", "batched-B2-T5"),
    ],
)
def test_protocols_are_named_by_their_numbers(protocol, name, slug):
    assert (protocol.name, protocol.slug) == (name, slug)


def test_chunks_cover_the_records_once():
    chunks = chunks_of("BaFT", Protocol(2, 3), 14)
    assert [chunk.indices for chunk in chunks] == [range(6), range(6, 12), range(12, 14)]
    assert [chunk.number for chunk in chunks] == [0, 1, 2]
