import numpy as np
import pytest
import torch

from baft_easyedit.bench.protocol import Chunk, Protocol, chunks_of
from baft_easyedit.bench.store import SCHEMA, RunDirectory, file_name, read_json, write_json

ROW = "+ss-w", Protocol(10, 1)
CHUNK = Chunk(*ROW, 2, range(20, 30))


def test_records_lie_where_the_layout_says(tmp_path):
    run = RunDirectory(tmp_path)
    assert run.case(*ROW, 21) == tmp_path / "cases/+ss-w/continual-T10/00021.json"
    assert run.chunk(CHUNK) == tmp_path / "chunks/+ss-w/continual-T10/00002.json"


def test_cases_of_finished_chunks_are_read_in_order(tmp_path):
    run = RunDirectory(tmp_path)
    assert list(run.chunks_of(*ROW)) == []
    for i, chunk in ((22, 2), (3, 2), (31, 3), (41, 4)):
        write_json(run.case(*ROW, i), {"schema": SCHEMA, "index": i, "chunk": chunk})
    for chunk, error in ((2, None), (3, "failed")):  # and the fourth was never finished
        other = Chunk(*ROW, chunk, CHUNK.indices)
        run.write_chunk(other, error)
        assert run.is_complete(other) == (error is None)
    assert [case["index"] for case in run.cases_of(*ROW)] == [3, 22]


def test_unreadable_records_are_named(tmp_path):
    broken = tmp_path / "broken.json"
    broken.write_text('{"x": ')
    with pytest.raises(ValueError, match=r"broken.json must be JSON, and is not: .*delete it"):
        read_json(broken)
    broken.write_text('{"schema": 99}')
    with pytest.raises(ValueError, match=r"broken.json must have schema 1; got 99"):
        read_json(broken)


def test_numpy_values_become_plain(tmp_path):
    write_json(tmp_path / "it.json", {"a": (np.float64(1.5), [np.array([1])]), "b": torch.ones(1)})
    assert read_json(tmp_path / "it.json") == {"a": [1.5, [[1]]], "b": [1.0]}


def test_file_names_are_safe_and_distinct():
    names = ["+ss-w&lr", "+ss-w lr", "../x", "BaFT", "R_loc x 0.1", "R loc x 0.1"]
    made = [file_name(name) for name in names]
    assert len(set(made)) == len(names)
    assert not any("/" in name or " " in name for name in made)
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
