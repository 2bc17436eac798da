"""The commands that measure: `bench`, `report` and `diagnose` of its runs, `demo` and `speed`."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from baft_easyedit.cli.console import Bar, note, silence_loading
from baft_easyedit.cli.model import default_device, usable_device
from baft_easyedit.cli.options import DTYPES, counts, device, existing, names, new, whole

_NOTHING_RUN = 1
"""Exit status if no row of a benchmark has scores."""


def add_commands(commands: Any) -> None:
    """Add the commands; the options of `bench` replace values of its YAML file."""
    demo = commands.add_parser(
        "demo", help="edits shown as text, then BaFT beside other methods through EasyEdit"
    )
    add = demo.add_argument
    add("--methods", type=names, default=[], help="comma-separated list; all it knows if absent")
    add("--cases", type=whole(1), default=30, help="single edits per method (%(default)s)")
    add("--jobs", type=whole(1), default=2, help="methods run at once (%(default)s)")
    add("--device", type=device, help="CUDA device number, or a name; the first, or the CPU")
    demo.set_defaults(run=_demo)

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
    _add_speed(commands)


def _add_speed(commands: Any) -> None:
    """Add the command `speed`; absent options get the defaults of `SpeedOptions`."""
    speed = commands.add_parser(
        "speed",
        help="measure time, memory and generation of an edit",
        argument_default=argparse.SUPPRESS,
    )
    source = speed.add_mutually_exclusive_group()
    source.add_argument("--model", help="Hugging Face name or directory, or bundled")
    source.add_argument(
        "--shape", help="random weights: llama-2-7b, llama-3-8b, gemma-7b, llama-LAYERSxWIDTH"
    )
    add = speed.add_argument
    add("--methods", type=names, help="comma-separated list; BaFT,ReFT if absent")
    add("--data", help="records to edit, such as zsre=DIR; random words if absent")
    add("--start", type=whole(0), help="first of the records; 0 if absent")
    add("--prompt-length", type=whole(4), help="tokens of a prompt of random words; 32 if absent")
    add("--batch-size", type=whole(1), help="requests of an edit call; 1 if absent")
    add("--rank", type=whole(1), help="bases per layer; 12 if absent")
    add("--steps", type=whole(1), help="steps of BaFT and ReFT; 40 if absent")
    add("--repeats", type=whole(1), help="measurements of each row; 5 if absent")
    add("--new-tokens", type=whole(0), help="tokens generated per measurement; 32 if absent")
    add("--threads", type=whole(1), help="CPU threads; torch's choice if absent")
    add("--dtype", choices=DTYPES, help="float32 if absent")
    add("--device", type=device, help="CUDA device number, or a name")
    add("--profile", action="store_true", help="with --out: also write where an edit's time goes")
    add("--out", type=new("file"), help="JSON file")
    speed.set_defaults(run=_speed)


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
        caption = f"{chosen[0]['protocol']}, T = {T}, batch size {size}"
        print("\n" + to_markdown(summary_table(caption, chosen)))
    print(f"\n{out}/summary.json; for more: baft-easyedit report {out}")
    return _status(rows)


def _status(rows: Sequence[Mapping[str, Any]]) -> int:
    """Return the exit status of a benchmark; print a note if no row has scores."""
    if any(row["error"] is None for row in rows):
        return 0
    note("no method could be run; the tables say why")
    return _NOTHING_RUN


def _overrides(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the settings that the given options replace, as the YAML file nests them."""
    from baft_easyedit.bench.config import BenchConfig

    given = {name: value for name, value in vars(arguments).items() if value is not None}
    plain = {k: str(v) if isinstance(v, Path) else v for k, v in given.items()}
    settings = {name: plain[name] for name in BenchConfig.model_fields if name in plain}
    if "include_path" in plain:
        settings["downstream"] = {"include_path": plain["include_path"]}
    names_of_data = {"data": "path", "limit": "limit"}
    data = {key: plain[name] for name, key in names_of_data.items() if name in plain}
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


def _demo(arguments: argparse.Namespace) -> int:
    """Show a few edits, then the tables."""
    from baft_easyedit import demo
    from baft_easyedit.easyedit import find_host

    place = default_device(arguments.device)
    config = demo.demo_config(arguments.methods, arguments.cases, arguments.jobs, place)
    silence_loading()
    host = find_host()
    _show_real_edits(place)
    print("\nThe bundled model, of 3 million parameters:")
    for line in demo.show_edits(place):
        print(line)
    print(f"\nThrough EasyEdit ({host.generation}, {host.version}) and its own evaluators:")
    with Bar() as bar:
        rows = demo.compare(config, bar.start)
    for line in demo.tables(config, rows):
        print(line)
    return _status(rows)


def _show_real_edits(place: int | str) -> None:
    """Show edits of SmolLM2, or say why it cannot be used."""
    from baft_easyedit import demo

    try:
        settings = demo.real_settings(place)
    except (ImportError, ValueError, OSError) as error:  # the rest of the demo does not need it
        print(f"No real model, only the bundled one: {error}")
        return
    for line in demo.show_real_edits(settings):
        print(line)


def _speed(arguments: argparse.Namespace) -> None:
    """Measure, and print the table."""
    from baft_easyedit.speed import SpeedOptions, run_speed

    given = {name: value for name, value in vars(arguments).items() if name != "run"}
    given.setdefault("device", default_device())
    if "methods" in given:
        given["methods"] = tuple(given["methods"])
    options = SpeedOptions(**given)
    silence_loading()
    with Bar("row") as bar:
        report = run_speed(options, bar.start)
    for line in (*report.lines(), *report.files):
        print(line)
