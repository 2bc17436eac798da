"""Run a computation again by its kernels alone: what a CUDA graph does, for the CPU.

A step of learning on few tokens is mostly Python, autograd and allocation around small kernels.
`Tape` lists the kernels (the operators of ATen) that a computation runs, once, and keeps all memory
that they touch; running them again is one loop. What does not depend on the inputs is not run
again: positions, masks, embeddings, views; what depends on the `settings` alone, when these are
said to have changed. The results are those of the computation, to the bit.
"""

import gc
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

Result = TypeVar("Result")
"""Tensors in NamedTuples, tuples, lists and dicts."""

_DIRECT = {
    "addmm": ("default",),
    "add": ("Tensor",),
    "bmm": ("default",),
    "cat": ("default",),
    "div": ("Scalar", "Tensor"),
    "mean": ("dim",),
    "mm": ("default",),
    "mul": ("Scalar", "Tensor"),
    "neg": ("default",),
    "pow": ("Tensor_Scalar",),
    "rsqrt": ("default",),
    "sigmoid": ("default",),
    "sub": ("Tensor",),
    "sum": ("dim_IntList",),
    "where": ("self",),
}
"""Kernels that torch's function of the same name calls with less ado than the operator itself."""

_VALUE_TAGS = {
    torch.Tag.data_dependent_output,
    torch.Tag.nondeterministic_seeded,
    torch.Tag.dynamic_output_shape,
}
"""What an operator has whose kernel or shapes may depend on more than its arguments' shapes."""


class Tape(Generic[Result]):
    """The kernels of a computation, in a row.

    Args:
        compute: Runs the same kernels each time, whatever the inputs hold; it is called once.
        inputs: Tensors whose contents change, in place, from one run to the next.
        limit_bytes: Most memory to keep.
        settings: Tensors whose contents may change, in place, before `renew`.

    Raises:
        RuntimeError: If the kernels depend on what the inputs hold, or the memory is too much.
    """

    def __init__(
        self,
        compute: Callable[[], Result],
        inputs: Sequence[Tensor],
        limit_bytes: int,
        settings: Sequence[Tensor] = (),
    ) -> None:
        with uncollected():
            with _Recorder(limit_bytes) as recorder:
                result = compute()
            self.result: Result = tree_map_only(Tensor, Tensor.detach, result)
            """What the latest run gave, in the same memory each time."""
            if recorder.num_bytes > limit_bytes:
                raise RuntimeError(f"its tensors take more than {limit_bytes} bytes")
            outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
            read, set_up = _memories(inputs), _memories(settings)
            calls = _needed(recorder.calls, read | set_up, _memories(outputs))
            changing = _changing(recorder.calls, read)
            _check_repeatable(recorder.calls, changing)
            each_time = [call for call in calls if call.writes & changing]
            before = [call for call in calls if not call.writes & changing]
            each_time = _Reuse(each_time, _memories([*inputs, *settings, *outputs])).calls
            self.can_renew = _are_repeatable(recorder.calls, read | set_up)
            """Whether `renew` serves: not where kernels depend on what the settings hold."""
            self.num_bytes = _num_bytes([*before, *each_time])
            """Memory of all results between inputs and outputs."""
            self._kernels = [_kernel(call) for call in each_time]
            self._renewing = [_kernel(call) for call in before]

    def __len__(self) -> int:
        return len(self._kernels)

    def run(self) -> Result:
        """Run the kernels on what the inputs hold now."""
        _run(self._kernels)
        return self.result

    def renew(self) -> None:
        """Take note of what the settings hold now."""
        _run(self._renewing)


_Kernel = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]


@torch.no_grad()
def _run(kernels: Iterable[_Kernel]) -> None:
    """Run kernels in their order."""
    with torch.autocast("cpu", enabled=False):  # they are what autocast made of the computation
        for kernel, args, kwargs in kernels:
            kernel(*args, **kwargs)


@contextmanager
def uncollected() -> Iterator[None]:
    """Keep Python's garbage collector out: for so many small objects it would search them all."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class _Call(NamedTuple):
    """One call of an operator. Memories are told apart by their storage."""

    op: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: list[Tensor]
    reads: set[int]
    """Memories of the arguments."""
    writes: set[int]
    """Memories of the outputs, and of arguments that are changed in place."""
    is_view: bool
    """Whether it only looks at memory in another way."""


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Lists the operators that are called in this context, and keeps their tensors.

    Args:
        limit_bytes: Of all results; beyond it nothing is kept.
    """

    def __init__(self, limit_bytes: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[_Call] = []
        self.num_bytes = 0
        self._limit = limit_bytes

    def __torch_dispatch__(
        self, op: Any, _types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call an operator, and note it."""
        kwargs = kwargs or {}
        if self.num_bytes > self._limit:
            return op(*args, **kwargs)
        seen = _as_now(args), {name: _as_now(value) for name, value in kwargs.items()}
        result = op(*args, **kwargs)
        self._note(op, *seen, list(_tensors((_as_now(result),))))
        return result

    def _note(self, op: Any, args: Any, kwargs: Any, outputs: list[Tensor]) -> None:
        """Note a call."""
        reads = _memories(_tensors((*args, *kwargs.values())))
        writes = _memories(outputs)
        in_place = _changed_arguments(op)
        if in_place:
            given = _by_name(op, args, kwargs)
            writes |= _memories(_tensors(given[name] for name in in_place))
        is_view = (bool(writes) and writes <= reads and not in_place) or (
            torch.Tag.inplace_view in op.tags
        )
        if not is_view:
            self.num_bytes += sum(output.nbytes for output in outputs)
        if self.num_bytes > self._limit:
            self.calls.clear()
        else:
            self.calls.append(_Call(op, args, kwargs, outputs, reads, writes, is_view))


def _as_now(value: Any) -> Any:
    """Return a value with its tensors as they are seen now: `squeeze_` changes how, in place."""
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, (list, tuple)):
        return type(value)(map(_as_now, value))
    return value


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """Return the tensors among an operator's arguments or results."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _memories(tensors: Iterable[Tensor]) -> set[int]:
    """Return what tells the memories of tensors apart while they live."""
    return {tensor.untyped_storage()._cdata for tensor in tensors}


def _by_name(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return an operator's arguments by their names."""
    schema = op._schema.arguments
    absent = {a.name: a.default_value for a in schema if a.has_default_value()}
    return absent | dict(zip((a.name for a in schema), args, strict=False)) | kwargs


@cache
def _changed_arguments(op: Any) -> tuple[str, ...]:
    """Return the names of the arguments that an operator changes in place."""
    return tuple(a.name for a in op._schema.arguments if a.alias_info and a.alias_info.is_write)


def _needed(calls: Sequence[_Call], inputs: set[int], outputs: set[int]) -> list[_Call]:
    """Return the calls by which the outputs depend on the inputs, in order; no views."""
    changing = _changing(calls, inputs)
    wanted = set(outputs)
    needed = []
    for call in reversed(calls):
        if call.writes & wanted and call.writes & changing:
            needed.append(call)
            wanted |= call.reads
    return [call for call in reversed(needed) if not call.is_view]


def _changing(calls: Sequence[_Call], inputs: set[int]) -> set[int]:
    """Return the memories whose contents follow from the inputs, at any time."""
    changing, known = set(inputs), 0
    while len(changing) > known:  # memory that is changed in place had a content before
        known = len(changing)
        for call in calls:
            # What writes memory that changes is run each time, with all that it writes.
            if not (changing.isdisjoint(call.reads) and changing.isdisjoint(call.writes)):
                changing |= call.writes
    return changing


def _are_repeatable(calls: Sequence[_Call], inputs: set[int]) -> bool:
    """Tell whether calls do the same whatever the inputs hold."""
    try:
        _check_repeatable(calls, _changing(calls, inputs))
    except RuntimeError:
        return False
    return True


def _check_repeatable(calls: Sequence[_Call], changing: set[int]) -> None:
    """Raise RuntimeError if a kernel or its shapes depend on contents that change."""
    for call in calls:
        if call.reads & changing and _depends_on_values(call, changing):
            raise RuntimeError(f"{call.op} depends on values")


def _depends_on_values(call: _Call, changing: set[int]) -> bool:
    """Tell whether a call's kernel or shapes depend on contents that change."""
    tags, op = call.op.tags, call.op
    if _VALUE_TAGS.isdisjoint(tags):
        return False
    depends = torch.Tag.data_dependent_output in tags
    if torch.Tag.nondeterministic_seeded in tags:  # attention is not random without dropout
        depends |= _by_name(op, call.args, call.kwargs).get("dropout_p") != 0
    if torch.Tag.dynamic_output_shape in tags:  # of indexing, only a mask's values make shapes
        indices = _tensors(call.args[1:])
        masks = [i for i in indices if i.dtype in (torch.bool, torch.uint8)]
        depends |= not str(op).startswith("aten.index") or bool(_memories(masks) & changing)
    return depends


def _num_bytes(calls: Iterable[_Call]) -> int:
    """Return the memory that calls write to."""
    storages = {
        output.untyped_storage()._cdata: output.untyped_storage().nbytes()
        for call in calls
        for output in call.outputs
    }
    return sum(storages.values())


_size = torch.UntypedStorage.nbytes


class _Reuse:
    """Lets calls share memory: what nobody reads any more serves for what comes next.

    Args:
        calls: In order; no views.
        kept: Memories that are not shared: inputs and outputs.
    """

    def __init__(self, calls: Sequence[_Call], kept: set[int]) -> None:
        self._free: list[torch.UntypedStorage] = []  # the smallest first
        self._shared: dict[int, torch.UntypedStorage] = {}
        last = {memory: i for i, call in enumerate(calls) for memory in call.reads | call.writes}
        seen = set(kept)
        self.calls = []
        for i, call in enumerate(calls):
            for output in call.outputs:
                own = output.untyped_storage()
                # What it reads has been there before.
                if own._cdata not in seen and own._cdata not in call.reads:
                    self._shared[own._cdata] = self._taken(own)
            seen |= call.reads | call.writes
            self.calls.append(self._moved_call(call))
            for memory in call.reads | call.writes:
                if last[memory] == i and memory in self._shared:
                    insort(self._free, self._shared[memory], key=_size)

    def _taken(self, wanted: torch.UntypedStorage) -> torch.UntypedStorage:
        """Take the smallest free memory that is not much too large, or that of the call itself."""
        size = _size(wanted)
        i = bisect_left(self._free, size, key=_size)
        fits = i < len(self._free) and _size(self._free[i]) <= 4 * size + 4096
        return self._free.pop(i) if fits else wanted

    def _moved_call(self, call: _Call) -> _Call:
        """Return a call with its tensors where they are now."""
        kwargs = {name: self._moved(value) for name, value in call.kwargs.items()}
        return call._replace(
            args=self._moved(call.args), kwargs=kwargs, outputs=self._moved(call.outputs)
        )

    def _moved(self, value: Any) -> Any:
        """Return an argument with its tensors where they are now."""
        if isinstance(value, (list, tuple)):
            return type(value)(map(self._moved, value))
        if not isinstance(value, Tensor):
            return value
        memory = self._shared.get(value.untyped_storage()._cdata)
        if memory is None:
            return value
        place = value.storage_offset(), value.shape, value.stride()
        return torch.empty(0, dtype=value.dtype).set_(memory, *place)


def _kernel(call: _Call) -> _Kernel:
    """Return what writes the outputs of a call anew, and its arguments."""
    op, args, kwargs, outputs = call[:4]
    if _changed_arguments(op):
        return op, args, kwargs
    variant, names = _out_variant(op)
    if len(names) != len(outputs):  # no variant, or not all outputs were asked for
        return _copied, (op, outputs, args, kwargs), {}
    function = op.overloadpacket.__name__
    if op._overloadname in _DIRECT.get(function, ()):
        return getattr(torch, function), args, {**kwargs, "out": outputs[0]}
    return variant, args, {**kwargs, **dict(zip(names, outputs, strict=True))}


@cache
def _out_variant(op: Any) -> tuple[Any, tuple[str, ...]]:
    """Return the operator that does the same into given tensors, and how it names them; or None."""
    wanted = [(a.name, str(a.type)) for a in op._schema.arguments]
    for name in op.overloadpacket.overloads():
        other = getattr(op.overloadpacket, name)
        outs = [a for a in other._schema.arguments if a.alias_info and a.alias_info.is_write]
        rest = [(a.name, str(a.type)) for a in other._schema.arguments if a not in outs]
        if outs and all(a.kwarg_only for a in outs) and rest == wanted:
            return other, tuple(a.name for a in outs)
    return None, ()


def _copied(op: Any, outputs: Sequence[Tensor], args: Any, kwargs: Any) -> None:
    """Run an operator that has no variant with `out`."""
    for output, result in zip(outputs, _tensors((op(*args, **kwargs),)), strict=True):
        output.copy_(result)
