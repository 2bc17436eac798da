import pytest

from baft_easyedit.bench.curves import Bin, basis_weights, retention, update_shares


def test_shares_of_an_update_are_sorted_in_each_case_and_then_averaged():
    cases = [
        {"update": {"rewrite": {"3": [1.0, 3.0, 0.0]}, "locality": {"3": [9.0, 0.0, 0.0]}}},
        {"update": {"rewrite": {"3": [0.0, 1.0, 1.0]}}},
    ]
    (layer,) = (shares := update_shares(cases))
    assert layer == 3
    assert shares[3].mean == pytest.approx([(0.75 + 0.5) / 2, (0.25 + 0.5) / 2, 0.0])
    assert sum(shares[3].mean) == pytest.approx(1.0)
    assert shares[3].deviation == pytest.approx([0.125, 0.125, 0.0])


def test_cases_without_an_update_are_passed_over():
    cases = [
        {"update": None},
        {},
        {"update": {"rewrite": None}},
        {"update": {"rewrite": {"1": [0.0, 0.0]}}},
    ]
    assert update_shares(cases) == {}
    assert update_shares([*cases, {"update": {"rewrite": {"1": [2.0, 2.0]}}}])[1].mean == [0.5, 0.5]


def test_basis_weights_are_averaged_by_layer_and_prompt():
    cases = [
        {"basis": {"rewrite": {"10": [0.2, 1.0], "9": [0.5, 0.5]}, "rephrase": None}},
        {"basis": {"rewrite": {"10": [0.4, 0.0]}, "locality": {"10": [0.1, 0.1]}}},
        {"basis": None},
    ]
    weights = basis_weights(cases)
    assert list(weights) == [9, 10]  # by number, not by text
    assert weights[10]["rewrite"].mean == pytest.approx([0.3, 0.5])
    assert weights[10]["rewrite"].deviation == pytest.approx([0.1, 0.5])
    assert weights[10]["locality"].mean == [0.1, 0.1]
    assert "rephrase" not in weights[10]


def case(position, length, score):
    return {"position": position, "chunk_length": length, "scores": {"rewrite_acc": score}}


def test_retention_bins_by_the_edits_made_after_a_case():
    cases = [case(i, 20, i / 20) for i in range(20)]
    bins = retention(cases, "rewrite_acc", T=20)
    assert [(b.youngest, b.oldest, b.count) for b in bins[:2]] == [(0, 1, 2), (2, 3, 2)]
    assert len(bins) == 10
    assert bins[0].mean == pytest.approx((19 + 18) / 2 / 20)  # the last two edits


def test_retention_counts_what_a_short_last_chunk_has():
    cases = [case(i, 10, 1.0) for i in range(10)] + [case(0, 1, 0.0)]
    bins = retention(cases, "rewrite_acc", T=10)
    assert bins[0] == Bin(0, 0, 0.5, 2)
    assert [b.count for b in bins[1:]] == [1] * 9


def test_retention_passes_over_cases_without_the_score():
    assert retention([case(0, 1, None)], "rewrite_acc", T=10) == []
