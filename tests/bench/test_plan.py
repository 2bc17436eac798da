import pytest

from baft_easyedit.bench.config import make_config
from baft_easyedit.bench.plan import Protocol, file_name, protocols, units_of


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
    assert Protocol(2, 3).chunks(14) == [range(6), range(6, 12), range(12, 14)]
    assert [list(chunk) for chunk in Protocol().chunks(3)] == [[0], [1], [2]]


def test_units_follow_the_configuration():
    config = make_config(
        {"data": {"kind": "facts"}, "methods": ["ReFT", "BaFT"], "T": [1, 2], "batch_size": [1, 2]}
    )
    units = units_of(config.methods, protocols(config), 4)
    assert [(p.T, p.batch_size) for p in protocols(config)] == [(1, 1), (2, 1), (1, 2), (2, 2)]
    assert len(units) == 2 * (4 + 2 + 2 + 1)
    assert len({unit.key for unit in units}) == len(units)
    assert units[0].key == ("ReFT", 1, 1, 0)


def test_file_names_are_safe_and_distinct():
    names = ["+ss-w&lr", "+ss-w lr", "../x", "BaFT", "R_loc x 0.1", "R loc x 0.1"]
    made = [file_name(name) for name in names]
    assert len(set(made)) == len(names)
    assert not any("/" in name or " " in name for name in made)
    assert made[3] == "BaFT"
