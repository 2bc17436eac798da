"""The command line: `baft-easyedit COMMAND`; `baft-easyedit --help` lists the commands."""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

from baft_easyedit.hparams import BaFTHyperParams, read_hparams, scaled_layers
from baft_easyedit.messages import cut
from baft_easyedit.paths import expanded
from baft_easyedit.requests import as_requests
from baft_easyedit.resources import BUNDLED_MODEL, model_location

_DTYPES = ("float32", "float16", "bfloat16")
_SPEED_NUMBERS = {
    "--start": "first of the records; 0 if absent",
    "--prompt-length": "tokens of a prompt of random words; 32 if absent",
    "--answer-length": "tokens of its answer; 4 if absent",
    "--batch-size": "requests of an edit call; 1 if absent",
    "--rank": "bases per layer; 12 if absent",
    "--repeats": "measurements of each row; 5 if absent",
    "--new-tokens": "tokens generated per measurement; 32 if absent",
    "--threads": "CPU threads; torch's choice if absent",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status, 2 for bad input."""
    arguments = _parser().parse_args(argv)
    try:
        status = arguments.run(arguments)
    except (ValueError, TypeError, OSError, ImportError, ArithmeticError, RuntimeError) as error:
        print(f"baft-easyedit: {cut(error)}", file=sys.stderr)
        return 2
    return status or 0


def _parser() -> argparse.ArgumentParser:
    """Describe the commands."""
    parser = argparse.ArgumentParser(
        prog="baft-easyedit", description="BaFT, knowledge editing by basis-level fine-tuning."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    edit = commands.add_parser("edit", help="edit one fact and show the answers before and after")
    _add_model_options(edit)
    edit.add_argument("--prompt", required=True, help="text that the answer completes")
    edit.add_argument("--target", required=True, help="the new answer")
    edit.add_argument("--subject", help="what the fact is about, a part of the prompt")
    edit.add_argument(
        "--loc-prompt", action="append", default=[], help="irrelevant text to keep; may be repeated"
    )
    edit.add_argument(
        "--ask", action="append", default=[], help="another prompt to answer; may be repeated"
    )
    edit.add_argument("--dtype", choices=_DTYPES, default="float32", help="(%(default)s)")
    edit.add_argument(
        "--save",
        type=expanded,
        metavar="DIR",
        help="keep the edit in a directory, and go on with the one that is there",
    )
    edit.add_argument(
        "--from",
        dest="source",
        type=expanded,
        metavar="DIR",
        help="begin with a kept edit, unchanged",
    )
    edit.add_argument(
        "--overwrite",
        action="store_true",
        help="with --from and --save: replace a snapshot of another edit in that directory",
    )
    edit.set_defaults(run=_edit)

    history = commands.add_parser("history", help="list what a kept edit went through")
    history.add_argument("directory", type=expanded, metavar="DIR")
    history.add_argument("--json", action="store_true", help="the journal's lines, for machines")
    history.set_defaults(run=_history)

    demo = commands.add_parser(
        "demo", help="edits shown as text, then BaFT beside other methods through EasyEdit"
    )
    _add_model_options(demo)
    demo.add_argument("--methods", help="comma-separated list; all that the demo knows if absent")
    demo.add_argument("--cases", type=int, default=30, help="single edits per method (%(default)s)")
    demo.add_argument("--jobs", type=int, default=2, help="methods run at once (%(default)s)")
    demo.set_defaults(run=_demo)

    _add_bench(commands)

    report = commands.add_parser("report", help="tables and figures of benchmark runs")
    report.add_argument("runs", nargs="+", type=expanded, metavar="RUN_DIR")
    report.add_argument(
        "--out", type=expanded, help="directory; the first run's `report` if absent"
    )
    report.add_argument("--paper-model", help="show the paper's numbers of this model beside ours")
    report.set_defaults(run=_report)

    diagnose = commands.add_parser("diagnose", help="check a run's gates, balance and locality")
    diagnose.add_argument("run_dir", type=expanded, metavar="RUN_DIR")
    diagnose.add_argument("--out", type=expanded, help="directory; the run's `diagnosis` if absent")
    diagnose.set_defaults(run=_diagnose)

    _add_speed(commands)

    doctor = commands.add_parser("doctor", help="say which EasyEdit was found and what works")
    doctor.set_defaults(run=_doctor)
    return parser


def _add_bench(commands: Any) -> None:
    """Describe `bench`; its options replace values of the YAML."""
    bench = commands.add_parser(
        "bench", help="run a benchmark described by a YAML file, or go on with a stopped one"
    )
    bench.add_argument("config", help="a file, or a name such as bench/facts")
    bench.add_argument(
        "--model",
        help="Hugging Face name or directory; another one does not get the file's presets",
    )
    bench.add_argument("--preset", help="our settings for the model, such as llama-3-8b-instruct")
    bench.add_argument("--peer-preset", help="EasyEdit's settings for it, such as llama3-8b")
    bench.add_argument("--data", help="file or directory of the records")
    bench.add_argument("--methods", type=_names, help="comma-separated list")
    bench.add_argument("--T", type=_numbers, help="edits in a row, such as 1,10,100")
    bench.add_argument("--batch-size", type=_numbers, help="requests per edit, such as 1,10")
    bench.add_argument("--limit", type=int, help="number of records")
    bench.add_argument("--downstream", help="directory of PIQA, to ask after each run of edits")
    bench.add_argument(
        "--texts", help="file, a passage a line, for the key statistics of MEMIT and its kin"
    )
    bench.add_argument("--device", type=_device, help="CUDA device number, or a name")
    bench.add_argument(
        "--fp16", action=argparse.BooleanOptionalAction, help="load the model in half precision"
    )
    bench.add_argument("--jobs", type=int, help="methods run at once by each process")
    bench.add_argument("--report-to", help="tensorboard or wandb")
    bench.add_argument("--out", type=expanded, help="the run's directory; runs/NAME if absent")
    bench.set_defaults(run=_bench)


def _add_speed(commands: Any) -> None:
    """Describe `speed`."""
    speed = commands.add_parser("speed", help="measure time, memory and generation of an edit")
    source = speed.add_mutually_exclusive_group()
    source.add_argument("--model", help="Hugging Face name or directory, or bundled")
    source.add_argument(
        "--shape", help="random weights: llama-2-7b, llama-3-8b, gemma-7b, llama-LAYERSxWIDTH"
    )
    speed.add_argument("--methods", type=_names, help="comma-separated list; BaFT,ReFT if absent")
    for name, help_text in _SPEED_NUMBERS.items():
        speed.add_argument(name, type=int, help=help_text)
    speed.add_argument("--data", help="records to edit, such as zsre=DIR; random words if absent")
    stop = speed.add_mutually_exclusive_group()
    stop.add_argument("--steps", type=int, help="steps of BaFT and ReFT; 40 if absent")
    stop.add_argument("--early-stop", action="store_true", help="stop once an answer is learned")
    speed.add_argument("--dtype", choices=_DTYPES, help="float32 if absent")
    speed.add_argument("--device", type=_device, help="CUDA device number, or a name")
    speed.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="SETTING=VALUES",
        help="prompt-length=16,32 or rank=, layers=, batch=; may be repeated",
    )
    speed.add_argument(
        "--weights-dir", type=expanded, help="for random weights that EasyEdit loads"
    )
    speed.add_argument(
        "--one-by-one", action="store_true", help="one model in memory at a time, not in turn"
    )
    speed.add_argument(
        "--profile", action="store_true", help="also write where the time of an edit goes"
    )
    speed.add_argument("--out", type=expanded, help="JSON file, with charts beside it")
    speed.set_defaults(run=_speed)


def _names(text: str) -> list[str]:
    """Read a comma-separated list."""
    return [name.strip() for name in text.split(",") if name.strip()]


def _numbers(text: str) -> list[int]:
    """Read a comma-separated list of whole numbers."""
    return [int(number) for number in _names(text)]


def _device(text: str) -> int | str:
    """Read a CUDA device number or a device name."""
    return int(text) if text.isdigit() else text


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose a model and its hyper-parameters."""
    parser.add_argument(
        "--model", default=BUNDLED_MODEL, help="Hugging Face name or directory (%(default)s)"
    )
    parser.add_argument("--hparams", help="YAML file; scaled to the model's depth if absent")
    parser.add_argument(
        "--device",
        type=_device,
        help="CUDA device number, or a name; the first CUDA device, or the CPU, if absent",
    )


def _hparams(arguments: argparse.Namespace) -> BaFTHyperParams:
    """Read or make the hyper-parameters that the options ask for."""
    import torch

    device = arguments.device
    if device is None:
        device = 0 if torch.cuda.is_available() else "cpu"
    if arguments.hparams:
        hparams = read_hparams(arguments.hparams)
        if arguments.model == BUNDLED_MODEL:
            arguments.model = hparams.model_name
    elif arguments.model == BUNDLED_MODEL:
        hparams = BaFTHyperParams.from_hparams("BaFT/facts-llama")
    else:
        hparams = BaFTHyperParams(arguments.model, scaled_layers(_depth(arguments.model)))
    return replace(hparams, model_name=arguments.model, device=device)


def _depth(model: str) -> int:
    """Return how many decoder layers a model has, without loading it."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model_location(model))
    return int(config.get_text_config().num_hidden_layers)


def _edit(arguments: argparse.Namespace) -> None:
    """Edit one fact; print the answers before and after."""
    request: dict[str, Any] = {
        "prompt": arguments.prompt,
        "target_new": arguments.target,
        "subject": arguments.subject,
        "loc_prompt": arguments.loc_prompt,
    }
    as_requests(request)
    if _is_copied(arguments):
        from baft_easyedit.keeping.directory import check_target

        check_target(arguments.save, arguments.source, arguments.overwrite)
    elif arguments.overwrite:
        raise ValueError("overwrite needs --from and another directory as --save")
    hparams = _hparams(arguments)

    import torch

    from baft_easyedit.generation import generate_answers, load_model
    from baft_easyedit.prompt_format import PromptFormat

    _silence_loading()
    model, tokenizer = load_model(arguments.model, hparams.device, getattr(torch, arguments.dtype))
    prompts = [arguments.prompt, *arguments.ask]
    with _editor(arguments, model, tokenizer, hparams) as editor:
        form = PromptFormat.of(editor.hparams)
        before = generate_answers(model, tokenizer, prompts, prompt_format=form)
        report = editor.edit(request)
        after = generate_answers(model, tokenizer, prompts, prompt_format=form)
        if arguments.save is not None:
            editor.save(arguments.save, arguments.overwrite)
    for prompt, old, new in zip(prompts, before, after, strict=True):
        print(f"{prompt}\n  before: {old}\n  after:  {new}")
    stop = "stopped early" if report.stopped_early else "all steps"
    print(
        f"{editor.hparams.alg_name}: {report.num_steps} steps ({stop}), {report.time_s:.2f} s, "
        f"answer loss {report.losses[0].answer:.3f} -> {report.final_loss:.3f}, "
        f"{editor.model_edit.num_parameters:,} parameters"
    )
    for warning in report.gates.warnings() if report.gates is not None else ():
        print(f"warning: {warning}")


def _is_copied(arguments: argparse.Namespace) -> bool:
    """Tell whether one kept edit is begun with, and another directory written."""
    return None not in (arguments.source, arguments.save) and arguments.source != arguments.save


def _editor(
    arguments: argparse.Namespace, model: Any, tokenizer: Any, hparams: BaFTHyperParams
) -> Any:
    """Make the editor that `--save` and `--from` ask for; a kept edit brings its own settings."""
    from baft_easyedit.editor import BaFTEditor
    from baft_easyedit.keeping.directory import holds_edit

    if arguments.source not in (None, arguments.save):
        return BaFTEditor.load(model, tokenizer, arguments.source)
    if arguments.save is None:
        return BaFTEditor(model, tokenizer, hparams)
    is_new = not holds_edit(arguments.save)
    given = hparams if is_new or arguments.hparams else None
    return BaFTEditor.open(model, tokenizer, arguments.save, given)


def _history(arguments: argparse.Namespace) -> None:
    """Print the journal of a kept edit."""
    from baft_easyedit.keeping.directory import read_history

    for entry in read_history(arguments.directory):
        print(entry.line if arguments.json else entry.summary())


def _silence_loading() -> None:
    """Keep transformers' progress bars out of what the command prints."""
    import_module("transformers.utils.logging").disable_progress_bar()


def _demo(arguments: argparse.Namespace) -> None:
    """Show a few edits, then the tables."""
    from baft_easyedit.demo import check_methods, compare, show_edits
    from baft_easyedit.easyedit import find_host

    methods = check_methods(_names(arguments.methods or ""))
    _silence_loading()
    hparams, host = _hparams(arguments), find_host()
    for line in show_edits(hparams):
        print(line)
    print(f"\nThrough EasyEdit ({host.generation}, {host.version}) and its own evaluators:")
    with _Bar() as bar:
        for line in compare(hparams, methods, arguments.cases, arguments.jobs, bar.start):
            bar.close()
            print(line)


class _Bar:
    """A progress bar over edits, or other units."""

    def __init__(self, unit: str = "edit") -> None:
        self._unit = unit
        self._bar: Any = None

    def __enter__(self) -> "_Bar":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def start(self, total: int, done: int) -> Callable[[int], None]:
        """Show the bar; return what moves it."""
        from tqdm import tqdm

        self._bar = tqdm(total=total, initial=done, unit=self._unit, leave=False)
        return self._bar.update

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()


def _bench(arguments: argparse.Namespace) -> None:
    """Run a benchmark and print its tables."""
    from baft_easyedit.bench.config import read_config
    from baft_easyedit.bench.runner import run_bench
    from baft_easyedit.demo import table

    names = ("model", "preset", "peer_preset", "methods", "T", "batch_size", "texts", "device")
    given = {name: getattr(arguments, name) for name in (*names, "fp16", "jobs", "report_to")}
    if arguments.downstream is not None:
        given["downstream"] = {"path": arguments.downstream}
    data = {"path": arguments.data, "limit": arguments.limit}
    overrides: dict[str, Any] = {k: v for k, v in given.items() if v is not None}
    overrides["data"] = {k: v for k, v in data.items() if v is not None}
    config = read_config(arguments.config, overrides)
    out = arguments.out or Path("runs") / Path(arguments.config).stem
    _silence_loading()
    with _Bar() as bar:
        rows = run_bench(config, out, bar.start)
    if not rows:  # another process tells
        return
    for T in config.T:
        for size in config.batch_size:
            chosen = [row for row in rows if (row["T"], row["batch_size"]) == (T, size)]
            print(f"\n{chosen[0]['protocol']}, T = {T}, batch size {size}, n = {chosen[0]['n']}")
            for line in table(chosen):
                print(line)
    print(f"\n{out}/summary.json; for more: baft-easyedit report {out}")


def _speed(arguments: argparse.Namespace) -> None:
    """Measure what an edit costs; print the table."""
    import torch

    from baft_easyedit.speed import SpeedOptions, Sweep, run_speed

    given = {k: v for k, v in vars(arguments).items() if k not in ("run", "sweep")}
    options: dict[str, Any] = {k: v for k, v in given.items() if v is not None}
    options.setdefault("device", 0 if torch.cuda.is_available() else "cpu")
    options["methods"] = tuple(options.get("methods", ("BaFT", "ReFT")))
    options["sweeps"] = tuple(Sweep.parse(text) for text in arguments.sweep)
    _silence_loading()
    with _Bar("row") as bar:
        report = run_speed(SpeedOptions(**options), bar.start)
    for line in report.lines():
        print(line)
    for file in report.files:
        print(file)


def _report(arguments: argparse.Namespace) -> None:
    """Write tables and figures; print where they are."""
    from baft_easyedit.bench.report import write_report

    out = arguments.out or arguments.runs[0] / "report"
    for file in write_report(arguments.runs, out, paper_model=arguments.paper_model):
        print(file)


def _diagnose(arguments: argparse.Namespace) -> None:
    """Write and print a diagnosis."""
    from baft_easyedit.bench.diagnosis import write_diagnosis
    from baft_easyedit.bench.diagnostics import diagnose

    diagnosis = diagnose(arguments.run_dir)
    print(diagnosis.to_markdown())
    for file in write_diagnosis(diagnosis, arguments.out or arguments.run_dir / "diagnosis"):
        print(file)


def _doctor(_arguments: argparse.Namespace) -> int:
    """Print what `doctor` finds; the status is 1 if EasyEdit cannot be used."""
    from baft_easyedit.easyedit.doctor import doctor

    report = doctor()
    print(report)
    return 0 if report.is_usable else 1
