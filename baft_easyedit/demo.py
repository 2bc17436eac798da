"""The demo: a few edits shown as text, then BaFT beside EasyEdit's methods on the bundled facts."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

from tqdm import tqdm

from baft_easyedit.easyedit import find_host
from baft_easyedit.easyedit.peers import PEERS, is_available, not_available
from baft_easyedit.easyedit.records import RunResult
from baft_easyedit.easyedit.runner import run_methods
from baft_easyedit.editor import BaFTEditor
from baft_easyedit.facts import edit_requests, questions
from baft_easyedit.generation import generate_answers, load_model
from baft_easyedit.hparams import BaFTHyperParams

DEMO_METHODS = ("BaFT", "ReFT", "FT-L", "FT-M", "ROME", "LoRA", "MEMIT", "WISE")
METHODS = ("BaFT", "ReFT", *PEERS)
NUM_IN_A_ROW = 10
"""T of the demo's continual protocol."""
_NUM_SHOWN = 3
_NUM_STATISTICS_TEXTS = 500


def check_methods(names: Sequence[str]) -> tuple[str, ...]:
    """Return method names as they are, or the demo's own if there are none.

    Raises:
        ValueError: If a name is unknown.
    """
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        raise ValueError(f"methods must be among {', '.join(METHODS)}; got {unknown[0]!r}")
    return tuple(names) or DEMO_METHODS


def show_edits(hparams: BaFTHyperParams) -> Iterator[str]:
    """Edit a few facts one after another, each undone, and yield the answers before and after.

    Args:
        hparams: Hyper-parameters; their `model_name` and `device` say what is edited and where.
    """
    model, tokenizer = load_model(hparams.model_name, hparams.device)
    editor = BaFTEditor(model, tokenizer, hparams)
    with_two_hops = [r for r in edit_requests("eval") if r["portability"]]
    for request in with_two_hops[:_NUM_SHOWN]:
        asked = {
            "edited": request["prompt"],
            "rephrased": request["rephrase_prompt"],
            "two-hop": request["portability"]["two_hop"]["prompt"],
            "neighbour": request["locality"]["neighborhood"]["prompt"],
        }
        before = generate_answers(model, tokenizer, list(asked.values()))
        report = editor.edit(request)
        after = generate_answers(model, tokenizer, list(asked.values()))
        editor.undo()
        target = request["target_new"]
        yield f"\n{request['subject']}: {request['ground_truth']} -> {target}   " + (
            f"({report.num_steps} steps, {report.time_s:.2f} s)"
        )
        for kind, prompt, old, new in zip(asked, asked.values(), before, after, strict=True):
            change = f"{old} -> {new}" if old != new else f"{old} (as before)"
            yield f"  {kind:10} {prompt} ... {change}"


def compare(
    hparams: BaFTHyperParams, methods: Sequence[str], num_cases: int, num_jobs: int
) -> Iterator[str]:
    """Run methods through EasyEdit and yield two tables: single edits, and edits in a row.

    Args:
        hparams: Hyper-parameters of BaFT or ReFT, with model and device.
        methods: Names of `METHODS`.
        num_cases: Facts of the eval split to edit singly, at least 1; a third of them, in runs of
            `NUM_IN_A_ROW`, are edited in a row.
        num_jobs: Methods run at once, each in a process with one thread, at least 1.

    Raises:
        ValueError: If a number is below 1.
    """
    for name, value in (("cases", num_cases), ("jobs", num_jobs)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1; got {value}")
    requests = edit_requests("eval", num_cases)
    num_runs = max(1, num_cases // 3 // NUM_IN_A_ROW)
    in_a_row = requests[: num_runs * NUM_IN_A_ROW]
    protocols = {
        f"{num_cases} single edits": (None, requests),
        f"{NUM_IN_A_ROW} edits in a row, scored after the last": (NUM_IN_A_ROW, in_a_row),
    }
    num_edits = len(methods) * (len(requests) + len(in_a_row))
    with (
        tqdm(total=num_edits, unit="edit", leave=False) as bar,
        ThreadPoolExecutor(num_jobs) as pool,
    ):
        # The slow ones first, so that no process waits at the end.
        rows = {
            (title, method): pool.submit(_run, method, T, cases, hparams, bar)
            for method in sorted(methods, key=_is_quick)
            for title, (T, cases) in protocols.items()
        }
        results = {key: row.result() for key, row in rows.items()}
    for title in protocols:
        yield "\n" + title
        yield from table([results[title, method] for method in methods])


def _is_quick(method: str) -> bool:
    """Tell whether a method needs no more than a moment for an edit."""
    return method not in ("WISE", "ROME", "LoRA", "MEMIT", "AlphaEdit")


def _run(
    method: str,
    T: int | None,
    requests: Sequence[Mapping[str, Any]],
    hparams: BaFTHyperParams,
    bar: "tqdm[Any]",
) -> RunResult:
    """Run one method under one protocol in its own process, and move the progress bar."""
    if not is_available(method, find_host().generation):
        bar.update(len(requests))
        protocol = "single" if T is None else f"continual-{T}"
        return RunResult(method, protocol, error=not_available(method))
    seen = 0

    def progress(_method: str, done: int, _total: int, _case: Mapping[str, Any]) -> None:
        nonlocal seen
        bar.update(done - seen)
        seen = done

    (result,) = run_methods(
        [method],
        hparams.model_name,
        requests,
        T=T,
        device=hparams.device,
        texts=_texts() if method in PEERS else (),
        progress=progress,
        **_settings(hparams, T),
    )
    bar.update(len(requests) - seen)
    return result


def _settings(hparams: BaFTHyperParams, T: int | None) -> dict[str, Any]:
    """Return what `run_methods` is told of our methods' hyper-parameters.

    The bundled model has settings of its own for each protocol; whatever else is given is kept.
    """
    bundled = BaFTHyperParams.from_hparams("BaFT/facts-llama", device=hparams.device)
    if hparams == bundled:
        return {"presets": bundled_presets(T)}
    decided = ("model_name", "device", "alg_name")
    values = {name: value for name, value in asdict(hparams).items() if name not in decided}
    return {"hparams": {hparams.alg_name: values}}


def bundled_presets(T: int | None) -> dict[str, str]:
    """Return the bundled model's hyper-parameter files for single edits, or for T in a row."""
    baft = "BaFT/facts-llama" if T is None else "BaFT/facts-llama-continual"
    return {"BaFT": baft, "ReFT": "ReFT/facts-llama"}


def _texts() -> list[str]:
    """Return facts as sentences, for the key statistics of MEMIT and AlphaEdit."""
    asked = questions("trained")
    every = max(1, len(asked) // _NUM_STATISTICS_TEXTS)
    return [f"{question.prompt} {question.answer}" for question in asked[::every]]


def table(results: Sequence[RunResult]) -> Iterator[str]:
    """Yield the lines of a Markdown table; a method that did not run says why."""
    yield "| method | Rel | Gen | Loc | Por | s/edit | parameters |"
    yield "|--------|-----|-----|-----|-----|--------|------------|"
    for result in results:
        if result.error is not None:
            yield f"| {result.method:6} | not run: {_first_line(result.error)} |"
            continue
        scores = (
            result.rewrite_acc,
            result.rephrase_acc,
            result.locality_acc,
            result.portability_acc,
        )
        cells = ["  - " if score is None else f"{score:.2f}" for score in scores]
        count = result.trainable_parameters
        cells.append("     -" if result.edit_time_s is None else f"{result.edit_time_s:6.2f}")
        cells.append("         -" if count is None else f"{count:10,}")
        yield f"| {result.method:6} | {' | '.join(cells)} |"


def _first_line(text: str) -> str:
    """Return the first line of an error, cut to a table's width."""
    line = text.strip().splitlines()[0] if text.strip() else "no reason given"
    return line if len(line) <= 100 else line[:97] + "..."
