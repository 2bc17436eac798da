import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers.loss.loss_utils import ForCausalLMLoss

from baft_easyedit.method.objective import (
    BasisUsage,
    answer_loss,
    load_balance,
    locality_margin,
    rescaling_factor,
    token_losses,
)


def everywhere(weights):
    """One row of weights [T, r], all of whose positions count: [1, T, r] and [1, T]."""
    return weights[None], torch.ones(1, len(weights), dtype=torch.bool)


def test_answer_loss_is_transformers_causal_language_model_loss():
    logits, labels = torch.randn(2, 6, 11), torch.randint(0, 11, (2, 6))
    labels[:, :3] = -100
    expected = ForCausalLMLoss(logits, labels, vocab_size=11)
    answers = labels[:, 1:] != -100
    losses = token_losses(logits[:, :-1][answers], labels[:, 1:][answers])
    assert torch.allclose(answer_loss(losses, torch.zeros(6, dtype=torch.long), 1), expected)


def test_load_balance_is_the_variance_over_the_mean():
    weights = torch.rand(5)
    expected = np.var(weights.numpy(), ddof=1) / weights.numpy().mean()
    assert load_balance(weights).item() == pytest.approx(expected, rel=1e-5)


def test_load_balance_is_finite_when_all_weights_are_zero():
    assert load_balance(torch.zeros(4)).item() == 0


def test_usage_averages_past_and_current_positions_alike():
    usage, past, current = BasisUsage(3), torch.rand(7, 3), torch.rand(2, 3)
    for part in (past[:4], past[4:]):
        usage.total, usage.count = usage.with_current(*everywhere(part))
    assert usage.count == 7
    expected = torch.cat([past, current]).mean(0)
    assert torch.allclose(usage.mean_with(*everywhere(current)), expected)


def test_only_positions_count():
    usage = BasisUsage(2)
    weights = torch.tensor([[[0.25, 0.5], [9.0, 9.0]], [[0.75, 0.5], [9.0, 9.0]]])
    positions = torch.tensor([[True, False], [True, False]])
    assert usage.mean_with(weights, positions).tolist() == [0.5, 0.5]
    loss = locality_margin(weights, positions, weights, positions, alpha=0.25, beta=0.75, gamma=0.0)
    assert loss.item() == pytest.approx((0 + 0.25 + 0.5 + 0.25) / 4 * 2)


def test_independent_edits_have_losses_of_their_own():
    logits, labels = torch.randn(7, 11), torch.randint(0, 11, (7,))
    owners = torch.tensor([2, 0, 0, 1, 2, 2, 0])
    weights, irrelevant = torch.rand(3, 2, 6, 4), torch.rand(3, 1, 6, 4)
    at, off = torch.rand(3, 2, 6) > 0.5, torch.rand(3, 1, 6) > 0.5
    at[:, 0, 0] = off[:, 0, 0] = True
    margins = {"alpha": 0.1, "beta": 0.5, "gamma": 0.3}
    usage = BasisUsage(4)
    together = (
        answer_loss(token_losses(logits, labels), owners, 3),
        load_balance(usage.mean_with(weights, at)),
        locality_margin(weights, at, irrelevant, off, **margins),
    )
    for i in range(3):
        alone = (
            F.cross_entropy(logits[owners == i], labels[owners == i]),
            load_balance(usage.mean_with(weights[i], at[i])),
            locality_margin(weights[i], at[i], irrelevant[i], off[i], **margins),
        )
        for term, expected in zip(together, alone, strict=True):
            assert term[i].item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("edit", "irrelevant", "expected"),
    [
        (0.9, 0.0, 0.0),  # open on the edit, closed elsewhere
        (0.9, 0.2, 0.1),  # alpha 0.1 exceeded by 0.1
        (0.2, 0.0, 0.1),  # beta 0.3 missed by 0.1
        (0.3, 0.1, 0.2),  # gap 0.2 where gamma is 0.4
    ],
)
def test_locality_margin_is_the_sum_of_three_hinges(edit, irrelevant, expected):
    gamma = 0.4 if expected == 0.2 else 0.1
    loss = locality_margin(
        *everywhere(torch.full((2, 3), edit)),
        *everywhere(torch.full((4, 3), irrelevant)),
        alpha=0.1,
        beta=0.3,
        gamma=gamma,
    )
    assert loss.item() == pytest.approx(expected, abs=1e-6)


def test_locality_gap_compares_the_largest_basis_of_each_position():
    edit = torch.tensor([[0.5, 0.1], [0.1, 0.7]])
    irrelevant = torch.tensor([[0.05, 0.0]])
    loss = locality_margin(
        *everywhere(edit), *everywhere(irrelevant), alpha=1.0, beta=0.0, gamma=1.0
    )
    assert loss.item() == pytest.approx(1 - (0.6 - 0.05))


def test_rescaling_lets_a_term_that_is_reached_vanish():
    """R_bal is 0 at the first step; a factor without a bound would make noise the objective."""
    term, answer = torch.tensor([0.0, 1e-6, 1e-4]), torch.tensor(2.0)
    assert torch.allclose(rescaling_factor("match", term, answer), torch.tensor(2000.0))


def test_rescaling_factor_has_no_gradient():
    term, answer = (torch.tensor(v, requires_grad=True) for v in (0.5, 8.0))
    assert not rescaling_factor("match", term, answer).requires_grad
