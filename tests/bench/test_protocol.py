import pytest

from baft_easyedit.bench.protocol import Protocol, chunks_of


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
