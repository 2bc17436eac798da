"""Methods on a loaded model, and what one edit of them costs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from baft_easyedit.editor import BaFTEditor
from baft_easyedit.hparams import BaFTHyperParams, ReFTHyperParams, scaled_layers
from baft_easyedit.model.inspect import decoder_layers
from baft_easyedit.speed.hardware import bytes_per_step, copy_bandwidth, timed, with_peak
from baft_easyedit.speed.options import Row, SpeedOptions

Requests = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Sample:
    """One measurement of a row; None for what was not, or could not be, measured."""

    edit_s: float  # of an edit call, set-up and all steps
    num_steps: int | None = None  # of the optimiser
    step_s: float | None = None  # of a step, without set-up
    peak_bytes: int | None = None  # memory during the edit, above what was in use before
    edited_tokens_per_s: float | None = None  # generated for one prompt, with the edit
    unedited_tokens_per_s: float | None = None  # by the restored model, right after
    bound_s: float | None = None  # to read what a step must read, as fast as the device copies now


class Method(Protocol):
    """A method on a loaded model."""

    tokenizer: Any
    device: torch.device
    step_bytes: int | None
    """Bytes of weights that a step must read; None if that is not known."""

    @property
    def model(self) -> Any:
        """The model as it is now, edited or not."""
        ...

    def edit(self, requests: Requests) -> Sample:
        """Edit requests together in one call; return its time and steps."""
        ...

    def undo(self) -> None:
        """Take the edit back."""
        ...


class OurMethod:
    """BaFT or ReFT.

    A step's time is the difference between two edit calls, of all steps and of one: set-up, such as
    recording the prefix, is in both.

    Args:
        model: A loaded model without an edit.
        tokenizer: Its tokenizer.
        row: The method and its engine.
        options: Rank and number of steps.
    """

    def __init__(self, model: Any, tokenizer: Any, row: Row, options: SpeedOptions) -> None:
        layers = scaled_layers(len(decoder_layers(model)))
        hparams_class = {"BaFT": BaFTHyperParams, "ReFT": ReFTHyperParams}[row.method]
        hparams = hparams_class(
            model_name=type(model).__name__,  # it is loaded already
            layers=layers,
            rank=options.rank,
            num_steps=options.steps,
            early_stop_loss=0.0,
            engine=row.engine or "",
        )
        self.model = model
        self.tokenizer = tokenizer
        self.device: torch.device = model.device
        self.step_bytes: int | None = bytes_per_step(model, layers[0])
        self._editor = BaFTEditor(model, tokenizer, hparams)
        self._one_step = BaFTEditor(model, tokenizer, replace(hparams, num_steps=1))

    def edit(self, requests: Requests) -> Sample:
        """Edit requests together in one call; the edit that stays is of one step."""
        seconds, report = timed(lambda: self._editor.edit(requests), self.device)
        self._editor.undo()
        one_step_s, _ = timed(lambda: self._one_step.edit(requests), self.device)
        more = report.num_steps - 1
        return Sample(
            seconds, report.num_steps, (seconds - one_step_s) / more if more > 0 else None
        )

    def undo(self) -> None:
        """Take the edit back."""
        self._one_step.undo()


def measure(method: Method, requests: Requests, new_tokens: int) -> Sample:
    """Edit, generate, undo, and generate again.

    Args:
        method: What is measured; its model is unedited, before and after.
        requests: What is edited in one call; tokens are generated after the first one's prompt.
        new_tokens: How many tokens are generated; 0 leaves that out.
    """
    bytes_read = method.step_bytes
    bound_s = None if bytes_read is None else bytes_read / copy_bandwidth(method.device)
    peak, sample = with_peak(lambda: method.edit(requests), method.device)
    edited = _tokens_per_s(method, requests, new_tokens)
    method.undo()
    return replace(
        sample,
        peak_bytes=peak,
        edited_tokens_per_s=edited,
        unedited_tokens_per_s=_tokens_per_s(method, requests, new_tokens),
        bound_s=bound_s,
    )


def profiled(method: Method, requests: Requests) -> str:
    """Edit and undo; return where the time of the edit went, a kernel or operator a line."""
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
    batch = method.tokenizer(requests[0]["prompt"], return_tensors="pt").to(method.device)
    options = {
        "attention_mask": batch["attention_mask"],
        "max_new_tokens": new_tokens,
        "min_new_tokens": new_tokens,
        "do_sample": False,
        "pad_token_id": method.tokenizer.pad_token_id,
    }
    seconds, _ = timed(lambda: model.generate(batch["input_ids"], **options), method.device)
    return new_tokens / seconds
