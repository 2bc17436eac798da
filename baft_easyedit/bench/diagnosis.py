"""Check the paper's claims on a finished run: does the gate do what it is meant to do?

`diagnose`, the command of that name, reads only a run's files. It reports how evenly the bases are
used, Reliability against Locality over the strength of R_loc, how well the gate separates edit
prompts from irrelevant ones, and signs of failure. Shape: r bases of a layer.
"""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import hypot, sqrt
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch

from baft_easyedit.bench.config import MethodConfig, read_config
from baft_easyedit.bench.layouts import in_order
from baft_easyedit.bench.results import Case, Result, by_layer, gate_records, read_run
from baft_easyedit.bench.store import write_json, write_text
from baft_easyedit.bench.tables import Cell, Column, Table, markdown_text, to_markdown
from baft_easyedit.hparams import OUR_METHODS
from baft_easyedit.method.gate_report import (
    coefficient_of_variation,
    collapse_warnings,
    imbalance_warnings,
    pooled_deviation,
    top_share,
)

SIGNIFICANCE = 0.05
"""Accepted share of false discoveries among the bases that are reported to tell prompts apart."""
LEAST_GAP = 0.01
"""Mean weights that are closer than this count as equal, however sure their order is: alpha, the
weight that R_loc lets irrelevant positions keep (Liu et al. 2025, Table 5)."""
MIN_PROMPTS = 4
"""Fewest prompts of each kind that are tested: with three, no two-sided p-value is below 0.1."""
SMALL_AUC = 0.556
"""A gate does not separate if its mean AUC is below this and no basis is open wider beyond chance.
The value is the AUC of two normal distributions at Cohen's d = 0.2, which Cohen calls small."""
LOCALITY_DROP = 0.05
"""A loss of Locality up to this, from the smallest to the largest T, causes no warning: the paper's
BaFT loses up to 0.03 on ZsRE from T 1 to 1000, its ReFT 0.2 and more."""
NUM_STANDARD_ERRORS = 2.0
"""The loss must also exceed this many of its standard errors: about 95 % confidence."""

_PROMPTS = ("rewrite", "rephrase", "locality")
_BALANCE = (
    "How unevenly the bases of a layer are used after the last edit of a sequence: coefficient of "
    "variation of wbar_k over the bases (0: alike), mean over sequences, ± its standard error."
)
_SWEEPS = (
    "Rows that differ in the strength of R_loc alone. Front: no other row is better in one score "
    "and at least as good in the other."
)
_SEPARATION = (
    "Basis weights on edit prompts against irrelevant ones. By layer: AUC, the chance that an edit "
    "prompt has the larger weight (0.5: no difference), mean over bases. Open: bases that are open "
    f"wider on edit prompts, by {LEAST_GAP} and beyond chance (Mann-Whitney U, at most "
    f"{SIGNIFICANCE:.0%} false discoveries by Benjamini and Hochberg); reversed: on irrelevant "
    "ones. Prompts are taken as independent, which flatters a row of few sequences: the prompts of "
    "one share a gate."
)
_NO_GATE = "No row of BaFT has recorded basis weights: run one, with `basis: true`."
_NO_SWEEP = (
    "No two scored rows of BaFT differ in R_loc alone: add rows to `methods`, such as {name: BaFT "
    "without R_loc, method: BaFT, set: {locality: false}} or {name: BaFT with 3 R_loc, method: "
    "BaFT, set: {locality_coef: 3}}."
)
_TOO_FEW = f"Not tested: {MIN_PROMPTS} edit prompts and as many irrelevant ones are needed."

Lines = dict[str, dict[str, Any]]
"""For each row (a method under a protocol), its numbers and texts by column title."""


@dataclass(frozen=True)
class Diagnosis:
    """What a run says about the paper's claims."""

    run: str  # name of the run's directory
    warnings: Sequence[str]  # signs of failure, each with what to try
    balance: Lines
    separation: Lines
    sweeps: Mapping[str, Lines]  # by the settings that their rows have in common

    def to_markdown(self) -> str:
        """Return the diagnosis as text: warnings first, then a section for each claim."""
        balance = {"Coefficient of variation of basis use": self.balance}
        separation = {"AUC of edit against irrelevant prompts": self.separation}
        parts = [f"# Diagnosis of {markdown_text(self.run)}", "## Warnings"]
        warnings = "\n".join(f"- {markdown_text(text)}" for text in self.warnings)
        parts.append(warnings or "No sign of failure was found.")
        for title, explanation, tables, why_not in (
            ("Load balance", _BALANCE, balance, _NO_GATE),
            ("Reliability against Locality", _SWEEPS, self.sweeps, _NO_SWEEP),
            ("Gate separation", _SEPARATION, separation, _TOO_FEW),
        ):
            made = [_markdown(caption, lines) for caption, lines in tables.items() if lines]
            parts += [f"## {title}", *([explanation, *made] if made else [why_not])]
        return "\n\n".join(parts) + "\n"


def diagnose(run_dir: Path) -> Diagnosis:
    """Check a run that `baft-easyedit bench` has written; errors are those of `read_run`."""
    run = read_run(run_dir)
    config = read_config(run.directory.config)
    methods = {m.name: m for m in config.methods if m.method in OUR_METHODS}
    ours = in_order([result for result in run.results if result.method in methods])
    gated = [result for result in ours if methods[result.method].method == "BaFT"]
    warnings: list[str] = []
    balance: Lines = {}
    separation: Lines = {}
    for result in gated:
        name = f"{result.method}, {result.setting.slug}"
        cases = result.cases()
        used, unbalanced = _balance(result)
        tested, mixed = _separation(cases)
        balance |= {name: used} if used else {}
        separation |= {name: tested} if tested else {}
        found = (*_collapses(cases), *unbalanced, *mixed)
        warnings += [f"{name}: {warning}" for warning in found]
    warnings += _locality_falls(ours)
    return Diagnosis(run_dir.resolve().name, warnings, balance, separation, _sweeps(methods, gated))


def write_diagnosis(diagnosis: Diagnosis, directory: Path) -> list[Path]:
    """Write `diagnosis.json` and `diagnosis.md`; return the files."""
    files = [directory / "diagnosis.json", directory / "diagnosis.md"]
    write_json(files[0], asdict(diagnosis))
    write_text(files[1], diagnosis.to_markdown())
    return files


def _markdown(caption: str, lines: Lines) -> str:
    decimals = dict.fromkeys(("sequences", "edit prompts", "irrelevant"), 0)
    decimals |= dict.fromkeys(("edit weight", "irrelevant weight"), 3)
    titles = dict.fromkeys(title for line in lines.values() for title in line)
    columns = [Column(title, decimals.get(title, 2), None) for title in titles]
    rows = {row: [Cell(line.get(title)) for title in titles] for row, line in lines.items()}
    return to_markdown(Table(caption, columns, rows))


def _balance(result: Result) -> tuple[dict[str, Any], Sequence[str]]:
    """Summarise how a row uses its bases; warn of layers where a few carry nearly all weight."""
    chunks = result.directory.chunks_of(result.method, result.setting)
    found = by_layer(chunk["basis_usage"] for chunk in chunks if chunk["error"] is None)
    if not found:
        return {}, ()
    usages = {layer: torch.from_numpy(used) for layer, used in found.items()}
    variations = {k: list(map(coefficient_of_variation, used)) for k, used in usages.items()}
    shares = {layer: fmean(map(top_share, used)) for layer, used in usages.items()}
    means = [fmean(sequence) for sequence in zip(*variations.values(), strict=True)]
    line = {
        "sequences": len(means),
        **{f"layer {layer}": fmean(of_layer) for layer, of_layer in variations.items()},
        "all layers": fmean(means),
        "±": np.std(means, ddof=1).item() / sqrt(len(means)) if len(means) > 1 else None,
        "share of the largest quarter": fmean(shares.values()),
    }
    return line, imbalance_warnings(shares, rank=next(iter(found.values())).shape[1])


def _separation(cases: Sequence[Case]) -> tuple[dict[str, Any], Sequence[str]]:
    """Test whether each basis is open wider on edit prompts; warn if none is.

    The p-values are two-sided, and adjusted over all layers and bases of the row.
    """
    from scipy.stats import false_discovery_control, mannwhitneyu

    edits, others = (gate_records(cases, "basis", kind) for kind in ("rewrite", "locality"))
    layers = sorted(edits.keys() & others.keys())
    counts = [len(records[layer]) for layer in layers for records in (edits, others)]
    if min(counts, default=0) < MIN_PROMPTS:
        return {}, ()
    a, b = (np.concatenate([kind[layer].T for layer in layers]) for kind in (edits, others))
    tests = [mannwhitneyu(*pair) for pair in zip(a, b, strict=True)]
    auc = np.array([test.statistic for test in tests]) / (counts[0] * counts[1])
    # If all weights are equal, scipy 1.18 gives nan in place of p = 1.
    p_values = np.nan_to_num([test.pvalue for test in tests], nan=1.0)
    is_sure = false_discovery_control(p_values, method="bh") < SIGNIFICANCE
    gap = a.mean(1) - b.mean(1)
    num_open = int((is_sure & (gap >= LEAST_GAP) & (auc > 0.5)).sum())
    num_reversed = int((is_sure & (gap <= -LEAST_GAP) & (auc < 0.5)).sum())
    means = zip(layers, auc.reshape(len(layers), -1).mean(1).tolist(), strict=True)
    line = {
        "edit prompts": counts[0],
        "irrelevant": counts[1],
        "edit weight": a.mean().item(),
        "irrelevant weight": b.mean().item(),
        **{f"layer {layer}": mean for layer, mean in means},
        "all layers": auc.mean().item(),
        "open": f"{num_open} of {len(auc)}",
        "reversed": f"{num_reversed} of {len(auc)}",
    }
    if num_open or auc.mean() >= SMALL_AUC:
        return line, ()
    return line, (
        f"no separation (mean AUC {auc.mean():.2f}): no basis is open wider on edit prompts than "
        "on irrelevant ones, beyond chance: give the requests a loc_prompt of the kind that is to "
        "be kept, raise locality_coef, or gate_lr.",
    )


def _collapses(cases: Sequence[Case]) -> Sequence[str]:
    """Warn of gates whose weights hardly depend on the prompt; each sequence has its own gate."""
    layers = gate_records(cases, "basis", "rewrite")
    groups: dict[int, list[torch.Tensor]] = defaultdict(list)
    for chunk in {case["chunk"] for case in cases}:
        own = [case for case in cases if case["chunk"] == chunk]
        kinds = [gate_records(own, "basis", prompt) for prompt in _PROMPTS]
        for layer in layers:
            seen = [kind[layer] for kind in kinds if layer in kind]
            groups[layer] += [torch.from_numpy(np.concatenate(seen))] if seen else []
    return collapse_warnings(
        {layer: pooled_deviation(groups[layer]).tolist() for layer in layers},
        {layer: weights.mean() for layer, weights in layers.items()},
    )


def _sweeps(methods: Mapping[str, MethodConfig], results: Sequence[Result]) -> dict[str, Lines]:
    """Find the rows of BaFT that differ in the strength of R_loc alone, and their Pareto fronts."""
    found: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        if None not in _scores(result):
            title = ", ".join([result.setting.slug, *_other_settings(methods[result.method])])
            found[title].append(result)
    sweeps = {}
    for title, rows in found.items():
        strengths = {row.method: _strength(methods[row.method]) for row in rows}
        if len(set(strengths.values())) > 1:
            rows.sort(key=lambda row: strengths[row.method])
            sweeps[title] = {
                row.method: {
                    "R_loc strength": f"{strengths[row.method]:g}".replace("inf", "preset"),
                    "Rel": row.number("rewrite_acc"),
                    "± Rel": row.number("rewrite_acc_se"),
                    "Loc": row.number("locality_acc"),
                    "± Loc": row.number("locality_acc_se"),
                    "front": "no" if any(_beats(other, row) for other in rows) else "yes",
                }
                for row in rows
            }
    return sweeps


def _other_settings(method: MethodConfig) -> list[str]:
    """Name a method's settings other than whether and how strongly it uses R_loc."""
    settings = {"hparams": method.hparams} if method.hparams else {}
    settings |= {k: v for k, v in method.set.items() if k not in ("locality", "locality_coef")}
    return [f"{name} {json.dumps(settings[name])}" for name in sorted(settings)]


def _strength(method: MethodConfig) -> float:
    """Return the factor of R_loc; infinity, to be sorted last, if the preset decides."""
    if method.set.get("locality") is False:
        return 0.0
    return float(method.set.get("locality_coef", "inf"))


def _scores(result: Result) -> list[Any]:
    return [result.number("rewrite_acc"), result.number("locality_acc")]


def _beats(other: Result, result: Result) -> bool:
    """Tell whether another result is at least as good in both scores, and better in one."""
    gains = [a - b for a, b in zip(_scores(other), _scores(result), strict=True)]
    return min(gains) >= 0 and max(gains) > 0


def _locality_falls(results: Sequence[Result]) -> list[str]:
    """Warn of rows whose Locality is significantly worse after many edits in a row than few."""
    scored: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        if result.setting.batch_size == 1 and result.number("locality_acc_se") is not None:
            scored[result.method].append(result)
    falls = []
    for method, (few, *_, many) in ((m, r) for m, r in scored.items() if len(r) > 1):
        before, after = (r.values["locality_acc"] for r in (few, many))
        error = hypot(*(r.values["locality_acc_se"] for r in (few, many)))
        if before - after > max(LOCALITY_DROP, NUM_STANDARD_ERRORS * error):
            falls.append(
                f"{method}: Locality falls with T, from {before:.2f} at T {few.setting.T} to "
                f"{after:.2f} at T {many.setting.T}. Raise locality_coef, give each request more "
                "irrelevant prompts, or restore more often (ReFT has no such term: use BaFT). If "
                "the preset has other settings for single edits, they may be part of it."
            )
    return falls
