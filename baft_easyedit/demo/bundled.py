"""The demo's second part: edits of the bundled facts, then the benchmark `bench/demo`."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from baft_easyedit.bench.config import BenchConfig, read_config
from baft_easyedit.bench.layouts import summary_table
from baft_easyedit.bench.methods import check_methods
from baft_easyedit.bench.run import StartProgress, run_bench
from baft_easyedit.bench.tables import to_markdown
from baft_easyedit.demo import show_edit
from baft_easyedit.editor import BaFTEditor
from baft_easyedit.facts import edit_requests
from baft_easyedit.generation import load_model
from baft_easyedit.hparams import BaFTHyperParams

NUM_IN_A_ROW = 10
"""Number of successive edits in the demo's second table (fewer if there are fewer cases)."""
_NUM_SHOWN = 3


def show_edits(device: int | str) -> Iterator[str]:
    """Edit a few facts, undo each edit, and yield lines with the answers before and after.

    These answers are generated, so their end is learned, which the tables leave off as the paper.
    """
    hparams = BaFTHyperParams.from_hparams("BaFT/facts-llama", device=device, learn_end=True)
    editor = BaFTEditor(*load_model(hparams.model_name, device), hparams)
    with_two_hops = [r for r in edit_requests("eval") if r["portability"]]
    for request in with_two_hops[:_NUM_SHOWN]:
        asked = {
            "edited": request["prompt"],
            "rephrased": request["rephrase_prompt"],
            "two-hop": request["portability"]["two_hop"]["prompt"],
            "neighbour": request["locality"]["neighborhood"]["prompt"],
        }
        yield from show_edit(editor, request, {k: (prompt, None) for k, prompt in asked.items()})


def demo_config(
    methods: Sequence[str], num_cases: int, num_jobs: int, device: int | str
) -> BenchConfig:
    """Return the benchmark of the demo's tables, with the methods of its file if none are given.

    Raises:
        ValueError: If a number is below 1, or there is no such method.
    """
    in_a_row = dict.fromkeys((1, min(NUM_IN_A_ROW, num_cases)))
    changes = {"data": {"limit": num_cases}, "T": [*in_a_row], "jobs": num_jobs, "device": device}
    config = read_config("bench/demo", {**changes, **({"methods": methods} if methods else {})})
    check_methods(config)
    return config


def compare(
    config: BenchConfig, start_progress: StartProgress | None = None
) -> list[dict[str, Any]]:
    """Run the demo's benchmark in a temporary directory; return the rows of its summary."""
    with TemporaryDirectory(prefix="easyedit-") as directory:
        return run_bench(config, Path(directory), start_progress)


def tables(config: BenchConfig, rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield a table for single edits, and one for successive edits, of what `compare` returned."""
    for T in config.T:
        title = f"the same, {T} edits in a row, scored after the last"
        title = title if T > 1 else f"{config.data.limit} single edits"
        yield "\n" + to_markdown(summary_table(title, [row for row in rows if row["T"] == T]))
