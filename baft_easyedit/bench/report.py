"""Tables and figures of benchmark runs: `baft-easyedit report RUN_DIR... [--out DIR]`.

Captions name the paper's table or figure; the rows of its ablation begin with a plus. Several runs
make one report, with a chapter for each model and data set.
"""

import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from baft_easyedit.bench.figures import draw
from baft_easyedit.bench.layouts import PaperNumbers, make_notes, make_tables
from baft_easyedit.bench.results import Result, Run, merge_results, read_run
from baft_easyedit.bench.store import file_name, write_text
from baft_easyedit.bench.tables import (
    LATEX_PREAMBLE,
    latex_text,
    markdown_text,
    to_latex,
    to_markdown,
)

_LEGEND = (
    "Rel: reliability, on the edited prompt; Gen: generality, on a rephrasing; Loc: locality, "
    "agreement with the unedited model on other prompts; Por: portability, on what follows from "
    "the edit.",
    "Bold: best of a column; values that read the same count the same.",
    "±: standard error over records.",
    "–: no number, because the data have no such probe or the run did not measure it.",
    "[x]: what the paper prints for the same cell ({citation}); its scores are means over 1000 "
    "records.",
)


def write_report(run_dirs: Sequence[Path], out: Path) -> list[Path]:
    """Write `report.md`, `tables.tex` and the figures of runs; return the files.

    Errors are those of `read_run` and `merge_results`.
    """
    paper, runs = PaperNumbers(), [read_run(Path(directory)) for directory in run_dirs]
    legend = [line.format(citation=paper.citation) for line in _LEGEND]
    markdown = ["# Benchmark report", _bullets(legend)]
    latex = ["\n".join([LATEX_PREAMBLE, *(f"% {line}" for line in legend)])]
    chapters: dict[tuple[str, str], list[Result]] = {}
    for result in merge_results(runs):
        chapters.setdefault((result.model, result.dataset), []).append(result)
    out.mkdir(parents=True, exist_ok=True)
    files = [out / "report.md", out / "tables.tex"]
    for (model, dataset), results in chapters.items():
        tables, notes = make_tables(results, paper), make_notes(results)
        directories = {result.directory for result in results}
        own = [run for run in runs if run.directory in directories]
        if len({run.info["data"]["sha256"] for run in own}) > 1:
            notes.append("These runs have different records: compare rows of one run only.")
        sources = [_source(run) for run in own]
        markdown.append(f"## {markdown_text(f'{model} on {dataset}')}")
        markdown += map(to_markdown, tables)
        if notes:
            markdown += ["### Notes", _bullets(map(markdown_text, notes))]
        for title, caption, figure in draw(results):
            name = f"{title}-{file_name(f'{model}-{dataset}')}"
            markdown.append(f"![{title}]({name}.png)\n\n{caption}")
            for file in (out / f"{name}.png", out / f"{name}.pdf"):
                figure.savefig(file, dpi=150)
                files.append(file)
        markdown.append("### Where the numbers come from")
        markdown += [_bullets(map(markdown_text, source)) for source in sources]
        latex.append("\n".join(f"% {line}" for source in sources for line in source))
        latex += map(to_latex, tables)
        latex.append("\n".join(rf"{latex_text(note)}\par" for note in notes))
    write_text(files[0], "\n\n".join(markdown) + "\n")
    write_text(files[1], "\n\n".join(latex) + "\n")
    return files


def _source(run: Run) -> list[str]:
    """Return how a run was made, as lines of text."""
    info = run.info
    data, git = info["data"], info["git"] or {}
    state = " with uncommitted changes" if git.get("dirty") else ""
    words = info["command"]
    # Without the directories of the machine that ran it.
    names = [Path(word).name if Path(word).is_absolute() else word for word in words]
    typed = shlex.join("baft-easyedit" if name == "__main__.py" else name for name in names)
    lines = [
        f"{run.directory.root.name}: {typed}",
        f"{info['date']}, status {info['status']}, seed {info['seed']}, code "
        f"{git.get('commit', 'installed')}{state}",
        f"EasyEdit {_listed(info['easyedit'])}; {_listed(info['versions'])}",
        f"hardware: {_listed(info['hardware'])}; model: {_listed(info['model'])}",
        f"data: {data['kind']}, {data['num_records']} records, sha256 {data['sha256']}",
        *(f"{f['name']}, {f['bytes']:,} bytes, sha256 {f['sha256']}" for f in data["files"]),
        *data["notes"],
    ]
    return [" ".join(line.split()) for line in lines]


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)
