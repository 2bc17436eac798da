"""Attention by products against torch's, in value and gradient, and when it is left to torch."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from packaging.version import Version
from torch.nn import functional as F

from baft_easyedit import attention
from baft_easyedit.attention import AttentionByProducts, attend
from baft_easyedit.replay import FullForward, LayerReplay
from baft_easyedit.requests import as_requests, text_rows
from tests.conftest import make_model, random_edit


def tensors(num_past, columns=5, bins=2):
    """Query, keys and values of past and new columns, and a causal mask with padding."""
    size = num_past + columns
    query, key, value = (torch.randn(bins, 3, n, 8) for n in (columns, size, size))
    seen = torch.ones(columns, size).tril(num_past).bool().repeat(bins, 1, 1, 1)
    seen[0, :, :, : min(num_past, 2)] = False
    seen[0, :, -1] = False  # a column of padding, which attends to nothing
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    return [t.requires_grad_() for t in (query, key, value)], mask


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("num_past", [0, 7, 64, 200])
def test_it_equals_torchs(num_past, scale):
    inputs, mask = tensors(num_past)
    expected = F.scaled_dot_product_attention(*inputs, attn_mask=mask, scale=scale)
    found = attend(*inputs, mask, scale=scale)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    weight = torch.randn_like(found)
    weight[0, :, -1] = 0  # nobody reads padding
    gradients, expected_gradients = (
        torch.autograd.grad((out * weight).sum(), inputs) for out in (found, expected)
    )
    for i, (a, b) in enumerate(zip(gradients, expected_gradients, strict=True)):
        new = slice(num_past if i else 0, None)  # of keys and values
        torch.testing.assert_close(a[:, :, new], b[:, :, new], rtol=1e-4, atol=1e-5)


def test_a_long_past_gets_no_gradient():
    inputs, mask = tensors(64)
    _, key, value = torch.autograd.grad(attend(*inputs, mask).sum(), inputs)
    assert not key[:, :, :64].any()
    assert not value[:, :, :64].any()
    assert key[:, :, 64:].any()


@pytest.fixture
def calls(monkeypatch):
    """The calls of `attend` by the mode."""
    made = []

    def counted(*args, **kwargs):
        made.append(args)
        return attend(*args, **kwargs)

    monkeypatch.setattr(attention, "attend", counted)
    return made


def test_the_mode_puts_it_in_the_place_of_torchs(calls):
    inputs, mask = tensors(7)
    expected = F.scaled_dot_product_attention(*inputs, mask)
    with AttentionByProducts(7):
        by_position = F.scaled_dot_product_attention(*inputs, mask)
        with_options = F.scaled_dot_product_attention(*inputs, mask, 0.0, False, scale=None)
        query, key, value = inputs
        by_name = F.scaled_dot_product_attention(query=query, key=key, value=value, attn_mask=mask)
    assert len(calls) == 3
    assert torch.equal(by_position, by_name)
    assert torch.equal(by_position, with_options)
    torch.testing.assert_close(by_name, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "options"),
    [
        (lambda q, k, v, m: (q, k, v), {"is_causal": True}),
        (lambda q, k, v, m: (q, k, v), {}),
        (lambda q, k, v, m: (q, k, v, m == 0), {}),
        (lambda q, k, v, m: (q, k, v, m), {"dropout_p": 0.5}),
        (lambda q, k, v, m: (q, k[:, :1], v[:, :1], m), {"enable_gqa": True}),
        (lambda q, k, v, m: (q.bfloat16(), k.bfloat16(), v.bfloat16(), m.bfloat16()), {}),
        (lambda q, k, v, m: (q[:, :, :129], k, v, m[:, :, :129]), {}),
        (lambda q, k, v, m: (q[:, :, :9], k[:, :, :7], v[:, :, :7], m[:, :, :9, :7]), {}),
        (lambda q, k, v, m: (q[:, :, :9], k[:, :, :19], v[:, :, :19], m[:, :, :9, :19]), {}),
    ],
)
def test_other_attention_is_left_to_torch(change, options, calls):
    if "enable_gqa" in options and Version(torch.__version__) < Version("2.5"):
        pytest.skip("no such option in this torch")
    inputs, mask = tensors(7, columns=140)
    args = change(*(t.detach() for t in inputs), mask)
    torch.manual_seed(0)
    expected = F.scaled_dot_product_attention(*args, **options)
    torch.manual_seed(0)
    with AttentionByProducts(7):
        found = F.scaled_dot_product_attention(*args, **options)
    assert not calls
    assert torch.equal(found.nan_to_num(), expected.nan_to_num())  # older ones have no 0 for none


def test_it_is_the_mode_of_one_thread(calls):
    inputs, mask = tensors(7)
    with AttentionByProducts(7), ThreadPoolExecutor(1) as pool:
        pool.submit(F.scaled_dot_product_attention, *inputs, mask).result()
    assert not calls


@pytest.mark.parametrize(("engine", "num_calls"), [(LayerReplay, 3), (FullForward, 0)])
def test_replayed_layers_attend_so(engine, num_calls, tokenizer, request_dict, calls):
    model, edit = make_model(), random_edit(layers=(0, 2))
    edit.attach(model)
    forward = engine(model, edit).prepare([text_rows(as_requests([request_dict]), tokenizer)])
    calls.clear()
    forward()
    assert len(calls) == num_calls
