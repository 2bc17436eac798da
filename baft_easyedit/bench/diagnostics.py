"""The paper's claims as checks of a run: do the gates do what they are there for?

`diagnose` reads a run's files and nothing else. It looks at the balance of basis use, Reliability
against Locality over the strength of R_loc, the separation of edit and irrelevant prompts, and for
signs of failure; `bench.diagnosis` holds what it finds. Shape: r rank.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import hypot, isnan, sqrt
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

import torch
from torch import Tensor

from baft_easyedit.bench.config import BenchConfig, MethodConfig, read_config
from baft_easyedit.bench.diagnosis import (
    Balance,
    BasisTest,
    Diagnosis,
    LayerBalance,
    LayerSeparation,
    LocalityPoint,
    LocalitySweep,
    RowFinding,
    Separation,
)
from baft_easyedit.bench.results import Result, read_run
from baft_easyedit.bench.store import RunDirectory
from baft_easyedit.method.gate_report import (
    coefficient_of_variation,
    collapse_warnings,
    imbalance_warnings,
    normalised_entropy,
    pooled_deviation,
    top_share,
)

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

_COMPARED = ("rewrite_acc", "rewrite_acc_se", "locality_acc", "locality_acc_se")


def diagnose(run_dir: Path) -> Diagnosis:
    """Check a run.

    Args:
        run_dir: A directory that `baft-easyedit bench` has written.

    Raises:
        ValueError: If it is not one, or one of its files cannot be read.
    """
    run, config_file = read_run(run_dir), RunDirectory(run_dir).config
    if not config_file.is_file():
        raise ValueError(
            f"{run_dir} is not the directory of a run: it has no config.yaml; give one that "
            "`baft-easyedit bench` wrote"
        )
    config = read_config(config_file)
    ours = {method.name for method in config.methods if method.method in ("BaFT", "ReFT")}
    results = sorted(
        (result for result in run.results if result.method in ours),
        key=lambda result: (result.setting.batch_size, result.setting.T),
    )
    rows, skipped = _gate_rows(results)
    balance, no_usage = _balance(rows)
    separation, untested = _separation(rows)
    sweeps, not_swept = _locality_sweeps(config, results)
    falls, not_compared = _locality_falls(results)
    return Diagnosis(
        run=run_dir.resolve().name,
        warnings=(*_gate_warnings(rows, balance, separation), *falls),
        balance=balance,
        sweeps=sweeps,
        separation=separation,
        remarks={
            "warnings": not_compared,
            "balance": (*skipped, *no_usage),
            "sweeps": not_swept,
            "separation": (*skipped, *untested),
        },
    )


class _Seen(NamedTuple):
    """Basis weights of one prompt in one layer."""

    chunk: int
    kind: str
    """`rewrite`, `rephrase` or `locality`."""
    layer: int
    weights: Tensor
    """[r], mean over the intervened positions."""


@dataclass(frozen=True)
class _GateRow(RowFinding):
    """What the gates of one row did."""

    seen: list[_Seen]
    usages: dict[int, Tensor]
    """wbar_k by layer, [chunks, r]."""

    @property
    def is_gated(self) -> bool:
        """Whether there are weights other than 1."""
        return any((seen.weights != 1).any() for seen in self.seen)

    @property
    def layers(self) -> list[int]:
        """The edited layers."""
        return sorted({seen.layer for seen in self.seen})

    def weights(self, kind: str, layer: int) -> Tensor:
        """Return the weights of one kind of prompt, [prompts, r]."""
        found = [s.weights for s in self.seen if s.kind == kind and s.layer == layer]
        return torch.stack(found) if found else torch.empty(0, 0)

    def by_chunk(self, layer: int) -> Iterator[Tensor]:
        """Yield the weights of all prompts that went through the same gate, [prompts, r]."""
        chunks: dict[int, list[Tensor]] = {}
        for seen in self.seen:
            if seen.layer == layer:
                chunks.setdefault(seen.chunk, []).append(seen.weights)
        return map(torch.stack, chunks.values())


def _gate_rows(results: Iterable[Result]) -> tuple[list[_GateRow], tuple[str, ...]]:
    """Read the rows with a gate; say which are skipped."""
    rows = [row for row in map(_read_gate_row, results) if row.seen]
    gated = [row for row in rows if row.is_gated]
    remarks = []
    ungated = "; ".join(row.name for row in rows if not row.is_gated)
    if ungated:
        remarks.append(f"Skipped, because all weights are 1 and ReFT has no gate: {ungated}.")
    if not gated:
        remarks.append(
            "No row has a gate with recorded basis weights: run BaFT, with `basis: true`."
        )
    return gated, tuple(remarks)


def _read_gate_row(result: Result) -> _GateRow:
    """Read the basis weights of one row from its complete chunks; all empty if there are none."""
    directory = RunDirectory(result.directory)
    chunks = {
        chunk["chunk"]: chunk["basis_usage"] or {}
        for chunk in directory.chunks_of(result.method, result.setting)
        if chunk["error"] is None
    }
    seen = [
        _Seen(case["chunk"], kind, int(layer), torch.tensor(weights, dtype=torch.float64))
        for case in directory.cases_of(result.method, result.setting)
        if case["chunk"] in chunks
        for kind, layers in (case["basis"] or {}).items()
        for layer, weights in (layers or {}).items()
    ]
    usages: dict[int, list[list[float]]] = {}
    for usage in chunks.values():
        for layer, weights in usage.items():
            usages.setdefault(int(layer), []).append(weights)
    tensors = {k: torch.tensor(u, dtype=torch.float64) for k, u in usages.items()}
    return _GateRow(result.method, result.setting.slug, seen, tensors)


def _balance(rows: Iterable[_GateRow]) -> tuple[tuple[Balance, ...], tuple[str, ...]]:
    """Sum up how each row uses its bases; name the rows of which that is not known."""
    found, remarks = [], []
    for row in rows:
        if not row.usages:
            remarks.append(f"{row.name}: its chunks have no basis_usage.")
            continue
        by_layer = [[coefficient_of_variation(w) for w in usage] for usage in row.usages.values()]
        means = [fmean(chunk) for chunk in zip(*by_layer, strict=True)]
        found.append(
            Balance(
                row.method,
                row.protocol,
                num_chunks=len(means),
                coefficient_of_variation=fmean(means),
                coefficient_of_variation_se=_standard_error(means),
                layers=tuple(_layer_balance(i, usage) for i, usage in row.usages.items()),
            )
        )
    return tuple(found), tuple(remarks)


def _standard_error(values: Sequence[float]) -> float | None:
    """Return the standard error of a mean; None for one value."""
    return stdev(values) / sqrt(len(values)) if len(values) > 1 else None


def _layer_balance(layer: int, usage: Tensor) -> LayerBalance:
    """Average one layer's figures of basis use, [chunks, r], over chunks."""
    return LayerBalance(
        layer,
        usage=tuple(usage.mean(0).tolist()),
        coefficient_of_variation=fmean(map(coefficient_of_variation, usage)),
        entropy=fmean(map(normalised_entropy, usage)),
        top_share=fmean(map(top_share, usage)),
    )


def _separation(rows: Iterable[_GateRow]) -> tuple[tuple[Separation, ...], tuple[str, ...]]:
    """Test each row's bases; name the rows with too few prompts."""
    found, remarks = [], []
    for row in rows:
        prompts = {i: (row.weights("rewrite", i), row.weights("locality", i)) for i in row.layers}
        num_edit, num_irrelevant = map(len, prompts[row.layers[0]])
        if min(num_edit, num_irrelevant) >= MIN_PROMPTS:
            tests = _layer_tests(prompts)
            found.append(Separation(row.method, row.protocol, num_edit, num_irrelevant, tests))
        else:
            remarks.append(
                f"{row.name}: not tested, with weights of {num_edit} edit and {num_irrelevant} "
                f"irrelevant prompts; {MIN_PROMPTS} of each are needed."
            )
    return tuple(found), tuple(remarks)


def _layer_tests(prompts: Mapping[int, tuple[Tensor, Tensor]]) -> tuple[LayerSeparation, ...]:
    """Test all bases on weights [prompts, r] of edit and irrelevant prompts, by layer."""
    from scipy.stats import false_discovery_control, mannwhitneyu

    pairs = [
        (layer, a.numpy(), b.numpy())
        for layer, (edit, irrelevant) in prompts.items()
        for a, b in zip(edit.T, irrelevant.T, strict=True)
    ]
    results = [mannwhitneyu(a, b) for _, a, b in pairs]
    # Weights that are all equal tell nothing: p is 1, for which scipy 1.18 gives nan.
    p_values = [1.0 if isnan(result.pvalue) else float(result.pvalue) for result in results]
    adjusted = false_discovery_control(p_values, method="bh")
    bases: dict[int, list[BasisTest]] = {layer: [] for layer in prompts}
    for (layer, a, b), result, p, adjusted_p in zip(
        pairs, results, p_values, adjusted, strict=True
    ):
        bases[layer].append(
            BasisTest(
                edit_weight=float(a.mean()),
                irrelevant_weight=float(b.mean()),
                auc=float(result.statistic) / (len(a) * len(b)),
                p_value=p,
                adjusted_p_value=float(adjusted_p),
            )
        )
    return tuple(LayerSeparation(layer, tuple(tests)) for layer, tests in bases.items())


def _locality_sweeps(
    config: BenchConfig, results: Iterable[Result]
) -> tuple[tuple[LocalitySweep, ...], tuple[str, ...]]:
    """Find the rows that differ in the strength of R_loc alone, and their Pareto fronts."""
    groups: dict[str, dict[str, float | None]] = {}
    for method in config.methods:
        if method.method == "BaFT":
            groups.setdefault(_all_but_locality(method), {})[method.name] = _strength(method)
    scored = [result for result in results if _is_scored(result)]
    sweeps = []
    for settings, strengths in groups.items():
        found = [result for result in scored if result.method in strengths]
        for setting in dict.fromkeys(result.setting for result in found):
            points = [result for result in found if result.setting == setting]
            if len({strengths[result.method] for result in points}) > 1:
                sweeps.append(LocalitySweep(setting.slug, settings, _points(points, strengths)))
    if sweeps:
        return tuple(sweeps), ()
    return (), (
        "No two scored rows of BaFT differ in R_loc alone: add rows to `methods`, such as {name: "
        "BaFT without R_loc, method: BaFT, set: {locality: false}} or {name: BaFT with 3 R_loc, "
        "method: BaFT, set: {locality_coef: 3}}.",
    )


def _all_but_locality(method: MethodConfig) -> str:
    """Name a method's settings other than whether and how strongly it uses R_loc."""
    settings = {"hparams": method.hparams} if method.hparams else {}
    settings |= {k: v for k, v in method.set.items() if k not in ("locality", "locality_coef")}
    return ", ".join(f"{name} {json.dumps(settings[name])}" for name in sorted(settings))


def _strength(method: MethodConfig) -> float | None:
    """Return the factor of R_loc; None if the preset decides."""
    return 0.0 if method.set.get("locality") is False else method.set.get("locality_coef")


def _is_scored(result: Result) -> bool:
    """Tell whether a result has the scores that are compared."""
    return None not in (result.number("rewrite_acc"), result.number("locality_acc"))


def _points(
    results: Sequence[Result], strengths: Mapping[str, float | None]
) -> tuple[LocalityPoint, ...]:
    """Return a sweep's results by strength, the preset's last."""
    points = [
        LocalityPoint(
            method=result.method,
            strength=strengths[result.method],
            **{name: result.values[name] for name in _COMPARED},
            is_on_front=not any(_dominates(other, result) for other in results),
        )
        for result in results
    ]
    return tuple(sorted(points, key=lambda p: (p.strength is None, p.strength or 0.0)))


def _dominates(result: Result, other: Result) -> bool:
    """Tell whether a result is at least as good in both scores, and better in one."""
    gains = [result.values[n] - other.values[n] for n in ("rewrite_acc", "locality_acc")]
    return min(gains) >= 0 and max(gains) > 0


def _gate_warnings(
    rows: Iterable[_GateRow], balance: Iterable[Balance], separation: Iterable[Separation]
) -> Iterator[str]:
    """Yield what looks wrong in the gates of each row."""
    for row in rows:
        for warning in collapse_warnings(
            {i: pooled_deviation(row.by_chunk(i)).tolist() for i in row.layers},
            {i: row.weights("rewrite", i).mean().item() for i in row.layers},
        ):
            yield f"{row.name}: {warning}"
    for used in balance:
        shares = {layer.layer: layer.top_share for layer in used.layers}
        for warning in imbalance_warnings(shares, len(used.layers[0].usage)):
            yield f"{used.name}: {warning}"
    mixed = "; ".join(
        f"{tested.name} (mean AUC {tested.mean_auc:.2f})"
        for tested in separation
        if tested.mean_auc < SMALL_AUC and not any(basis.is_open for basis in tested.bases)
    )
    if mixed:
        yield (
            f"no separation in {mixed}: no basis is open wider on edit prompts than on irrelevant "
            "ones, beyond chance: give the requests a loc_prompt of the kind that is to be kept, "
            "raise locality_coef, or gate_lr."
        )


def _locality_falls(results: Iterable[Result]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Warn of rows whose Locality falls with T; say if no row has two T."""
    found: dict[str, list[Result]] = {}
    for result in results:
        if result.setting.batch_size == 1 and _is_scored(result):
            found.setdefault(result.method, []).append(result)
    by_T = [sorted(row, key=lambda result: result.setting.T) for row in found.values()]
    ends = [(row[0], row[-1]) for row in by_T if len(row) > 1]
    if not ends:
        return (), ("Locality over T: no row of BaFT or ReFT was scored at more than one T.",)
    falls = "; ".join(_fall(*pair) for pair in ends if _is_fall(*pair))
    if not falls:
        return (), ()
    return (
        f"Locality falls with T: {falls}. Raise locality_coef, give each request more irrelevant "
        "prompts, or restore more often (ReFT has no such term: use BaFT). If the preset has other "
        "settings for single edits, they may be part of it.",
    ), ()


def _is_fall(few: Result, many: Result) -> bool:
    """Tell whether Locality after many edits is worse than after few, beyond doubt."""
    errors = [result.values["locality_acc_se"] for result in (few, many)]
    drop = few.values["locality_acc"] - many.values["locality_acc"]
    if None in errors:
        return False
    return drop > max(LOCALITY_DROP, NUM_STANDARD_ERRORS * hypot(*errors))


def _fall(few: Result, many: Result) -> str:
    """Say how Locality falls."""
    ends = [f"{r.values['locality_acc']:.2f} at T {r.setting.T}" for r in (few, many)]
    return f"{few.method} from {ends[0]} to {ends[1]}"
