"""The paper's claims as checks of a run: does the gate do what it is there for?

`diagnose` reads a run's files and nothing else. It looks at the balance of basis use, Reliability
against Locality over the strength of R_loc, the separation of edit and irrelevant prompts, and for
signs of failure. Shape: r bases of a layer.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import hypot, isnan
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from baft_easyedit.bench.config import BenchConfig, MethodConfig, read_config
from baft_easyedit.bench.layouts import in_order
from baft_easyedit.bench.results import Result, gate_records, read_run
from baft_easyedit.bench.store import write_json, write_text
from baft_easyedit.bench.tables import Cell, Column, Table, markdown_text, to_markdown
from baft_easyedit.method.gate_report import (
    coefficient_of_variation,
    collapse_warnings,
    imbalance_warnings,
    pooled_deviation,
    top_share,
)

SIGNIFICANCE = 0.05
"""Share of false discoveries that is accepted among the bases said to tell prompts apart."""
LEAST_GAP = 0.01
"""Mean weights that are closer than this count as equal, however sure their order is: alpha, the
weight that R_loc lets irrelevant positions keep (Liu et al. 2025, Table 5)."""
MIN_PROMPTS = 4
"""Fewest prompts of each kind that are tested: with three, no two-sided p-value is below 0.1."""
SMALL_AUC = 0.556
"""A gate does not separate if its mean AUC is below this, and no basis is open wider beyond chance:
it is the AUC of two normal distributions with Cohen's d of 0.2, his small effect."""
LOCALITY_DROP = 0.05
"""A smaller loss of Locality from the smallest to the largest T is not warned of: the paper's BaFT
loses up to 0.03 on ZsRE from T 1 to 1000, its ReFT 0.2 and more."""
NUM_STANDARD_ERRORS = 2.0
"""The loss must also exceed this many of its standard errors: about 95 % confidence."""

_PROMPTS = ("rewrite", "rephrase", "locality")
_SCORES = ("rewrite_acc", "rewrite_acc_se", "locality_acc", "locality_acc_se")
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
    "prompt has the larger weight (0.5: no difference), mean over bases; in brackets the bases "
    f"that are open wider on edit prompts, by {LEAST_GAP} and beyond chance (Mann-Whitney U, at "
    f"most {SIGNIFICANCE:.0%} false discoveries by Benjamini and Hochberg). Reversed: bases open "
    "wider on irrelevant prompts. Prompts are taken as independent, which flatters a row of few "
    "sequences: the prompts of one share a gate."
)
_NO_GATE = "No row of BaFT has recorded basis weights: run one, with `basis: true`."
_NO_SWEEP = (
    "No two scored rows of BaFT differ in R_loc alone: add rows to `methods`, such as {name: BaFT "
    "without R_loc, method: BaFT, set: {locality: false}} or {name: BaFT with 3 R_loc, method: "
    "BaFT, set: {locality_coef: 3}}."
)
_TOO_FEW = f"Not tested: {MIN_PROMPTS} edit prompts and as many irrelevant ones are needed."


@dataclass(frozen=True)
class Diagnosis:
    """What a run says about the paper's claims; a row is a method under a protocol."""

    run: str
    """Name of the run's directory."""
    warnings: Sequence[str]
    """Signs of failure, each with what to try."""
    balance: pd.DataFrame
    """For each row, sequence and layer: `variation` and `top_share` of basis use, and `rank`."""
    sweeps: pd.DataFrame
    """For each row that differs from others in R_loc alone: its scores, and if it `is_on_front`."""
    separation: pd.DataFrame
    """For each row, layer and basis: mean weights, `auc`, `p_value`, and if it `is_open` wider on
    edit prompts or `is_reversed`, visibly and beyond chance."""

    def to_dict(self) -> dict[str, Any]:
        """Return all figures as JSON values."""
        frames = {name: getattr(self, name) for name in ("balance", "sweeps", "separation")}
        plain = {name: json.loads(f.to_json(orient="records")) for name, f in frames.items()}
        return {"run": self.run, "warnings": list(self.warnings), **plain}

    def to_markdown(self) -> str:
        """Return the diagnosis as text: warnings first, then a section for each claim."""
        warnings = "\n".join(f"- {markdown_text(text)}" for text in self.warnings)
        sections = (
            ("Load balance", _BALANCE, _balance_tables(self.balance), _NO_GATE),
            ("Reliability against Locality", _SWEEPS, _sweep_tables(self.sweeps), _NO_SWEEP),
            ("Gate separation", _SEPARATION, _separation_tables(self.separation), _TOO_FEW),
        )
        parts = [f"# Diagnosis of {markdown_text(self.run)}", "## Warnings"]
        parts.append(warnings or "No sign of failure was found.")
        for title, explanation, tables, why_not in sections:
            parts.append(f"## {title}")
            parts += [explanation, *map(to_markdown, tables)] if tables else [why_not]
        return "\n\n".join(parts) + "\n"


def diagnose(run_dir: Path) -> Diagnosis:
    """Check a run.

    Args:
        run_dir: A directory that `baft-easyedit bench` has written.

    Raises:
        ValueError: If it is not one, or one of its files cannot be read.
    """
    run = read_run(run_dir)
    config = read_config(run.directory.config)
    methods = {method.name: method.method for method in config.methods}
    ours = in_order([r for r in run.results if methods[r.method] in ("BaFT", "ReFT")])
    gated = [result for result in ours if methods[result.method] == "BaFT"]
    warnings, balance, separation = [], [], []
    for result in gated:
        used, tested = _balance(result), _separation(result)
        found = (*_collapses(result), *_imbalances(used), *_no_separation(tested))
        warnings += [f"{_name(result)}: {warning}" for warning in found]
        balance.append(used)
        separation.append(tested)
    return Diagnosis(
        run=run_dir.resolve().name,
        warnings=[*warnings, *_locality_falls(ours)],
        balance=_joined(balance),
        sweeps=_sweeps(config, gated),
        separation=_joined(separation),
    )


def write_diagnosis(diagnosis: Diagnosis, directory: Path) -> list[Path]:
    """Write `diagnosis.json` and `diagnosis.md`; return the files."""
    files = [directory / "diagnosis.json", directory / "diagnosis.md"]
    write_json(files[0], diagnosis.to_dict())
    write_text(files[1], diagnosis.to_markdown())
    return files


def _name(result: Result) -> str:
    """Name a row."""
    return f"{result.method}, {result.setting.slug}"


def _joined(frames: Iterable[pd.DataFrame]) -> pd.DataFrame:
    """Put what was found of several rows below each other."""
    found = [frame for frame in frames if len(frame)]
    return pd.concat(found, ignore_index=True) if found else pd.DataFrame()


def _balance(result: Result) -> pd.DataFrame:
    """Sum up how each sequence of edits uses the bases of each layer."""
    usages = [
        (chunk["chunk"], int(layer), torch.tensor(weights, dtype=torch.float64))
        for chunk in result.directory.chunks_of(result.method, result.setting)
        if chunk["error"] is None
        for layer, weights in (chunk["basis_usage"] or {}).items()
    ]
    return pd.DataFrame(
        {
            "row": _name(result),
            "sequence": sequence,
            "layer": layer,
            "rank": len(usage),
            "variation": coefficient_of_variation(usage),
            "top_share": top_share(usage),
        }
        for sequence, layer, usage in usages
    )


def _separation(result: Result) -> pd.DataFrame:
    """Test whether each basis is open wider on edit prompts than on irrelevant ones.

    AUC is the chance that the weight on an edit prompt exceeds that on an irrelevant one, ties
    half. The p-value is two-sided, and adjusted over all layers and bases of the row.
    """
    from scipy.stats import false_discovery_control, mannwhitneyu

    cases = result.cases()
    edits, others = (gate_records(cases, "basis", kind) for kind in ("rewrite", "locality"))
    layers = []
    for layer in sorted(edits.keys() & others.keys()):
        edit, other = edits[layer], others[layer]  # [prompts, r]
        if min(len(edit), len(other)) < MIN_PROMPTS:
            continue
        tests = [mannwhitneyu(a, b) for a, b in zip(edit.T, other.T, strict=True)]
        columns = {
            "basis": range(len(tests)),
            "edit_weight": edit.mean(0),
            "irrelevant_weight": other.mean(0),
            "auc": [test.statistic / (len(edit) * len(other)) for test in tests],
            "p_value": [test.pvalue for test in tests],
        }
        counts = {"num_edit": len(edit), "num_irrelevant": len(other)}
        layers.append(pd.DataFrame({"row": _name(result), "layer": layer, **counts, **columns}))
    found = _joined(layers)
    if len(found):
        # Equal weights tell nothing: p is 1, for which scipy 1.18 gives nan.
        found["p_value"] = false_discovery_control(found["p_value"].fillna(1.0), method="bh")
        gap = found["edit_weight"] - found["irrelevant_weight"]
        is_seen = (found["p_value"] < SIGNIFICANCE) & (gap.abs() >= LEAST_GAP)
        found["is_open"] = is_seen & (gap > 0) & (found["auc"] > 0.5)
        found["is_reversed"] = is_seen & (gap < 0) & (found["auc"] < 0.5)
    return found


def _sweeps(config: BenchConfig, results: Sequence[Result]) -> pd.DataFrame:
    """Find the rows of BaFT that differ in the strength of R_loc alone, and their Pareto fronts.

    Strength is `locality_coef`, 0 if `locality` is off, and NaN if the preset decides.
    """
    methods = {method.name: method for method in config.methods}
    points = pd.DataFrame(
        [
            {
                "sweep": ", ".join([result.setting.slug, *_other_settings(methods[result.method])]),
                "method": result.method,
                "strength": _strength(methods[result.method]),
                **{name: result.number(name) for name in _SCORES},
            }
            for result in results
        ],
        columns=["sweep", "method", "strength", *_SCORES],
    ).dropna(subset=["rewrite_acc", "locality_acc"])
    strengths = points.groupby("sweep")["strength"].transform("nunique", dropna=False)
    points = points[strengths > 1].sort_values("strength", kind="stable")
    fronts = [_on_front(sweep) for _, sweep in points.groupby("sweep", sort=False)]
    return points.assign(is_on_front=pd.concat(fronts) if fronts else False)


def _other_settings(method: MethodConfig) -> list[str]:
    """Name a method's settings other than whether and how strongly it uses R_loc."""
    settings = {"hparams": method.hparams} if method.hparams else {}
    settings |= {k: v for k, v in method.set.items() if k not in ("locality", "locality_coef")}
    return [f"{name} {json.dumps(settings[name])}" for name in sorted(settings)]


def _strength(method: MethodConfig) -> float:
    """Return the factor of R_loc; NaN if the preset decides."""
    if method.set.get("locality") is False:
        return 0.0
    return float(method.set.get("locality_coef", "nan"))


def _on_front(points: pd.DataFrame) -> pd.Series:
    """Tell which points no other beats in one score without losing in the other."""
    scores = points[["rewrite_acc", "locality_acc"]].to_numpy(dtype=float)
    gains = scores[None] - scores[:, None]  # [point, other, score]
    is_beaten = ((gains >= 0).all(2) & (gains > 0).any(2)).any(1)
    return pd.Series(~is_beaten, points.index)


def _collapses(result: Result) -> Sequence[str]:
    """Warn of gates whose weights hardly depend on the prompt; each sequence has its own gate."""
    cases = result.cases()
    layers = gate_records(cases, "basis", "rewrite")
    groups: dict[int, list[torch.Tensor]] = {layer: [] for layer in layers}
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


def _imbalances(balance: pd.DataFrame) -> Sequence[str]:
    """Warn of layers where a few bases carry nearly all weight."""
    if balance.empty:
        return ()
    shares = balance.groupby("layer")["top_share"].mean()
    return imbalance_warnings(shares.to_dict(), balance["rank"].max())


def _no_separation(separation: pd.DataFrame) -> list[str]:
    """Warn of gates that do not tell edit prompts from irrelevant ones."""
    if separation.empty or separation["is_open"].any():
        return []
    if (auc := separation["auc"].mean()) >= SMALL_AUC:
        return []
    return [
        f"no separation (mean AUC {auc:.2f}): no basis is open wider on edit prompts than on "
        "irrelevant ones, beyond chance: give the requests a loc_prompt of the kind that is to be "
        "kept, raise locality_coef, or gate_lr."
    ]


def _locality_falls(results: Sequence[Result]) -> list[str]:
    """Warn of rows whose Locality is worse after many edits than after few, beyond doubt."""
    scored: dict[str, list[Result]] = {}
    for result in results:
        if result.setting.batch_size == 1 and result.number("locality_acc_se") is not None:
            scored.setdefault(result.method, []).append(result)
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


def _balance_tables(balance: pd.DataFrame) -> list[Table]:
    """Return one table of all rows."""
    if balance.empty:
        return []
    layers = sorted(balance["layer"].unique())
    rows = {}
    for row, found in balance.groupby("row", sort=False):
        by_layer = found.groupby("layer")["variation"].mean()
        sequences = found.groupby("sequence")["variation"].mean()
        rows[row] = [
            Cell(len(sequences)),
            *(Cell(by_layer.get(layer)) for layer in layers),
            Cell(sequences.mean(), _known(sequences.sem())),
            Cell(found["top_share"].mean()),
        ]
    titles = [*(f"layer {layer}" for layer in layers), "all layers", "share of the largest quarter"]
    columns = [_column("sequences", 0), *map(_column, titles)]
    return [Table("Coefficient of variation of basis use", columns, rows)]


def _sweep_tables(sweeps: pd.DataFrame) -> list[Table]:
    """Return a table of each sweep, by strength."""
    columns = list(map(_column, ("R_loc strength", "Rel", "Loc", "front")))
    return [
        Table(
            str(title),
            columns,
            {
                p.method: [
                    Cell("preset" if isnan(p.strength) else f"{p.strength:g}"),
                    Cell(p.rewrite_acc, _known(p.rewrite_acc_se)),
                    Cell(p.locality_acc, _known(p.locality_acc_se)),
                    Cell("yes" if p.is_on_front else "no"),
                ]
                for p in points.itertuples()
            },
        )
        for title, points in sweeps.groupby("sweep", sort=False)
    ]


def _separation_tables(separation: pd.DataFrame) -> list[Table]:
    """Return one table of all rows."""
    if separation.empty:
        return []
    layers = sorted(separation["layer"].unique())
    rows = {
        row: [
            Cell(found["num_edit"].max()),
            Cell(found["num_irrelevant"].max()),
            Cell(found["edit_weight"].mean()),
            Cell(found["irrelevant_weight"].mean()),
            *(_auc_cell(found[found["layer"] == layer]) for layer in layers),
            _auc_cell(found),
            Cell(f"{found['is_reversed'].sum()} of {len(found)}"),
        ]
        for row, found in separation.groupby("row", sort=False)
    }
    columns = [
        *(_column(title, 0) for title in ("edit prompts", "irrelevant")),
        *(_column(title, 3) for title in ("edit weight", "irrelevant weight")),
        *(_column(f"layer {layer}") for layer in layers),
        *map(_column, ("all layers", "reversed")),
    ]
    return [Table("AUC of edit against irrelevant prompts", columns, rows)]


def _auc_cell(bases: pd.DataFrame) -> Cell:
    """Return the mean AUC of bases and how many of them are open wider on edit prompts."""
    if bases.empty:
        return Cell()
    return Cell(f"{bases['auc'].mean():.2f} ({bases['is_open'].sum()} of {len(bases)})")


def _column(title: str, decimals: int = 2) -> Column:
    """Return a column in which no value is best."""
    return Column(title, decimals, is_higher_better=None)


def _known(number: float | None) -> float | None:
    """Return a number of a frame; None for NaN."""
    return None if number is None or isnan(number) else number
