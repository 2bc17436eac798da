"""Kernels that write an operator's results into memory that is there. Needs torch only."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from baft_easyedit.products import by_slices, gains_by_slices

aten = torch.ops.aten

Kernel = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]
"""A function and its arguments."""

_DIRECT = {
    "default": "addmm amax bmm cat clamp_max clamp_min mm neg rsqrt sigmoid stack triu",
    "dim": "mean",
    "dim_IntList": "sum",
    "Scalar": "div lt mul",
    "self": "where",
    "Tensor": "add div eq mul sub",
    "Tensor_Scalar": "pow",
}
"""By their overloads, operators that torch's functions of the same names call with less ado."""


def kernels_into(
    op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Sequence[Tensor]
) -> list[Kernel]:
    """Return what writes the results of an operator anew.

    Copies and slices have variants with `out` that make new tensors, and copy these.

    Args:
        op: An operator of ATen that makes tensors.
        args: Its arguments.
        kwargs: Those by name.
        outputs: What it made of them.
    """
    if op is aten.clone.default or op is aten._to_copy.default:
        return [(Tensor.copy_, (outputs[0], args[0]), {})]
    if op is aten.slice_backward.default:
        part = aten.slice.Tensor(outputs[0], *args[2:])
        return [(Tensor.zero_, (outputs[0],), {}), (Tensor.copy_, (part, args[0]), {})]
    if op is aten.mm.default and gains_by_slices(*args):
        rows, matrix = args
        return list(by_slices(rows, matrix, outputs[0]))
    variant, names = _out_variant(op)
    if len(names) != len(outputs):  # no variant, or not all outputs were asked for
        return [(_copied, (op, outputs, args, kwargs), {})]
    if variant in (torch.add, torch.div, torch.mul, torch.sub):
        args = args[0], _like(*args)
    return [(variant, args, {**kwargs, **dict(zip(names, outputs, strict=True))})]


def kernels_of_parts(tensors: Sequence[Tensor], joined: Tensor, dim: int) -> list[Kernel]:
    """Return what writes each of some tensors to where they were joined along a dimension."""
    parts = joined.split_with_sizes([tensor.shape[dim] for tensor in tensors], dim)
    return [(Tensor.copy_, pair, {}) for pair in zip(parts, tensors, strict=True)]


def tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    """Return the tensors among an operator's arguments or results."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors_in(value)


@cache
def _out_variant(op: Any) -> tuple[Any, tuple[str, ...]]:
    """Return what does the same into given tensors, and how it names them; or None."""
    function = op.overloadpacket.__name__
    if function in _DIRECT.get(op._overloadname, "").split():
        return getattr(torch, function), ("out",)
    wanted = [(a.name, str(a.type)) for a in op._schema.arguments]
    for name in op.overloadpacket.overloads():
        other = getattr(op.overloadpacket, name)
        outs = [a for a in other._schema.arguments if a.alias_info and a.alias_info.is_write]
        rest = [(a.name, str(a.type)) for a in other._schema.arguments if a not in outs]
        if outs and all(a.kwarg_only for a in outs) and rest == wanted:
            return other, tuple(a.name for a in outs)
    return None, ()


def _like(tensor: Tensor, other: Any) -> Any:
    """Return a number as a tensor, which torch would make of it each time; others as they are.

    A tensor without dimensions would decide on the type of the result, a number does not; in half
    precision a number is not rounded.
    """
    is_same = tensor.dim() > 0 and tensor.dtype in (torch.float32, torch.float64)
    if is_same and isinstance(other, (int, float)):
        return torch.tensor(other, dtype=tensor.dtype)
    return other


def _copied(op: Any, outputs: Sequence[Tensor], args: Any, kwargs: Any) -> None:
    """Run an operator that has no variant with `out`."""
    for output, result in zip(outputs, tensors_in((op(*args, **kwargs),)), strict=True):
        output.copy_(result)
