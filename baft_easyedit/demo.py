"""The demo behind `baft-easyedit demo`.

It edits SmolLM2, a real model, and the bundled model, and shows the edits as text; then it runs the
benchmark `bench/demo` on the bundled model.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from baft_easyedit.bench.config import BenchConfig, read_config
from baft_easyedit.bench.layouts import summary_table
from baft_easyedit.bench.methods import check_methods
from baft_easyedit.bench.run import StartProgress, run_bench
from baft_easyedit.bench.tables import to_markdown
from baft_easyedit.editor import BaFTEditor
from baft_easyedit.facts import edit_requests
from baft_easyedit.files.resources import REAL_MODEL
from baft_easyedit.generation import generate_answers, load_model
from baft_easyedit.gguf.smollm2 import ready_location
from baft_easyedit.hparams import BaFTHyperParams
from baft_easyedit.model.prompt_format import PromptFormat

_SUBJECTS = ("India", "Zambia", "Xiaomi")
"""Of each, the first record of what SmolLM2 knows that can be rephrased as a question is edited."""
_NUM_SHOWN = 3
NUM_IN_A_ROW = 10
"""Number of successive edits in the second table (fewer if there are fewer cases)."""


def real_settings(device: int | str) -> BaFTHyperParams:
    """Convert SmolLM2 if that was not done before, and return its hyper-parameters.

    Raises:
        ImportError: If the model's package is not installed.
        ValueError: If the package holds another file than that of the known release.
        OSError: If the model cannot be written.
    """
    ready_location(REAL_MODEL)
    return BaFTHyperParams.from_hparams(
        "BaFT/smollm2", device=device, learn_end=True, use_chat_template=True
    )


def show_real_edits(hparams: BaFTHyperParams) -> Iterator[str]:
    """Edit facts that SmolLM2 knows, undo each edit, and yield lines with the answers."""
    editor = BaFTEditor(*load_model(hparams.model_name, hparams.device), hparams)
    yield "SmolLM2-135M-Instruct, in its chat template"
    questions = [r for r in edit_requests("known") if r["rephrase_prompt"].endswith("?")]
    for subject in _SUBJECTS:
        request = next(r for r in questions if r["subject"] == subject)
        asked = {
            "edited": request["prompt"],
            "rephrased": request["rephrase_prompt"],
            "neighbour": request["locality"]["neighborhood"]["prompt"],
        }
        yield from _show_edit(editor, request, asked)


def show_edits(device: int | str) -> Iterator[str]:
    """Edit a few facts of the bundled model, undo each edit, and yield lines with the answers.

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
        yield from _show_edit(editor, request, asked)


def _show_edit(
    editor: BaFTEditor, request: Mapping[str, Any], asked: Mapping[str, str]
) -> Iterator[str]:
    """Make an edit, undo it, and yield lines with the answers before and after.

    `asked` are prompts by what they show.
    """

    def answers() -> list[str]:
        model, tokenizer = editor.model, editor.tokenizer
        form = PromptFormat.of(editor.hparams)
        return [
            generate_answers(model, tokenizer, [prompt], prompt_format=form)[0]
            for prompt in asked.values()
        ]

    before, report, after = answers(), editor.edit(request), answers()
    size = f"{editor.model_edit.num_parameters:,} parameters"
    editor.undo()
    cost = f"{size}, {report.num_steps} steps, {report.time_s:.1f} s"
    yield f"\n{request['prompt']} -> {request['target_new']}   ({cost})"
    for (kind, prompt), old, new in zip(asked.items(), before, after, strict=True):
        change = f"{old} -> {new}" if old != new else f"{old} (as before)"
        yield f"  {kind:10} {prompt} ... {' '.join(change.split())}"


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
        title = title if T > 1 else "single edits"
        yield "\n" + to_markdown(summary_table(title, [row for row in rows if row["T"] == T]))
