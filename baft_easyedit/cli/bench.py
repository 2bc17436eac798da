"""The commands `bench`, `report` and `diagnose`: run benchmarks, and evaluate the runs."""

import argparse
from pathlib import Path
from typing import Any

from baft_easyedit.cli.console import Bar, silence_loading, status_of
from baft_easyedit.cli.model import usable_device
from baft_easyedit.cli.options import counts, device, existing, names, new, whole

_SETTINGS = (
    *("model", "preset", "peer_preset", "methods", "T", "batch_size", "texts", "device", "fp16"),
    *("bf16", "jobs"),
)
"""Options with the same name as the setting of the benchmark that they replace."""


def add_commands(commands: Any) -> None:
    """Add the commands; the options of `bench` replace values of its YAML file."""
    bench = commands.add_parser(
        "bench", help="run a benchmark described by a YAML file, or go on with a stopped one"
    )
    add = bench.add_argument
    add("config", help="a file, or a name such as bench/facts")
    add("--model", help="Hugging Face name or directory; others do not get the file's presets")
    add("--preset", help="our settings for the model, such as llama-3-8b-instruct")
    add("--peer-preset", help="EasyEdit's settings for it, such as llama3-8b")
    add("--data", type=existing(), help="file or directory of the records")
    add("--methods", type=names, help="comma-separated list")
    add("--T", type=counts, help="edits in a row, such as 1,10,100")
    add("--batch-size", type=counts, help="requests per edit, such as 1,10")
    add("--limit", type=whole(1), help="number of records")
    further = "directory of further task files, for the downstream task"
    add("--include-path", type=existing("directory"), help=further)
    add("--texts", type=existing("file"), help="a passage a line, for MEMIT's key statistics")
    add("--device", type=device, help="CUDA device number, or a name")
    half = "load the model in half precision"
    add("--fp16", action=argparse.BooleanOptionalAction, help=half)
    add("--bf16", action=argparse.BooleanOptionalAction, help="the same in bfloat16")
    add("--jobs", type=whole(1), help="methods run at once by each process")
    add("--out", type=new("directory"), help="the run's directory; runs/NAME if absent")
    bench.set_defaults(run=_bench)

    report = commands.add_parser("report", help="tables and figures of benchmark runs")
    add = report.add_argument
    add("runs", nargs="+", type=existing("directory"), metavar="RUN_DIR")
    add("--out", type=new("directory"), help="directory; the first run's `report` if absent")
    report.set_defaults(run=_report)

    diagnose = commands.add_parser("diagnose", help="check a run's gates, balance and locality")
    add = diagnose.add_argument
    add("run_dir", type=existing("directory"), metavar="RUN_DIR")
    add("--out", type=new("directory"), help="directory; the run's `diagnosis` if absent")
    diagnose.set_defaults(run=_diagnose)


def _bench(arguments: argparse.Namespace) -> int:
    """Run a benchmark, and print a table for each combination of T and batch size."""
    from baft_easyedit.bench.config import read_config
    from baft_easyedit.bench.layouts import summary_table
    from baft_easyedit.bench.run import run_bench
    from baft_easyedit.bench.tables import to_markdown

    config = read_config(arguments.config, _overrides(arguments))
    if arguments.device is None:
        usable = usable_device(config.device, arguments.config)
        config = config.model_copy(update={"device": usable})
    out = arguments.out or Path("runs") / Path(arguments.config).stem
    silence_loading()
    with Bar() as bar:
        try:
            rows = run_bench(config, out, bar.start, bar.tell)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"{bar.position}; what was finished is kept in {out}, and the same command goes on "
                "from there"
            ) from None
    if not rows:  # one of several processes, of which another prints the tables
        return 0
    for T, size in [(T, size) for T in config.T for size in config.batch_size]:
        chosen = [row for row in rows if (row["T"], row["batch_size"]) == (T, size)]
        caption = f"{chosen[0]['protocol']}, T = {T}, batch size {size}, n = {chosen[0]['n']}"
        print("\n" + to_markdown(summary_table(caption, chosen)))
    print(f"\n{out}/summary.json; for more: baft-easyedit report {out}")
    return status_of(rows)


def _overrides(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the settings that the given options replace, as the YAML file nests them."""
    given = {name: value for name, value in vars(arguments).items() if value is not None}
    plain = {k: str(v) if isinstance(v, Path) else v for k, v in given.items()}
    settings = {name: plain[name] for name in _SETTINGS if name in plain}
    if "include_path" in plain:
        settings["downstream"] = {"include_path": plain["include_path"]}
    data = {
        key: plain[name] for name, key in (("data", "path"), ("limit", "limit")) if name in plain
    }
    return {**settings, "data": data}


def _report(arguments: argparse.Namespace) -> None:
    """Write tables and figures; print the names of the files."""
    from baft_easyedit.bench.report import write_report

    out = arguments.out or arguments.runs[0] / "report"
    for file in write_report(arguments.runs, out):
        print(file)


def _diagnose(arguments: argparse.Namespace) -> None:
    """Write and print the diagnosis of a run."""
    from baft_easyedit.bench.diagnosis import diagnose, write_diagnosis

    diagnosis = diagnose(arguments.run_dir)
    print(diagnosis.to_markdown())
    for file in write_diagnosis(diagnosis, arguments.out or arguments.run_dir / "diagnosis"):
        print(file)
