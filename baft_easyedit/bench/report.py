"""Tables and figures of benchmark runs: `baft-easyedit report RUN_DIR... [--out DIR]`.

Which files of `hparams/bench` give which table or figure of the paper (Liu et al. 2025):

    Table 1         single edits             bench/*_single
    Table 2         continual editing        bench/zsre_continual
    Tables 3, 6, 7  parameters and time      any, a table for each model
    Table 4         ablation                 bench/ablation: rows whose names begin with a plus
    Table 8         PIQA after the edits     bench/downstream
    Figures 1, 2    bases of ReFT and BaFT   any with `basis: true` and rows ReFT and BaFT
    Figure 3        batched editing          bench/zsre_batched: two batch sizes or more

Beyond the paper: scores of generated text, scores right after each edit, retention of old edits,
and quality against time. Several runs make one report, with a section for each model and data set.
"""

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baft_easyedit.bench.figures import method_styles, save_figure
from baft_easyedit.bench.illustrations import Illustration, illustrations
from baft_easyedit.bench.layouts import Section
from baft_easyedit.bench.paper import read_paper_numbers
from baft_easyedit.bench.results import Result, Run, merge_results, read_run
from baft_easyedit.bench.store import file_name, write_text
from baft_easyedit.bench.tables import (
    LATEX_PREAMBLE,
    Table,
    latex_text,
    markdown_text,
    to_latex,
    to_markdown,
)


def write_report(run_dirs: Sequence[Path], out: Path, paper_model: str | None = None) -> list[Path]:
    """Write the tables and figures of runs.

    Args:
        run_dirs: Directories that `baft-easyedit bench` wrote, at least one.
        out: Directory for `report.md`, `tables.tex` and the figures; made if absent.
        paper_model: A model of the paper, such as `llama-2-7b`, whose printed numbers are added as
            rows of their own, for orientation; None for none.

    Returns:
        The files that were written.

    Raises:
        ValueError: If there is no directory, one is not that of a run, a file of it is damaged, two
            runs contradict each other, or the paper has no such model.
    """
    if not run_dirs:
        raise ValueError("run_dirs must name at least one run directory; got none")
    paper = read_paper_numbers()
    reference = None if paper_model is None else paper.check_model(paper_model)
    runs = [read_run(Path(directory)) for directory in run_dirs]
    results = merge_results(runs)
    styles = method_styles([result.method for result in results])
    out.mkdir(parents=True, exist_ok=True)
    chapters, files = [], []
    for group in _groups(results):
        section = Section(group, paper, reference)
        drawn, needs = illustrations(group, styles)
        sources = [r for r in runs if any(r.directory == result.directory for result in group)]
        chapter = _Chapter(section, section.tables(), drawn, needs, sources)
        for name, illustration in chapter.named_figures():
            files += save_figure(illustration.figure, out, name)
        chapters.append(chapter)
    legend = _legend(paper.citation)
    markdown = ["# Benchmark report", _bullets(legend), *(c.markdown() for c in chapters)]
    head = [LATEX_PREAMBLE, *(f"% {line}" for line in legend)]
    write_text(out / "report.md", "\n\n".join(markdown) + "\n")
    write_text(
        out / "tables.tex", "\n\n".join(["\n".join(head), *(c.latex() for c in chapters)]) + "\n"
    )
    return [out / "report.md", out / "tables.tex", *files]


def _groups(results: Iterable[Result]) -> list[list[Result]]:
    """Group results by model and data set, in the order in which these appear."""
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result.model, result.dataset), []).append(result)
    return list(groups.values())


def _legend(citation: str) -> list[str]:
    """Return how to read the tables."""
    return [
        "Rel: reliability, on the edited prompt; Gen: generality, on a rephrasing; Loc: locality, "
        "agreement with the unedited model on other prompts; Por: portability, on what follows "
        "from the edit.",
        "Bold: best of a column; underlined: second; values that read the same count the same.",
        "±: standard error over records.",
        "–: no number, because the data have no such probe or the run did not measure it.",
        f"[x]: what the paper prints for the same cell ({citation}); its scores are means over "
        "1000 records.",
    ]


@dataclass(frozen=True)
class _Chapter:
    """What a report has of one model on one data set."""

    section: Section
    tables: Sequence[Table]
    figures: Sequence[Illustration]
    needs: Sequence[str]
    """For each figure that is not drawn what it would need."""
    sources: Sequence[Run]

    def named_figures(self) -> list[tuple[str, Illustration]]:
        """Return the figures with the names of their files, without suffix."""
        ending = file_name(f"{self.section.model}-{self.section.dataset}")
        return [(f"{figure.name}-{ending}", figure) for figure in self.figures]

    def markdown(self) -> str:
        """Return the chapter for `report.md`."""
        section = self.section
        parts = [f"## {markdown_text(f'{section.model} on {section.dataset}')}"]
        parts += [to_markdown(table) for table in self.tables]
        notes = [f"{i}. {markdown_text(note)}" for i, note in enumerate(section.notes, 1)]
        shared = [f"- All rows: {markdown_text(note)}" for note in section.common_notes]
        if notes or shared:
            parts += ["### Notes", "\n".join([*notes, *shared])]
        if self.figures:
            parts.append("### Figures")
            parts += [f"![{f.name}]({name}.png)\n\n{f.caption}" for name, f in self.named_figures()]
        if gaps := [*section.gaps(), *self.needs]:
            parts += ["### Not here, and what it would need", _bullets(gaps)]
        parts.append("### Where the numbers come from")
        parts += [_bullets(map(markdown_text, _provenance(run))) for run in self.sources]
        return "\n\n".join(parts)

    def latex(self) -> str:
        """Return the chapter for `tables.tex`."""
        section = self.section
        lines = [f"% {line}" for run in self.sources for line in _provenance(run)]
        notes = [
            rf"\textsuperscript{{{i}}} {latex_text(note)}\par"
            for i, note in enumerate(section.notes, 1)
        ]
        notes += [rf"All rows: {latex_text(note)}\par" for note in section.common_notes]
        return "\n\n".join(["\n".join(lines), *map(to_latex, self.tables), "\n".join(notes)])


def _provenance(run: Run) -> list[str]:
    """Return how a run was made, as lines of text."""
    info = run.info
    data, git = info.get("data") or {}, info.get("git") or {}
    state = " with uncommitted changes" if git.get("dirty") else ""
    files = [
        f"{f['name']}, {f['bytes']:,} bytes, sha256 {f['sha256']}" for f in data.get("files", ())
    ]
    lines = [
        f"{run.directory.name}: {shlex.join(info.get('command') or ['command not recorded'])}",
        f"{info.get('date')}, status {info.get('status')}, seed {info.get('seed')}, code "
        f"{git.get('commit', 'installed')}{state}",
        f"EasyEdit {_listed(info.get('easyedit'))}; {_listed(info.get('versions'))}",
        f"hardware: {_listed(info.get('hardware'))}; model: {_listed(info.get('model'))}",
        f"data: {data.get('kind')}, {data.get('num_records')} records, sha256 {data.get('sha256')}",
        *files,
        *data.get("notes", ()),
    ]
    return [" ".join(line.split()) for line in lines]


def _listed(values: Mapping[str, Any] | None) -> str:
    """Return names and values as text."""
    return ", ".join(f"{name} {value}" for name, value in (values or {}).items()) or "not recorded"


def _bullets(lines: Iterable[str]) -> str:
    """Return lines as a Markdown list."""
    return "\n".join(f"- {line}" for line in lines)
