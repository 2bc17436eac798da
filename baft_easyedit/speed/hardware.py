"""What the device can do, and what it was asked for: clock, peak of memory, bandwidth, bound."""

import gc
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils.benchmark import Timer

from baft_easyedit.model.inspect import decoder_layers

Result = TypeVar("Result")

_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"
"""What Linux wants in `_CLEAR_REFS` to start a new peak of the resident set."""


def timed(action: Callable[[], Result], device: torch.device) -> tuple[float, Result]:
    """Run something; return the seconds until the device was done, and its result."""
    _synchronize(device)
    start = time.perf_counter()
    result = action()
    _synchronize(device)
    return time.perf_counter() - start, result


def _synchronize(device: torch.device) -> None:
    """Wait until the device has done everything that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def with_peak(action: Callable[[], Result], device: torch.device) -> tuple[int | None, Result]:
    """Run something; return its peak of memory above what was in use before, and its result.

    Returns:
        On CUDA, bytes in torch's tensors: what the driver and torch's cache hold is not counted.
        On a CPU, bytes of the process's resident set (`VmHWM`), Python's memory too; the C library
        keeps some of what is freed, so only a process's first call counts everything. None where
        the system cannot start a new peak, that is on other systems than Linux.
    """
    gc.collect()
    if device.type == "cuda":
        _synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = action()
        return torch.cuda.max_memory_allocated(device) - before, result
    if not os.access(_CLEAR_REFS, os.W_OK):
        return None, action()
    _CLEAR_REFS.write_text(_RESET_PEAK, encoding="ascii")
    before = _peak_resident()
    result = action()
    return _peak_resident() - before, result


def _peak_resident() -> int:
    """Return Linux's peak of the resident set since it was last started anew, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:"))


def copy_bandwidth(device: torch.device, num_bytes: int | None = None) -> float:
    """Measure how fast a large tensor is copied on a device.

    Args:
        device: Where.
        num_bytes: Size of the tensor; by default 1 GiB on CUDA and 256 MiB elsewhere, more than
            caches hold.

    Returns:
        Bytes per second, those read and those written together.
    """
    size = num_bytes or (1 << 30 if device.type == "cuda" else 256 << 20)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    tensors = {"source": source, "target": torch.empty_like(source)}
    timer = Timer("target.copy_(source)", globals=tensors, num_threads=torch.get_num_threads())
    return 2 * size / timer.blocked_autorange().median


def bytes_per_step(model: Any, first_layer: int) -> int:
    """Count the bytes of weights that a step of an edit must read, forward and backward.

    The edit acts on the output of decoder layer l1 (`first_layer`, 0-based). The layers after it,
    the final norm and the output layer are read in the forward, and again in the backward, whose
    gradients with respect to activations need the same weights; those of layers 0..l1 and the
    embeddings are not needed.
    """
    embeddings = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    unread = [*embeddings, *decoder_layers(model)[: first_layer + 1]]
    skipped = {id(p) for module in unread for p in module.parameters()}
    skipped -= {id(p) for p in model.get_output_embeddings().parameters()}  # may be tied
    read = [p for p in model.parameters() if id(p) not in skipped]
    return 2 * sum(p.numel() * p.element_size() for p in read)
