"""The demo's second part: edits of the bundled facts, then a small benchmark through EasyEdit."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from baft_easyedit.bench.config import REHEARSED, BenchConfig, DataConfig, MethodConfig
from baft_easyedit.bench.layouts import summary_table
from baft_easyedit.bench.run import StartProgress, run_bench
from baft_easyedit.bench.tables import to_markdown
from baft_easyedit.demo import show_edit
from baft_easyedit.easyedit.peers import why_not
from baft_easyedit.editor import BaFTEditor
from baft_easyedit.facts import edit_requests
from baft_easyedit.files.resources import BUNDLED_MODEL, model_location
from baft_easyedit.generation import load_model, with_usable_end
from baft_easyedit.hparams import BaFTHyperParams

DEMO_METHODS = ("BaFT", "ReFT", "FT-L", "FT-M", "ROME", "LoRA", "AdaLoRA", "MEMIT", "WISE")
NUM_IN_A_ROW = 10
"""Number of successive edits in the demo's second table (fewer if there are fewer cases)."""
_NUM_SHOWN = 3
_PRESET = "facts-llama"
"""Name of the bundled model's preset."""
_LOADING = ("device", "fp16", "bf16", "model_parallel")
_DECIDED = ("model_name", "alg_name", "api_key", "batch_size", "rehearsal", *_LOADING)
"""Hyper-parameters that a benchmark decides, so that a row's `set` leaves them out."""


def check_methods(names: Sequence[str]) -> tuple[str, ...]:
    """Return the given method names, or the demo's methods if none are given.

    Raises:
        ValueError: If a name is unknown.
    """
    for name in names:
        why_not(name, "current")  # raises if there is no such method
    return tuple(names) or DEMO_METHODS


def show_edits(hparams: BaFTHyperParams) -> Iterator[str]:
    """Edit a few facts, undo each edit, and yield lines with the answers before and after.

    Args:
        hparams: Hyper-parameters; `model_name` and `device` say which model is edited and where.
    """
    dtype = getattr(torch, hparams.dtype)
    model, tokenizer = load_model(hparams.model_name, hparams.device, dtype)
    editor = BaFTEditor(model, tokenizer, with_usable_end(hparams, tokenizer))
    with_two_hops = [r for r in edit_requests("eval") if r["portability"]]
    for request in with_two_hops[:_NUM_SHOWN]:
        asked = {
            "edited": request["prompt"],
            "rephrased": request["rephrase_prompt"],
            "two-hop": request["portability"]["two_hop"]["prompt"],
            "neighbour": request["locality"]["neighborhood"]["prompt"],
        }
        yield from show_edit(editor, request, {k: (prompt, None) for k, prompt in asked.items()})


def compare(
    hparams: BaFTHyperParams,
    methods: Sequence[str],
    num_cases: int,
    num_jobs: int,
    start_progress: StartProgress | None = None,
) -> list[dict[str, Any]]:
    """Run methods through EasyEdit: with single edits, and with successive edits.

    Args:
        hparams: Hyper-parameters of BaFT or ReFT, with model and device.
        methods: BaFT, ReFT, or methods of EasyEdit.
        num_cases: Facts of the eval split to edit, at least 1.
        num_jobs: Methods run at once, each in a process with one thread, at least 1.
        start_progress: Starts a progress bar; None for no bar.

    Returns:
        The rows of the benchmark's summary, for `tables`.

    Raises:
        ValueError: If a number is below 1.
    """
    for name, value in (("cases", num_cases), ("jobs", num_jobs)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1; got {value}")
    config = _config(hparams, methods, num_cases, tuple(_titles(num_cases)), num_jobs)
    with TemporaryDirectory(prefix="easyedit-") as directory:
        return run_bench(config, Path(directory), start_progress)


def tables(rows: Sequence[Mapping[str, Any]], num_cases: int) -> Iterator[str]:
    """Yield a table for single edits, and one for successive edits.

    Args:
        rows: The result of `compare`.
        num_cases: The number that `compare` was given.
    """
    for T, title in _titles(num_cases).items():
        yield "\n" + to_markdown(summary_table(title, [row for row in rows if row["T"] == T]))


def _titles(num_cases: int) -> dict[int, str]:
    """Return the titles of the tables by T, the number of successive edits."""
    in_a_row = min(NUM_IN_A_ROW, num_cases)
    titles = {1: f"{num_cases} single edits"}
    if in_a_row > 1:
        titles[in_a_row] = f"the same, {in_a_row} edits in a row, scored after the last"
    return titles


def _config(
    hparams: BaFTHyperParams, methods: Sequence[str], num_cases: int, T: tuple[int, ...], jobs: int
) -> BenchConfig:
    """Make the configuration of the demo's benchmark."""
    return BenchConfig(
        model=hparams.model_name,
        data=DataConfig(kind="facts", limit=num_cases),
        methods=tuple(_row(method, hparams) for method in methods),
        T=T,
        preset=_PRESET if hparams.model_name == model_location(BUNDLED_MODEL) else None,
        generation=False,
        immediate=False,
        basis=False,
        device=hparams.device,
        fp16=hparams.fp16,
        bf16=hparams.bf16,
        model_parallel=hparams.model_parallel,
        jobs=jobs,
    )


def is_bundled(hparams: BaFTHyperParams) -> bool:
    """Tell whether hyper-parameters are the bundled preset, which has a variant per protocol."""
    loading = {name: getattr(hparams, name) for name in _LOADING}
    return hparams == type(hparams).from_hparams(f"{hparams.algorithm}/{_PRESET}", **loading)


def _row(method: str, hparams: BaFTHyperParams) -> MethodConfig:
    """Make a benchmark row; only the method that `hparams` are of gets their values."""
    if method != hparams.alg_name or is_bundled(hparams):
        return MethodConfig(name=method, method=method)
    values = {name: value for name, value in asdict(hparams).items() if name not in _DECIDED}
    if not hparams.rehearsal:
        return MethodConfig(name=method, method=method, set=values)
    name = f"{method}{REHEARSED}"
    return MethodConfig(name=name, method=method, set=values, rehearsal=hparams.rehearsal)
