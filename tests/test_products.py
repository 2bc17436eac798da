"""Products in slices against torch's own."""

import pytest
import torch

from baft_easyedit.products import by_slices, gains_by_slices


@pytest.mark.parametrize("num_rows", [4, 9, 15, 16, 24])
@pytest.mark.parametrize("num_columns", [512, 1024, 1100])
def test_slices_give_the_product(num_rows, num_columns):
    rows, weight = torch.randn(num_rows, 512), torch.randn(num_columns, 512)
    out = torch.full((num_rows, num_columns), torch.nan)
    calls = list(by_slices(rows, weight.t(), out))
    assert len(calls) == 1 + bool(num_columns % 256)
    for function, args, kwargs in calls:
        function(*args, **kwargs)
    torch.testing.assert_close(out, rows @ weight.t(), rtol=1e-6, atol=1e-4)


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="it is MKL that gains")
def test_few_rows_and_a_large_transposed_matrix_gain():
    large = torch.randn(1024, 256)
    assert gains_by_slices(torch.randn(8, 256), large.t())
    assert not gains_by_slices(torch.randn(3, 256), large.t())
    assert not gains_by_slices(torch.randn(25, 256), large.t())
    assert not gains_by_slices(torch.randn(8, 1024), large)
    assert not gains_by_slices(torch.randn(8, 256), large[1:].t())  # too small
    assert not gains_by_slices(torch.randn(8, 2048), torch.randn(256, 2048).t())  # one slice
    assert not gains_by_slices(torch.randn(8, 256).double(), large.double().t())
