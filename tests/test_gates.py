import pytest
import torch

from baft_easyedit.method.gates import GATES, unit_rms

D, R = 16, 4
COUNTS = {
    "rms-sigmoid": (R + 1) * D,
    "softmax-null": (R + 1) * D,
    "basis-subspace": (R + 1) * D,
    "basis-subspace-bias": (R + 1) * (D + 1),
    "sigmoid": R * D + R,
    "subspace": D,
    "one": 0,
}


def randomised(name):
    gate = GATES[name](D, R)
    torch.manual_seed(1)
    for p in gate.parameters():
        p.data.normal_()
    return gate


@pytest.mark.parametrize("name", GATES)
def test_gate_returns_one_weight_in_unit_interval_per_basis(name):
    weights = randomised(name)(torch.randn(2, 5, D) * 30)
    assert weights.shape == (2, 5, R)
    assert weights.min() >= 0
    assert weights.max() <= 1


@pytest.mark.parametrize("name", GATES)
def test_gate_has_the_documented_number_of_parameters(name):
    assert sum(p.numel() for p in GATES[name](D, R).parameters()) == COUNTS[name]


@pytest.mark.parametrize("name", GATES)
def test_gate_ignores_the_scale_of_the_hidden_state(name):
    gate, hidden = randomised(name), torch.randn(3, D)
    assert torch.allclose(gate(hidden), gate(hidden * 100), atol=1e-5)


def test_subspace_gate_gives_every_basis_the_same_weight():
    weights = randomised("subspace")(torch.randn(7, D))
    assert torch.equal(weights, weights[:, :1].expand(-1, R))


def test_basis_subspace_gate_is_a_product_of_logistic_regressions():
    gate, hidden = randomised("basis-subspace"), torch.randn(7, D)
    x = unit_rms(hidden)
    expected = [
        torch.sigmoid(x @ gate.weight[k]) * torch.sigmoid(x @ gate.weight[R]) for k in range(R)
    ]
    assert torch.allclose(gate(hidden), torch.stack(expected, -1), atol=1e-6)


def test_basis_subspace_gate_has_a_constant_for_each_logit():
    gate, plain = randomised("basis-subspace-bias"), GATES["basis-subspace"](D, R)
    plain.weight.data.copy_(gate.weight)
    gate.bias.data.zero_()
    hidden = torch.randn(7, D)
    assert torch.equal(gate(hidden), plain(hidden))
    gate.bias.data[0], gate.bias.data[R] = -30.0, 30.0
    weights, x = gate(hidden), unit_rms(hidden)
    assert (weights[:, 0] < 1e-6).all()
    assert torch.allclose(weights[:, 1], torch.sigmoid(x @ gate.weight[1]), atol=1e-6)


def test_basis_subspace_gate_with_constants_begins_nearly_closed():
    weights = GATES["basis-subspace-bias"](D, R)(torch.randn(7, D))
    assert torch.allclose(weights, torch.tensor(-2.0).sigmoid() * torch.tensor(2.0).sigmoid())
