"""Run a computation again by its kernels alone: what a CUDA graph does, for the CPU.

A step of learning on few tokens is mostly Python, autograd and allocation around small kernels.
`Tape` lists the kernels (the operators of ATen) that a computation runs, once, and keeps all memory
that they touch; running them again is one loop. What does not depend on the inputs is not run
again: positions, masks, embeddings, views; what depends on the `settings` alone, when these are
said to have changed. The results are those of the computation, to the bit; products of few rows,
which are taken in slices (see `products`), may be rounded otherwise where MKL chooses so.
"""

import gc
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from baft_easyedit.kernels import Kernel, kernels_into, kernels_of_parts, tensors_in

Result = TypeVar("Result")
"""Tensors in NamedTuples, tuples, lists and dicts."""

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
            changing = _changing(recorder.calls, read)
            renewable = _changing(recorder.calls, read | set_up)
            dependent = _depending_on_values(recorder.calls, changing)
            if dependent is not None:
                raise RuntimeError(f"{dependent.op} depends on values")
            self.can_renew = _depending_on_values(recorder.calls, renewable) is None
            """Whether `renew` serves: not where kernels depend on what the settings hold."""
            calls = _needed(recorder.calls, renewable, _memories(outputs))
            each_time = [call for call in calls if call.writes & changing]
            before = [call for call in calls if not call.writes & changing]
            joins = _joins_of_changing_parts(each_time, changing)
            joined = [c.outputs[0] for c, changes in zip(each_time, joins, strict=True) if changes]
            _share_memory(each_time, _memories([*inputs, *settings, *outputs, *joined]))
            self.num_bytes = _num_bytes([*before, *each_time])
            """Memory of all results between inputs and outputs."""
            self._kernels: list[Kernel] = []
            self._renewing = [kernel for call in before for kernel in _kernels(call)]
            for call, changes in zip(each_time, joins, strict=True):
                if not changes:
                    self._kernels += _kernels(call)
                    continue
                dim = _by_name(call.op, call.args, call.kwargs)["dim"]
                parts = kernels_of_parts(call.inputs, call.outputs[0], dim)
                for kernel, is_changing in zip(parts, changes, strict=True):
                    (self._kernels if is_changing else self._renewing).append(kernel)

    def __len__(self) -> int:
        return len(self._kernels)

    def run(self) -> Result:
        """Run the kernels on what the inputs hold now."""
        _run(self._kernels)
        return self.result

    def renew(self) -> None:
        """Take note of what the settings hold now."""
        _run(self._renewing)


@torch.inference_mode()  # less to do than without gradients only; nobody gets a tensor made here
def _run(kernels: Iterable[Kernel]) -> None:
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
    inputs: list[Tensor]
    """Those among the arguments."""
    outputs: list[Tensor]
    reads: set[int]
    """Memories of the arguments."""
    writes: set[int]
    """Memories of the outputs, and of arguments that are changed in place."""
    value_tags: set[torch.Tag]
    """See `_Facts`."""


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Lists the operators that are called in this context, and keeps their tensors.

    Those that only look at memory in another way are left out.

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
        result = op(*args, **kwargs)
        facts = _facts(op)
        is_view = facts.may_view and isinstance(result, Tensor) and _is_view(result, args[0])
        if self.num_bytes <= self._limit and not is_view:
            self._note(facts, op, args, kwargs, result)
        return result

    def _note(self, facts: "_Facts", op: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Note a call."""
        inputs: list[Tensor] = []
        outputs: list[Tensor] = []
        args = _as_now(args, inputs)
        kwargs = {name: _as_now(value, inputs) for name, value in kwargs.items()}
        _as_now(result, outputs)
        reads, writes = _memories(inputs), _memories(outputs)
        if facts.changed:
            given = _by_name(op, args, kwargs)
            writes |= _memories(tensors_in(given[name] for name in facts.changed))
        elif writes and writes <= reads:  # several views, or one that its schema does not tell of
            return
        self.num_bytes += sum(output.nbytes for output in outputs)
        self.calls.append(_Call(op, args, kwargs, inputs, outputs, reads, writes, facts.value_tags))
        if self.num_bytes > self._limit:
            self.calls.clear()


def _as_now(value: Any, tensors: list[Tensor]) -> Any:
    """Return a value with its tensors, also added to a list, as they are seen now.

    `squeeze_` changes that in place.
    """
    if isinstance(value, Tensor):
        tensors.append(value := value.detach())
        return value
    if isinstance(value, (list, tuple)):
        return type(value)([_as_now(v, tensors) for v in value])
    return value


def _memories(tensors: Iterable[Tensor]) -> set[int]:
    """Return what tells the memories of tensors apart while they live."""
    return {tensor.untyped_storage()._cdata for tensor in tensors}


def _by_name(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return an operator's arguments by their names."""
    schema = op._schema.arguments
    absent = {a.name: a.default_value for a in schema if a.has_default_value()}
    return absent | dict(zip((a.name for a in schema), args, strict=False)) | kwargs


def _is_view(result: Tensor, argument: Tensor) -> bool:
    """Tell whether a result lies in the memory of an argument."""
    return result.untyped_storage()._cdata == argument.untyped_storage()._cdata


class _Facts(NamedTuple):
    """What is known of an operator."""

    changed: tuple[str, ...]
    """Names of the arguments that it changes in place."""
    may_view: bool
    """Whether it may only look at the memory of its first argument in another way."""
    value_tags: set[torch.Tag]
    """Why its kernel or shapes may depend on more than its arguments' shapes."""


@cache
def _facts(op: Any) -> _Facts:
    """Return what is known of an operator."""
    aliases = [a for a in op._schema.arguments if a.alias_info]
    changed = tuple(a.name for a in aliases if a.alias_info.is_write)
    may_view = (bool(aliases) and not changed) or torch.Tag.inplace_view in op.tags
    return _Facts(changed, may_view, _VALUE_TAGS.intersection(op.tags))


def _needed(calls: Sequence[_Call], changing: set[int], outputs: set[int]) -> list[_Call]:
    """Return the calls by which the outputs depend on memories that change, in order."""
    wanted = set(outputs)
    needed = []
    for call in reversed(calls):
        if call.writes & wanted and call.writes & changing:
            needed.append(call)
            wanted |= call.reads
    return needed[::-1]


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


def _depending_on_values(calls: Sequence[_Call], changing: set[int]) -> _Call | None:
    """Return the first call whose kernel or shapes depend on contents that change."""
    for call in calls:
        if call.value_tags and call.reads & changing and _depends_on_values(call, changing):
            return call
    return None


def _depends_on_values(call: _Call, changing: set[int]) -> bool:
    """Tell whether a call's kernel or shapes depend on contents that change."""
    tags, op = call.value_tags, call.op
    depends = torch.Tag.data_dependent_output in tags
    if torch.Tag.nondeterministic_seeded in tags:  # attention is not random without dropout
        depends |= _by_name(op, call.args, call.kwargs).get("dropout_p") != 0
    if torch.Tag.dynamic_output_shape in tags:  # of indexing, only a mask's values make shapes
        indices = tensors_in(call.args[1:])
        masks = [i for i in indices if i.dtype in (torch.bool, torch.uint8)]
        depends |= not str(op).startswith("aten.index") or bool(_memories(masks) & changing)
    return depends


def _joins_of_changing_parts(calls: Sequence[_Call], changing: set[int]) -> list[list[bool]]:
    """Find calls that join tensors of which only some change, such as the past and what is new.

    Returns:
        For each call, which of the tensors change; nothing if all do, if it does something else, or
        if another call writes to what it makes.
    """
    writers = Counter(memory for call in calls for memory in call.writes)
    joins: list[list[bool]] = []
    for call in calls:
        joins.append([])
        if call.op is torch.ops.aten.cat.default and all(writers[m] == 1 for m in call.writes):
            change = [not changing.isdisjoint(_memories([tensor])) for tensor in call.inputs]
            is_plain = all(tensor.dim() == call.outputs[0].dim() for tensor in call.inputs)
            if is_plain and not all(change):
                joins[-1] = change
    return joins


def _num_bytes(calls: Iterable[_Call]) -> int:
    """Return the memory that calls write to."""
    storages = {
        output.untyped_storage()._cdata: output.untyped_storage().nbytes()
        for call in calls
        for output in call.outputs
    }
    return sum(storages.values())


_size = torch.UntypedStorage.nbytes


def _share_memory(calls: Sequence[_Call], kept: set[int]) -> None:
    """Let calls share memory: what nobody reads any more serves for what comes next.

    Args:
        calls: In order; their tensors are moved.
        kept: Memories that are not shared: inputs and outputs.
    """
    touched = [call.reads | call.writes for call in calls]
    last = {memory: i for i, memories in enumerate(touched) for memory in memories}
    free: list[torch.UntypedStorage] = []  # the smallest first
    shared: dict[int, torch.UntypedStorage] = {}
    seen = set(kept)
    for i, call in enumerate(calls):
        seen |= call.reads  # what it reads has been there before
        for output in call.outputs:
            own = output.untyped_storage()
            if own._cdata not in seen:
                shared[own._cdata] = _taken(free, own)
        seen |= call.writes
        for tensor in (*call.inputs, *call.outputs):
            place = shared.get(tensor.untyped_storage()._cdata)
            if place is not None:
                tensor.set_(place, tensor.storage_offset(), tensor.shape, tensor.stride())
        for memory in touched[i]:
            if last[memory] == i and memory in shared:
                insort(free, shared[memory], key=_size)


def _taken(free: list[torch.UntypedStorage], wanted: torch.UntypedStorage) -> torch.UntypedStorage:
    """Take the smallest free memory that is not much too large, or else what was wanted."""
    size = _size(wanted)
    i = bisect_left(free, size, key=_size)
    return free.pop(i) if i < len(free) and _size(free[i]) <= 4 * size + 4096 else wanted


def _kernels(call: _Call) -> list[Kernel]:
    """Return what makes a call's results anew, in their memory."""
    if _facts(call.op).changed:
        return [(call.op, call.args, call.kwargs)]
    return kernels_into(call.op, call.args, call.kwargs, call.outputs)
