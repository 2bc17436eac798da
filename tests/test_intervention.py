import pytest
import torch
from torch.nn.utils import parametrizations

from baft_easyedit import ModelEdit
from baft_easyedit.method.gates import GATES
from baft_easyedit.method.intervention import (
    BaFTIntervention,
    basis_edit,
    orthonormal_rows,
    tangent,
)

D, R = 16, 4


def random_intervention(gate="rms-sigmoid", seed=0):
    generator = torch.Generator().manual_seed(seed)
    intervention = BaFTIntervention(D, R, gate, generator)
    with torch.no_grad():
        for p in intervention.parameters():
            p.add_(torch.randn(p.shape, generator=generator))
        intervention.basis.copy_(orthonormal_rows(intervention.basis))
    return intervention


def test_any_rows_become_an_orthonormal_basis_of_their_span():
    rows = torch.randn(R, D) * 7
    basis = orthonormal_rows(rows)
    assert torch.allclose(basis @ basis.mT, torch.eye(R), atol=1e-5)
    assert torch.allclose(rows @ basis.mT @ basis, rows, atol=1e-4)


def test_orthonormal_rows_stay_as_they_are():
    rows = torch.linalg.qr(torch.randn(D, R)).Q.mT.contiguous()
    rows[1] *= -1
    assert torch.allclose(orthonormal_rows(rows), rows, atol=1e-6)


def test_a_small_step_along_the_tangent_stays_orthonormal():
    """To first order; and of all such steps it is the one that the gradient asks for."""
    basis, gradient = orthonormal_rows(torch.randn(3, R, D)), torch.randn(3, R, D)
    along = tangent(gradient, basis)
    moved = basis + 1e-3 * along
    assert torch.allclose(moved @ moved.mT, torch.eye(R), atol=1e-4)
    assert not torch.allclose((basis + 1e-3 * gradient) @ moved.mT, torch.eye(R), atol=1e-3)
    assert torch.allclose(tangent(along, basis), along, atol=1e-5)  # a projection
    left_out = gradient - along
    assert torch.allclose((left_out * along).sum((-2, -1)), torch.zeros(3), atol=1e-3)


def test_weights_of_one_give_loreft():
    """Lemma 2.4, against LoReFT as its authors compute it, by torch's own parametrisation."""
    intervention = random_intervention("one")
    rotate = parametrizations.orthogonal(torch.nn.Linear(D, R, bias=False))
    rotate.weight = intervention.basis.detach()
    source = torch.nn.Linear(D, R)
    source.weight.data = (intervention.difference + intervention.basis).data
    source.bias.data = intervention.source_bias.data
    h = torch.randn(2, 5, D)
    loreft = h + (source(h) - rotate(h)) @ rotate.weight
    assert torch.allclose(intervention(h)[0], loreft, atol=1e-5)


def test_weights_of_zero_give_the_identity_bit_for_bit():
    h, basis = torch.randn(2, 5, D), orthonormal_rows(torch.randn(R, D))
    edited = basis_edit(h, basis, torch.randn(2, 5, R), torch.zeros(2, 5, R))
    assert torch.equal(edited, h)


def test_edit_stays_in_the_span_of_the_basis():
    intervention, h = random_intervention(), torch.randn(2, 5, D)
    delta, basis = intervention(h)[0] - h, intervention.basis
    assert delta.norm() > 1
    assert torch.allclose(delta @ basis.mT @ basis, delta, atol=1e-4)


def test_each_weight_scales_the_edit_along_its_own_basis_only():
    h, basis, target = torch.randn(5, D), orthonormal_rows(torch.randn(R, D)), torch.randn(5, R)
    weights = torch.rand(5, R)
    moved = basis_edit(h, basis, target - h @ basis.mT, weights) @ basis.mT
    expected = (1 - weights) * (h @ basis.mT) + weights * target
    assert torch.allclose(moved, expected, atol=1e-5)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_new_intervention_changes_nothing(gate, dtype):
    h = torch.randn(2, 5, D).to(dtype)
    edited, weights = BaFTIntervention(D, R, gate)(h)
    assert torch.equal(edited, h)
    assert edited.dtype == dtype
    assert weights.dtype == torch.float32


def test_edit_of_bf16_states_is_computed_in_fp32():
    intervention, h = random_intervention(), torch.randn(2, 5, D).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        edited = intervention(h)[0]
    assert torch.equal(edited, intervention(h.float())[0].bfloat16())


@pytest.mark.parametrize(
    ("hidden_size", "gate", "count"),
    [
        (4096, "one", 393_264),
        (3072, "one", 294_960),
        (4096, "rms-sigmoid", 606_256),
        (4096, "softmax-null", 606_256),
        (4096, "basis-subspace", 606_256),
        (3072, "rms-sigmoid", 454_704),
        (3072, "softmax-null", 454_704),
        (3072, "basis-subspace", 454_704),
    ],
)
def test_parameter_counts_are_those_of_table_3(hidden_size, gate, count):
    edit = ModelEdit(hidden_size, [9, 18, 24, 28], 12, gate, num_prompt_positions=3)
    assert edit.num_parameters == count


@pytest.mark.parametrize("rank", [0, D + 1])
def test_rank_outside_the_hidden_size_is_refused(rank):
    with pytest.raises(ValueError, match=rf"rank must be in \[1, {D}\].*got {rank}"):
        BaFTIntervention(D, rank)


def test_an_unknown_gate_is_refused():
    with pytest.raises(ValueError, match=r"gate must be one of rms-sigmoid, .*; got 'relu'"):
        BaFTIntervention(8, 2, "relu")
