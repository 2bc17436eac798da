"""Products of few rows with a large matrix, in slices of its columns. Needs torch only.

A step of learning multiplies a handful of tokens with each weight of the model. For 4 to 24 rows
MKL takes one to three times as long when it sees all columns at once as when it sees 256 at a time;
each number is the same sum either way.

Shapes: M rows, K summands of each number, N columns.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

_ROWS = range(4, 25)
"""M of products that gain."""

_LEAST_SIZE = 2**18
"""Least K N of products that gain: smaller matrices are near the processor anyway."""

_SLICE = 256
"""Columns of a slice."""


def gains_by_slices(rows: Tensor, matrix: Tensor) -> bool:
    """Tell whether a product on the CPU, as `torch.mm` takes it, is done sooner in slices.

    Args:
        rows: [M, K].
        matrix: [K, N]; it gains if it is the transpose of one that lies row by row, as the weight
            of `torch.nn.Linear` does.
    """
    return (
        len(rows) in _ROWS
        and rows.dtype == torch.float32
        and matrix.numel() >= _LEAST_SIZE
        and matrix.shape[1] > _SLICE
        and matrix.t().is_contiguous()
        and torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
    )


def by_slices(
    rows: Tensor, matrix: Tensor, out: Tensor
) -> Iterator[tuple[Callable[..., Any], tuple[Tensor, Tensor], dict[str, Tensor]]]:
    """Yield calls, as function and arguments, that write a product into `out`, [M, N].

    Args:
        rows: [M, K].
        matrix: [K, N], as in `gains_by_slices`.
        out: Lies row by row.
    """
    num_slices = matrix.shape[1] // _SLICE
    end = num_slices * _SLICE
    slices = matrix.t()[:end].view(num_slices, _SLICE, -1).mT  # [N / 256, K, 256]
    into = out[:, :end].view(-1, num_slices, _SLICE).transpose(0, 1)  # [N / 256, M, 256]
    yield torch.bmm, (rows.expand(num_slices, *rows.shape), slices), {"out": into}
    if end < matrix.shape[1]:
        yield torch.mm, (rows, matrix[:, end:]), {"out": out[:, end:]}
