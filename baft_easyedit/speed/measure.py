"""Measure one method once: an edit, its memory, and generation with and without it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from baft_easyedit.speed.hardware import MemoryMeter, timed

Requests = Sequence[Mapping[str, Any]]


class EditCost(NamedTuple):
    """What one edit call took."""

    edit_s: float
    """Seconds of the call, set-up and all steps."""
    num_steps: int | None
    """Optimiser steps taken; None for a method that has none."""
    step_s: float | None
    """Seconds of a step, without set-up; None for fewer than two steps."""


@dataclass(frozen=True)
class Sample:
    """One measurement of a row; None for what was not, or could not be, measured."""

    edit_s: float
    """Seconds of an edit call, set-up and all steps."""
    num_steps: int | None = None
    """Optimiser steps taken."""
    step_s: float | None = None
    """Seconds of a step, without set-up."""
    peak_bytes: int | None = None
    """Peak of memory during the edit above the loaded model."""
    edited_tokens_per_s: float | None = None
    """Tokens generated per second for one prompt, with the edit."""
    unedited_tokens_per_s: float | None = None
    """Likewise by the restored model, right after."""


class Method(Protocol):
    """A method on a loaded model."""

    tokenizer: Any
    device: torch.device

    @property
    def model(self) -> Any:
        """The model as it is now, edited or not."""
        ...

    def edit(self, requests: Requests) -> EditCost:
        """Edit requests together in one call."""
        ...

    def undo(self) -> None:
        """Take the edit back."""
        ...


def measure(
    method: Method, requests: Requests, new_tokens: int, meter: MemoryMeter | None = None
) -> Sample:
    """Edit, generate, undo, and generate again.

    Args:
        method: What is measured; its model is unedited, before and after.
        requests: What is edited in one call; tokens are generated after the first one's prompt.
        new_tokens: How many tokens are generated; 0 leaves that out.
        meter: Measures the memory of the edit; None leaves that out.
    """
    if meter is not None:
        meter.start()
    cost = method.edit(requests)
    peak = None if meter is None else meter.peak()
    edited = _tokens_per_s(method, requests, new_tokens)
    method.undo()
    unedited = _tokens_per_s(method, requests, new_tokens)
    return Sample(*cost, peak, edited, unedited)


def profiled(method: Method, requests: Requests) -> str:
    """Edit and undo; return where the time of the edit went, a kernel or operator a line.

    Args:
        method: What is measured; its model is unedited, before and after.
        requests: What is edited in one call.
    """
    on_gpu = method.device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with profile(activities=activities) as seen:
        method.edit(requests)
    method.undo()
    order = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    return seen.key_averages().table(sort_by=order, row_limit=50, max_name_column_width=80)


@torch.no_grad()
def _tokens_per_s(method: Method, requests: Requests, new_tokens: int) -> float | None:
    """Generate greedily after the first request's prompt, exactly `new_tokens` tokens."""
    if not new_tokens:
        return None
    model = method.model
    if isinstance(model, nn.Module):
        model.eval()  # EasyEdit leaves LoRA's dropout on
    batch = method.tokenizer(requests[0]["prompt"], return_tensors="pt")
    inputs = {key: batch[key].to(method.device) for key in ("input_ids", "attention_mask")}
    options = {
        "max_new_tokens": new_tokens,
        "min_new_tokens": new_tokens,
        "do_sample": False,
        "pad_token_id": method.tokenizer.pad_token_id,
    }
    seconds, output = timed(lambda: model.generate(**inputs, **options), method.device)
    return (output.shape[1] - inputs["input_ids"].shape[1]) / seconds


@torch.no_grad()
def run_once(model: Any, device: torch.device) -> None:
    """Run a model on a token, so that everything it needs is loaded."""
    model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device))
