"""A tape against the computation that it recorded, which it must equal to the bit."""

import pytest
import torch
from torch.nn import functional as F

from baft_easyedit.kernels import tensors_in
from baft_easyedit.tape import Tape

MIB = 2**20


def tape_of(compute, *inputs, limit=MIB):
    return Tape(compute, inputs, limit)


def change(*inputs):
    with torch.no_grad():
        for x in inputs:
            x.add_(torch.randn_like(x))


def network(x, weight):
    """Products, views, in-place changes, a cast, an operator without `out`, and a gradient."""
    total = torch.zeros(4, 6)
    total += x @ weight  # a constant memory that the computation changes
    rotated = torch.cat([-total[:, 3:], total[:, :3]], -1)
    hidden = F.silu(rotated).unsqueeze(0).transpose(1, 2).contiguous()
    hidden = hidden.squeeze_(0)  # seen in another way from now on
    attended = F.scaled_dot_product_attention(*[hidden.view(1, 2, 3, 4)] * 3)
    loss = F.relu(attended).double().square().mean() + F.cross_entropy(
        total, torch.tensor([0, 1, 2, 3])
    )
    return {"loss": loss, "gradients": torch.autograd.grad(loss, [x, weight])}


def test_tape_equals_the_computation_to_the_bit():
    inputs = [torch.randn(4, 5, requires_grad=True), torch.randn(5, 6, requires_grad=True)]
    tape = tape_of(lambda: network(*inputs), *inputs)
    for _ in range(3):
        change(*inputs)
        expected, run = network(*inputs), tape.run()
        assert torch.equal(run["loss"], expected["loss"])
        for a, b in zip(run["gradients"], expected["gradients"], strict=True):
            assert torch.equal(a, b)
    assert not run["loss"].requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64])
def test_copies_casts_and_numbers_equal_the_computation_to_the_bit(dtype):
    x = torch.randn(5, 6)

    def compute():
        cast = (x * 8).to(dtype)
        number = cast.sum()  # without dimensions
        scaled = [(cast + 0.1) * 3 - 7, cast / 3.3, (number * 0.1 + 1) / 3, cast.t().clone()]
        return *scaled, *[(t - 1.7).half() for t in scaled], torch.add(cast, 2, alpha=3), cast * 2j

    tape = tape_of(compute, x)
    for _ in range(3):
        change(x)
        for computed, run in zip(compute(), tape.run(), strict=True):
            assert computed.dtype == run.dtype
            assert torch.equal(computed, run)


def test_products_of_few_rows_with_large_weights_equal_the_computation():
    x, head = torch.randn(6, 256), torch.nn.Linear(256, 1100, bias=False)

    def compute():
        return head(x).log_softmax(-1)

    with torch.no_grad():
        tape = tape_of(compute, x)
        for _ in range(3):
            change(x)
            torch.testing.assert_close(compute(), tape.run(), rtol=1e-6, atol=1e-5)


def test_gradients_of_slices_equal_the_computation_to_the_bit():
    x = torch.randn(4, 9, requires_grad=True)

    def compute():
        halves = [x[:, 5:] * 2, x[1:, ::3].sin(), x[:-1] * x[1:]]
        return torch.autograd.grad(sum(half.square().sum() for half in halves), x)

    tape = tape_of(compute, x)
    for _ in range(3):
        change(x)
        assert torch.equal(compute()[0], tape.run()[0])


def test_runs_use_the_same_memory():
    x = torch.randn(3)
    tape = tape_of(lambda: [x * 2], x)
    first = tape.run()[0]
    change(x)
    assert tape.run()[0].data_ptr() == first.data_ptr()
    assert torch.equal(first, x * 2)


def test_what_does_not_depend_on_the_inputs_is_not_run_again():
    x, constant = torch.randn(3, 3), torch.randn(3, 3)
    tape = tape_of(lambda: x.t() @ constant.exp().log().cos().t() + torch.arange(3).sin(), x)
    assert len(tape) == 2  # the product and the sum


def test_what_nobody_asks_for_is_not_run_again():
    x = torch.randn(3)

    def compute():
        x.exp().cos()
        return x.sin()

    assert len(tape_of(compute, x)) == 1


def test_memory_that_is_changed_in_place_begins_as_it_did():
    x, counter = torch.ones(2), torch.zeros(2)

    def compute():
        held = torch.full((2,), 5.0)
        held[0] = x[1]
        return held.add_(x), counter + 0

    tape = tape_of(compute, x)
    x.fill_(3.0)
    for _ in range(2):
        assert tape.run()[0].tolist() == [6.0, 8.0]


def test_a_recording_under_autocast_stays_what_it_is():
    x, weight = torch.randn(4, 5), torch.randn(5, 6)
    with torch.autocast("cpu", torch.bfloat16):
        tape = tape_of(lambda: x @ weight, x)
        change(x)
        assert torch.equal(tape.run(), x @ weight)
    assert tape.run().dtype == torch.bfloat16
    plain = tape_of(lambda: x @ weight, x)
    with torch.autocast("cpu", torch.bfloat16):
        run = plain.run()
    assert torch.equal(run, x @ weight)


@pytest.mark.parametrize(
    "compute",
    [
        lambda x: x * x.sum().item(),
        lambda x: x + (1 if x.sum() > 0 else 2),
        lambda x: x[x > 0].sum(),
        lambda x: x.nonzero(),
        lambda x: F.dropout(x, 0.5),
        lambda x: x * torch.rand_like(x),
        lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.5),
    ],
)
def test_what_depends_on_values_or_chance_is_refused(compute):
    x = torch.randn(1, 3, 4)
    with pytest.raises(RuntimeError, match="depends on values"):
        tape_of(lambda: compute(x), x)


def test_constant_masks_and_values_are_no_obstacle():
    x, mask, index = torch.randn(3), torch.tensor([True, False, True]), torch.tensor([2, 0])
    tape = tape_of(lambda: x[mask] * mask.sum().item() + x[index], x)
    change(x)
    assert torch.equal(tape.run(), x[mask] * 2 + x[index])


def test_memory_is_used_again_when_nobody_reads_it_any_more():
    inputs = [torch.randn(4, 5, requires_grad=True), torch.randn(5, 6, requires_grad=True)]
    constant = torch.randn(4, 5)

    def compute():
        x = inputs[0] * constant
        for _ in range(20):
            x = (x + constant).sin()
        return network(x, inputs[1]), x

    tape = tape_of(compute, *inputs)
    used = [t for _, args, _ in tape._kernels for t in tensors_in(args)]
    memories = {t.untyped_storage()._cdata for t in used}
    assert len(memories) < 30
    before = constant.clone()
    for _ in range(3):
        change(*inputs)
        (expected, x), (run, y) = compute(), tape.run()
        assert torch.equal(x, y)
        assert torch.equal(run["loss"], expected["loss"])
        for a, b in zip(run["gradients"], expected["gradients"], strict=True):
            assert torch.equal(a, b)
    assert torch.equal(constant, before)


def test_a_tape_keeps_no_more_memory_than_it_may():
    x = torch.randn(1000)
    with pytest.raises(RuntimeError, match="tensors take more than 10000 bytes"):
        tape_of(lambda: ((x + 1) + 1) + 1, x, limit=10_000)
    assert len(tape_of(lambda: ((x + 1) + 1) + 1, x, limit=12_000)) == 3


def test_settings_are_read_when_the_tape_is_renewed():
    x, scale, constant = torch.randn(3), torch.rand(3), torch.randn(3)

    def compute():
        weights = (scale.exp() * constant).softmax(-1)
        return {"product": x * weights, "weights": weights}

    tape = Tape(compute, [x], MIB, [scale])
    assert tape.can_renew
    assert len(tape) == 1
    for _ in range(2):
        before = scale.clone()
        change(scale, x)
        stale = (before.exp() * constant).softmax(-1)
        assert torch.equal(tape.run()["product"], x * stale)
        tape.renew()
        for name, value in compute().items():
            assert torch.equal(tape.run()[name], value)


def test_of_what_is_joined_only_what_changes_is_copied_again():
    x, past = torch.randn(2, 3), torch.randn(5, 3)

    def compute():
        both = torch.cat([past, x])
        other = torch.cat([x * 2, past.mean(0, keepdim=True), x])  # takes no memory of the first
        return both.cumsum(0), other * both[-5:]

    tape = Tape(compute, [x], MIB, [past])
    for changed in (x, past, x):
        change(changed)
        if changed is past:
            tape.renew()
        for found, expected in zip(tape.run(), compute(), strict=True):
            assert torch.equal(found, expected)
    sizes = {args[1].shape for kernel, args, _ in tape._kernels if kernel is torch.Tensor.copy_}
    assert sizes == {x.shape}


def test_what_is_joined_and_changed_later_is_joined_anew():
    x, past = torch.randn(2, 3), torch.randn(5, 3)

    def compute():
        return torch.cat([past, x]).mul_(2)

    tape = tape_of(compute, x)
    for _ in range(3):
        change(x)
        assert torch.equal(tape.run(), compute())


def test_what_is_made_together_with_memory_that_changes_is_renewed_with_it():
    x, scale = torch.randn(50), torch.rand(50)

    def compute():
        values, order = scale.sort()
        return values.add_(x), order * 2

    tape = Tape(compute, [x], MIB, [scale])
    for _ in range(2):
        change(scale, x)
        tape.renew()
        for computed, run in zip(compute(), tape.run(), strict=True):
            assert torch.equal(computed, run)


def test_several_views_and_what_changes_a_view_are_taken_note_of():
    x = torch.randn(4, 6)

    def compute():
        first, second = (x + 1).split(3, dim=1)
        second.mul_(first)
        return first.t() @ second, torch.stack(second.unbind(1)).unsqueeze_(0).sin()

    tape = tape_of(compute, x)
    change(x)
    for computed, run in zip(compute(), tape.run(), strict=True):
        assert torch.equal(computed, run)


@pytest.mark.parametrize(
    "compute",
    [
        lambda x, mask: x * mask.sum().item(),
        lambda x, mask: x[mask],
        lambda x, mask: x * (2 if mask.all() else 3),
    ],
)
def test_settings_that_choose_kernels_cannot_be_renewed(compute):
    x, mask = torch.randn(3), torch.tensor([True, False, True])
    tape = Tape(lambda: compute(x, mask), [x], MIB, [mask])
    assert not tape.can_renew
    change(x)
    assert torch.equal(tape.run(), compute(x, mask))


def test_the_size_is_that_of_all_memory_between_inputs_and_outputs():
    x = torch.randn(1000)
    assert tape_of(lambda: ((x + 1) + 1) + 1, x).num_bytes == 2 * 4000 + 4000
    assert tape_of(lambda: (((x + 1) + 1) + 1) + 1, x).num_bytes == 2 * 4000 + 4000
