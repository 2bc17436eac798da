"""What the device can do, and what it was asked for: clock, memory in use, bandwidth, bound."""

import gc
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import TypeVar

import torch
from torch import nn

from baft_easyedit.model.inspect import decoder_layers

Result = TypeVar("Result")

_RESET_PEAK = "5"
"""What Linux wants in /proc/self/clear_refs to start a new peak of the resident set."""


def synchronize(device: torch.device) -> None:
    """Wait until the device has done everything that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(action: Callable[[], Result], device: torch.device) -> tuple[float, Result]:
    """Run something; return the seconds until the device was done, and its result."""
    synchronize(device)
    start = time.perf_counter()
    result = action()
    synchronize(device)
    return time.perf_counter() - start, result


class MemoryMeter:
    """Measures the peak of memory above that of the loaded model.

    On CUDA: bytes in torch's tensors, `max_memory_allocated` less `memory_allocated` at `start`,
    with the model loaded; what the driver and torch's cache hold is not counted, and what a method
    keeps from one edit to the next counts in its first edit only.

    On a CPU: the peak of the process's resident set (`VmHWM`, which Linux can start anew) less that
    when the meter was made. It counts everything the process touched, Python's memory too; and
    because the C library keeps some of what is freed, a process can only be measured for one
    method. Where the peak cannot be started anew (other systems), it is `ru_maxrss`, of the
    process's whole life: growth below an earlier peak, such as that of loading, is not seen.

    Args:
        device: Where the model is, with everything loaded and run once.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        gc.collect()
        self._baseline = self._in_use()

    def start(self) -> None:
        """Forget earlier peaks."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._baseline = self._in_use()
        else:
            _reset_resident_peak()

    def peak(self) -> int:
        """Return the peak since `start`, in bytes above the loaded model."""
        return max(0, self._peak() - self._baseline)

    def _in_use(self) -> int:
        """Return the bytes in use."""
        if self._device.type == "cuda":
            synchronize(self._device)
            return torch.cuda.memory_allocated(self._device)
        return _peak_resident() if _reset_resident_peak() else _highest_resident()

    def _peak(self) -> int:
        """Return the most bytes that were in use."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return _peak_resident() if _reset_is_possible() else _highest_resident()


def _reset_is_possible() -> bool:
    """Tell whether the system can start a new peak of the resident set."""
    return os.access("/proc/self/clear_refs", os.W_OK)


def _reset_resident_peak() -> bool:
    """Start a new peak of the resident set, from what is resident now; return whether it works."""
    if not _reset_is_possible():
        return False
    Path("/proc/self/clear_refs").write_text(_RESET_PEAK, encoding="ascii")
    return True


def _peak_resident() -> int:
    """Return Linux's peak of the resident set since it was last started anew, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:"))


def _highest_resident() -> int:
    """Return the peak of the resident set over the process's life, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10


def copy_bandwidth(device: torch.device, num_bytes: int | None = None, tries: int = 5) -> float:
    """Measure how fast a large tensor is copied on a device.

    Args:
        device: Where.
        num_bytes: Size of the tensor; by default 1 GiB on CUDA and 256 MiB elsewhere, more than
            caches hold.
        tries: Copies timed, after one that is not.

    Returns:
        Bytes per second, those read and those written together, median of the tries.
    """
    size = num_bytes or (1 << 30 if device.type == "cuda" else 256 << 20)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = [timed(lambda: target.copy_(source), device)[0] for _ in range(tries + 1)]
    return 2 * size / median(seconds[1:])


def bytes_per_step(model: nn.Module, first_layer: int) -> int:
    """Count the weights that a step of an edit must read, however it is computed.

    The edit acts on the output of decoder layer l1. The layers after it, the final norm and the
    output layer are read in the forward, and again in the backward, whose gradients with respect to
    activations need the same weights; those of layers 0..l1 and the input embedding are not needed.

    Args:
        model: A causal language model.
        first_layer: l1, 0-based.

    Returns:
        Bytes, forward and backward.
    """
    stack = decoder_layers(model)
    inside = {id(module) for layer in stack for module in layer.modules()}
    outside = [
        p
        for module in model.modules()
        if id(module) not in inside and not isinstance(module, nn.Embedding)
        for p in module.parameters(recurse=False)
    ]
    after = [p for layer in list(stack)[first_layer + 1 :] for p in layer.parameters()]
    return 2 * sum(p.numel() * p.element_size() for p in (*outside, *after))
