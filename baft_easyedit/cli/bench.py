"""`bench`, `report` and `diagnose`: benchmark runs, and what to read off them."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from baft_easyedit.cli.console import Bar, silence_loading, status_of
from baft_easyedit.cli.model import usable_device
from baft_easyedit.cli.options import (
    counts,
    device,
    existing,
    existing_directory,
    existing_file,
    names,
    new_directory,
    whole,
)

_SETTINGS = (
    *("model", "preset", "peer_preset", "methods", "T", "batch_size", "texts", "device", "fp16"),
    *("jobs", "report_to"),
)
"""Options that have the name of a setting."""


def add_commands(commands: Any) -> None:
    """Describe the commands."""
    _add_bench(commands)

    report = commands.add_parser("report", help="tables and figures of benchmark runs")
    report.add_argument("runs", nargs="+", type=existing_directory, metavar="RUN_DIR")
    report.add_argument(
        "--out", type=new_directory, help="directory; the first run's `report` if absent"
    )
    report.add_argument("--paper-model", help="show the paper's numbers of this model beside ours")
    report.set_defaults(run=_report)

    diagnose = commands.add_parser("diagnose", help="check a run's gates, balance and locality")
    diagnose.add_argument("run_dir", type=existing_directory, metavar="RUN_DIR")
    diagnose.add_argument(
        "--out", type=new_directory, help="directory; the run's `diagnosis` if absent"
    )
    diagnose.set_defaults(run=_diagnose)


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
    bench.add_argument("--data", type=existing, help="file or directory of the records")
    bench.add_argument("--methods", type=names, help="comma-separated list")
    bench.add_argument("--T", type=counts, help="edits in a row, such as 1,10,100")
    bench.add_argument("--batch-size", type=counts, help="requests per edit, such as 1,10")
    bench.add_argument("--limit", type=whole(1), help="number of records")
    bench.add_argument(
        "--downstream",
        type=existing_directory,
        help="directory of PIQA, to ask after each run of edits",
    )
    bench.add_argument(
        "--texts",
        type=existing_file,
        help="file, a passage a line, for the key statistics of MEMIT and its kin",
    )
    bench.add_argument("--device", type=device, help="CUDA device number, or a name")
    bench.add_argument(
        "--fp16", action=argparse.BooleanOptionalAction, help="load the model in half precision"
    )
    bench.add_argument("--jobs", type=whole(1), help="methods run at once by each process")
    bench.add_argument(
        "--report-to", choices=("none", "tensorboard", "wandb"), help="where numbers go as well"
    )
    bench.add_argument("--out", type=new_directory, help="the run's directory; runs/NAME if absent")
    bench.set_defaults(run=_bench)


def _bench(arguments: argparse.Namespace) -> int:
    """Run a benchmark and print its tables."""
    from baft_easyedit.bench.config import read_config
    from baft_easyedit.bench.run import run_bench

    config = read_config(arguments.config, _overrides(arguments))
    if arguments.device is None:
        usable = usable_device(config.device, arguments.config)
        config = config.model_copy(update={"device": usable})
    out = arguments.out or Path("runs") / Path(arguments.config).stem
    silence_loading()
    with Bar() as bar:
        try:
            rows = run_bench(config, out, bar.start)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"{bar.position}; what was finished is kept in {out}, and the same command goes on "
                "from there"
            ) from None
    if not rows:  # another process tells
        return 0
    _print_tables(config, rows)
    print(f"\n{out}/summary.json; for more: baft-easyedit report {out}")
    return status_of(rows)


def _overrides(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the settings that the options replace."""
    given = {name: getattr(arguments, name) for name in _SETTINGS}
    if arguments.downstream is not None:
        given["downstream"] = {"path": str(arguments.downstream)}
    data = {"path": arguments.data, "limit": arguments.limit}
    overrides: dict[str, Any] = {k: v for k, v in given.items() if v is not None}
    overrides["data"] = {k: v for k, v in data.items() if v is not None}
    return overrides


def _print_tables(config: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """Show a table for each protocol that was asked for."""
    from baft_easyedit.demo.bundled import table

    for T in config.T:
        for size in config.batch_size:
            chosen = [row for row in rows if (row["T"], row["batch_size"]) == (T, size)]
            print(f"\n{chosen[0]['protocol']}, T = {T}, batch size {size}, n = {chosen[0]['n']}")
            for line in table(chosen):
                print(line)


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
