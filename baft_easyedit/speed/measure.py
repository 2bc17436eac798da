"""Measure what one edit of a method costs on a loaded model: time, memory, speed of generation.

Clocks are read after the device has finished all work that it was given.
"""

import gc
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.profiler import ProfilerActivity, profile
from torch.utils.benchmark import Timer

from baft_easyedit.easyedit.arguments import prepare_requests
from baft_easyedit.easyedit.host import loaded_generation
from baft_easyedit.easyedit.model_path import host_model_path
from baft_easyedit.easyedit.peers import batchable
from baft_easyedit.easyedit.plugin import register
from baft_easyedit.easyedit.session import Session, make_peer, synchronize
from baft_easyedit.editor import BaFTEditor
from baft_easyedit.facts import edit_requests
from baft_easyedit.hparams import OUR_METHODS
from baft_easyedit.model.inspect import decoder_layers
from baft_easyedit.speed.options import Row, SpeedOptions

Requests = Sequence[Mapping[str, Any]]
Result = TypeVar("Result")

_CLEAR_REFS = Path("/proc/self/clear_refs")
_SEED = 0
_NUM_TEXTS = 300
"""Number of facts that serve as texts for key statistics."""


@dataclass(frozen=True)
class Sample:
    """One measurement of a row; None for what was not, or could not be, measured."""

    edit_s: float  # of an edit call, set-up and all steps
    num_steps: int | None = None  # of the optimiser
    step_s: float | None = None  # of a step, without set-up
    peak_bytes: int | None = None  # memory during the edit, above what was in use before
    edited_tokens_per_s: float | None = None  # generated for one prompt, with the edit
    unedited_tokens_per_s: float | None = None  # by the restored model, right after
    bound_s: float | None = None  # to read a step's weights, as fast as the device copies now


class OurMethod:
    """BaFT or ReFT on a loaded model without an edit.

    A step's time is computed from the difference between two edit calls, of all steps and of one:
    set-up, such as recording the prefix, is in both.
    """

    def __init__(self, model: Any, tokenizer: Any, row: Row, options: SpeedOptions) -> None:
        hparams = OUR_METHODS[row.method](
            model_name=type(model).__name__,  # it is loaded already
            layers="auto",
            rank=options.rank,
            num_steps=options.steps,
            early_stop_loss=0.0,
            engine=row.engine or "",
        )
        self.model, self.tokenizer = model, tokenizer
        self.device: torch.device = model.device
        self._editor = BaFTEditor(model, tokenizer, hparams)
        first = self._editor.model_edit.layers[0]
        self.step_bytes: int | None = bytes_per_step(model, first)
        self._one_step = BaFTEditor(model, tokenizer, replace(hparams, num_steps=1))

    def edit(self, requests: Requests) -> Sample:
        """Time an edit call of all steps, then one of a single step, whose edit stays attached."""
        seconds, report = timed(lambda: self._editor.edit(requests), self.device)
        self._editor.undo()
        one_step_s, _ = timed(lambda: self._one_step.edit(requests), self.device)
        more = report.num_steps - 1
        return Sample(
            seconds, report.num_steps, (seconds - one_step_s) / more if more > 0 else None
        )

    def run(self, requests: Requests) -> Callable[[], object]:
        """Make one edit call of all steps; return what takes it back."""
        self._editor.edit(requests)
        return self._editor.undo

    def undo(self) -> None:
        """Take the edit back."""
        self._one_step.undo()


class PeerMethod:
    """A method of EasyEdit on a model that EasyEdit loads. Its files go to the working directory.

    It runs with its own hyper-parameters, scaled to the model, so also its own number of steps and
    early stops. Statistics and caches needed once for a model are made before the clock starts.

    Raises:
        ValueError: If the method cannot be run under this EasyEdit.
        ImportError: If there is no EasyEdit.
    """

    step_bytes: int | None = None  # which weights a step must read is not known

    def __init__(self, name: str, model: str, options: SpeedOptions) -> None:
        host = register()
        half = {"fp16": options.dtype == "float16", "bf16": options.dtype == "bfloat16"}
        texts = [f"{r['prompt']} {r['target_new']}" for r in edit_requests("train", _NUM_TEXTS)]
        torch.manual_seed(_SEED)
        editor, notes = make_peer(
            name, host_model_path(model), options.device, texts, half, seed=_SEED
        )
        self._name = name
        self.notes = [f"EasyEdit {host.version} ({host.generation})", *notes]
        self.tokenizer: Any = editor.tok
        self.device: torch.device = next(editor.model.parameters()).device
        self._session = Session(editor, "", verify=False)

    @property
    def model(self) -> Any:
        """The model as it is now, edited or not."""
        return self._session.model

    def edit(self, requests: Requests) -> Sample:
        """Edit requests together in one call.

        Raises:
            ValueError: If there are several, and the method edits one at a time.
        """
        if len(requests) > 1 and not batchable(self._name, loaded_generation()):
            raise ValueError(
                f"batch_size must be 1 for {self._name}, which edits one request at a time in "
                f"EasyEdit; got {len(requests)}"
            )
        with step_times() as times:
            seconds = self._session.edit(prepare_requests(requests))
        between = len(times) - 1
        step_s = (times[-1] - times[0]) / between if between > 0 else None
        return Sample(seconds, len(times) or None, step_s)

    def run(self, requests: Requests) -> Callable[[], object]:
        """Make one edit call; return what takes it back."""
        self.edit(requests)
        return self.undo

    def undo(self) -> None:
        """Take the edit back."""
        self._session.restore()


def measure(method: OurMethod | PeerMethod, requests: Requests, new_tokens: int) -> Sample:
    """Edit, generate (0 new tokens: not) after the first prompt, undo, and generate again."""
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


def profiled(method: OurMethod | PeerMethod, requests: Requests) -> str:
    """Edit once and undo; return where the time goes as text, a kernel or operator on each line."""
    on_gpu = method.device.type == "cuda"
    # With the CPU's activity too, torch takes minutes to evaluate a profile of a GPU.
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    with profile(activities=[activity]) as seen:
        undo = method.run(requests)
        synchronize(method.device)
    undo()
    if not on_gpu:
        averages = seen.key_averages()
        return averages.table(sort_by="self_cpu_time_total", row_limit=50, max_name_column_width=80)
    with TemporaryDirectory() as directory:
        trace = Path(directory) / "trace.json"
        seen.export_chrome_trace(str(trace))  # in seconds where torch's own tables take minutes
        return kernel_table(json.loads(trace.read_bytes())["traceEvents"])


def kernel_table(events: Iterable[Mapping[str, Any]], most: int = 30) -> str:
    """Return the device's kernels and copies in a trace, those with the most time first.

    Those beyond `most` share a line.
    """
    on_device = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    count, total = Counter[str](), Counter[str]()
    for event in on_device:
        count[event["name"]] += 1
        total[event["name"]] += event["dur"] / 1e3
    top = [(total[name], count[name], name[:120]) for name, _ in total.most_common(most)]
    rest = (total.total() - sum(t for t, _, _ in top), len(on_device) - sum(n for _, n, _ in top))
    lines = [*top, (*rest, "others"), (total.total(), len(on_device), "all")]
    return "\n".join(["      ms  kernels", *(f"{t:8.2f} {n:8} {name}" for t, n, name in lines)])


@torch.no_grad()
def _tokens_per_s(
    method: OurMethod | PeerMethod, requests: Requests, new_tokens: int
) -> float | None:
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


def timed(action: Callable[[], Result], device: torch.device) -> tuple[float, Result]:
    """Run something; return the seconds until the device was done, and its result."""
    synchronize(device)
    start = time.perf_counter()
    result = action()
    synchronize(device)
    return time.perf_counter() - start, result


@contextmanager
def step_times() -> Iterator[list[float]]:
    """Collect when each step of any of torch's optimisers ended in this context, in seconds."""
    times: list[float] = []
    handle = register_optimizer_step_post_hook(lambda *_: times.append(time.perf_counter()))
    try:
        yield times
    finally:
        handle.remove()


def with_peak(action: Callable[[], Result], device: torch.device) -> tuple[int | None, Result]:
    """Run something; return its peak of memory above what was in use before, and its result.

    Returns:
        On CUDA, bytes in torch's tensors: memory of the driver and of torch's cache is not counted.
        On a CPU, bytes of the process's resident set (`VmHWM`), Python's memory too; the C library
        keeps some freed memory, so only a process's first call counts everything. None where the
        system cannot reset the peak, that is, on systems other than Linux.
    """
    gc.collect()
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = action()
        return torch.cuda.max_memory_allocated(device) - before, result
    if not os.access(_CLEAR_REFS, os.W_OK):
        return None, action()
    _CLEAR_REFS.write_text("5", encoding="ascii")  # makes Linux reset the peak
    before = _peak_resident()
    result = action()
    return _peak_resident() - before, result


def _peak_resident() -> int:
    """Return Linux's peak of the resident set since its last reset, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:"))


def copy_bandwidth(device: torch.device, num_bytes: int | None = None) -> float:
    """Measure how many bytes per second a device copies, those read and those written together.

    The tensor has 1 GiB on CUDA and 256 MiB elsewhere, more than caches hold.
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
