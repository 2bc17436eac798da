import pytest
import torch

from baft_easyedit.method.gate_report import (
    GateReport,
    LayerGates,
    coefficient_of_variation,
    collapse_warnings,
    imbalance_warnings,
    pooled_deviation,
    top_share,
)

ALIKE, UNUSED, ONE_OF_FOUR = [0.3] * 4, [0.0] * 4, [0.8, 0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        ([0.1, 0.2, 0.3], 0.5),  # standard deviation 0.1, mean 0.2
        ([0.01, 0.02, 0.03], 0.5),  # whatever the scale
        (ONE_OF_FOUR, 2.0),  # 0.4 over 0.2
        (ALIKE, 0.0),
        (UNUSED, 0.0),
        ([0.3], 0.0),
    ],
)
def test_coefficient_of_variation(usage, expected):
    assert coefficient_of_variation(torch.tensor(usage)) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        ([0.1, 0.3, 0.0, 0.0, 0.5, 0.1, 0.0, 0.0], 0.8),  # 0.5 and 0.3 of 1.0: two of eight
        ([0.2, 0.4, 0.2], 0.5),  # at least one
        (ALIKE, 0.25),
        (UNUSED, 0.25),
    ],
)
def test_top_share_is_that_of_the_largest_quarter(usage, expected):
    assert top_share(torch.tensor(usage)) == pytest.approx(expected, abs=1e-6)


def test_pooled_deviation_is_around_the_mean_of_each_group():
    groups = [torch.tensor([[0.0], [2.0]]), torch.tensor([[10.0], [12.0], [14.0]])]
    expected = ((1 + 1 + 4 + 0 + 4) / (1 + 2)) ** 0.5
    assert pooled_deviation(groups).tolist() == pytest.approx([expected])


def test_lone_inputs_do_not_tell_whether_a_gate_is_constant():
    deviations = pooled_deviation([torch.rand(1, 2), torch.rand(1, 2)])
    assert deviations.isnan().all()
    assert collapse_warnings({1: deviations.tolist()}, {1: 0.5}) == ()


def layer_gates(irrelevant):
    edit = torch.tensor([[0.8, 0.2], [0.4, 0.2]], requires_grad=True)
    return LayerGates.of(edit, irrelevant, torch.tensor([0.3, 0.1]))


def test_layer_gates_sum_up_the_weights_of_one_edit_call():
    gates = layer_gates(torch.tensor([[0.1, 0.1], [0.1, 0.3]]))
    assert gates.edit_weights == pytest.approx((0.6, 0.2))
    assert gates.irrelevant_weights == pytest.approx((0.1, 0.2))
    assert gates.usage == pytest.approx((0.3, 0.1))
    # 0.8, 0.4, 0.1, 0.1 about 0.35 and 0.2, 0.2, 0.1, 0.3 about 0.2
    assert gates.deviations == pytest.approx(((0.33 / 3) ** 0.5, (0.02 / 3) ** 0.5))
    assert gates.top_share == pytest.approx(0.75)


@pytest.mark.parametrize(("num_constant", "is_collapsed"), [(10, True), (9, True), (8, False)])
def test_a_gate_has_collapsed_if_nearly_all_bases_are_constant(num_constant, is_collapsed):
    deviations = [0.0099] * num_constant + [0.01] * (10 - num_constant)
    assert bool(collapse_warnings({3: deviations}, {3: 0.5})) is is_collapsed


def test_collapse_says_where_the_weights_are_stuck_and_what_to_try():
    stuck, alive = [0.0] * 4, [0.1] * 4
    warnings = collapse_warnings(
        {1: stuck, 2: stuck, 3: stuck, 4: stuck, 5: alive},
        {1: 0.4, 2: 0.04, 3: 0.96, 4: 0.6, 5: 0.0},
    )
    assert [warning.split(":")[0] for warning in warnings] == [
        "gate collapse in layers 1, 4",
        "gate collapse in layer 2",
        "gate collapse in layer 3",
    ]
    assert "0.50 on average. The gate has not learned to tell inputs apart: raise" in warnings[0]
    assert "0.04 on average. The gate is closed" in warnings[1]
    assert "0.96 on average. The gate is open, as in ReFT" in warnings[2]


def test_imbalance_names_the_layers_where_a_quarter_of_the_bases_does_the_work():
    (warning,) = imbalance_warnings({1: 0.95, 2: 0.9, 3: 0.91}, rank=12)
    assert warning.startswith(
        "imbalance in layers 1, 3: 3 of 12 bases carry 93% of the weight (in balance 25%)"
    )


def test_balanced_and_single_bases_are_not_warned_of():
    assert imbalance_warnings({1: 0.9}, rank=12) == ()
    assert imbalance_warnings({1: 1.0}, rank=1) == ()


def test_report_warns_of_each_layer_by_its_own_figures():
    def gates(usage, deviation):
        return LayerGates((0.5,) * 4, None, tuple(usage), (deviation,) * 4)

    report = GateReport({1: gates(ALIKE, 0.0), 2: gates(ONE_OF_FOUR, 0.2), 3: gates(ALIKE, 0.2)})
    collapse, imbalance = report.warnings()
    assert collapse.startswith("gate collapse in layer 1: ")
    assert imbalance.startswith("imbalance in layer 2: 1 of 4 bases carry 100%")
    assert GateReport({3: gates(ALIKE, 0.2)}).warnings() == ()
