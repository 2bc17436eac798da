"""Draw the results of one model on one data set: Figures 1 to 3 of the paper, and retention.

Every method has the same colour and marker in all figures. Shape: r bases of a layer.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import ceil
from typing import TYPE_CHECKING, Any

import numpy as np

from baft_easyedit.bench.layouts import in_order, protocol_title
from baft_easyedit.bench.results import Case, Result, gate_records
from baft_easyedit.bench.scores import TEACHER_FORCED
from baft_easyedit.hparams import OUR_METHODS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MIN_RETENTION_T = 10
"""Fewest edits in a row for which retention is drawn; also the most groups of edits there."""
_TITLES = dict(
    zip(TEACHER_FORCED, ("Reliability", "Generality", "Locality", "Portability"), strict=True)
)
_PROMPTS = {"rewrite": "edit", "rephrase": "rephrasing", "locality": "unrelated"}
_MARKERS = "os^Dv<>PXpd"  # 11 of them beside 10 colours: 110 methods look different
_UPDATES = (
    "Figure 1. Redundant bases of ReFT's updates, {title}. Bars: the share of a basis in the "
    "update's size, |v_k - (R h)_k| added up over the bases, on the edit prompts, sorted within "
    "each case, mean of {count} cases. Line: the shares added up. Dotted: the same if all bases "
    "moved h alike; the further the line lies above it, the fewer bases carry the update."
)
_WEIGHTS = (
    "Figure 2. Basis weights of BaFT, {title}, after the last edit, on the edit prompt, on its "
    "rephrasing and on unrelated prompts: mean and standard deviation over {count} cases."
)
_BATCHES = (
    "Figure 3. Teacher-forced scores against the number of records of an edit call, T = {T}, all "
    "scored after the last call."
)
_RETENTION = (
    "Retention, T = {T}: teacher-forced scores after the last edit, by the number of edits made "
    "after a case's own; means over up to {bins} groups of edits of about the same age."
)


def draw(results: Sequence[Result]) -> "Iterator[tuple[str, str, Figure]]":
    """Yield name, caption and figure of each figure that results of one model and data set make."""
    scored = in_order([result for result in results if result.error is None])
    looks = _looks([result.method for result in scored])
    yield from _bases(scored, "ReFT", "figure1-reft-update", _UPDATES)
    yield from _bases(scored, "BaFT", "figure2-baft-weights", _WEIGHTS)
    for T in dict.fromkeys(result.setting.T for result in scored):
        shown = [result for result in scored if result.setting.T == T]
        if len({result.setting.batch_size for result in shown}) > 1:
            caption = _BATCHES.format(T=T)
            yield f"figure3-batch-size-T{T}", caption, batch_figure(shown, looks)
    for T in dict.fromkeys(result.setting.T for result in scored):
        shown = [r for r in scored if r.setting.T == T and r.setting.batch_size == 1]
        if T >= MIN_RETENTION_T and shown:
            caption = _RETENTION.format(T=T, bins=MIN_RETENTION_T)
            yield f"retention-T{T}", caption, retention_figure(shown, looks)


def retention(cases: Iterable[Case], score: str, T: int) -> np.ndarray:
    """Return mean age and mean score in equally wide bins of ages, [bins, 2], of T edits in a row.

    The age of an edit is the number of edits made after it; cases without the score are skipped.
    """
    bins: dict[int, list[tuple[int, float]]] = {}
    for case in cases:
        if (value := case["scores"].get(score)) is not None:
            age = case["chunk_length"] - 1 - case["position"]
            bins.setdefault(age // ceil(T / MIN_RETENTION_T), []).append((age, value))
    return np.array([np.mean(bins[i], axis=0) for i in sorted(bins)]).reshape(-1, 2)


def _bases(
    results: Sequence[Result], method: str, name: str, caption: str
) -> "Iterator[tuple[str, str, Figure]]":
    """Draw the bases of a method's first result that has recorded some."""
    for result in results:
        cases = result.cases() if result.method == method else []
        figure = update_figure(cases) if method == "ReFT" else weight_figure(cases)
        if figure is not None:
            title = protocol_title(result.setting)
            yield name, caption.format(title=title, count=len(cases)), figure
            return


def update_figure(cases: Iterable[Case]) -> "Figure | None":
    """Draw how few bases carry an update (Liu et al. 2025, Fig. 1); None without records.

    Shares are sorted within each case, as each edit may use other bases.
    """
    shares = {}
    for layer, sizes in gate_records(cases, "update", "rewrite").items():
        moved = sizes[sizes.sum(1) > 0]
        if len(moved):
            shares[layer] = np.sort(moved / moved.sum(1, keepdims=True))[:, ::-1].mean(0)
    if not shares:
        return None
    figure, panels = _panels([f"layer {layer}" for layer in shares])
    for panel, share in zip(panels, shares.values(), strict=True):
        ranks = np.arange(1, len(share) + 1)
        panel.bar(ranks, share, color="tab:cyan", label="share of a basis")
        panel.plot(ranks, share.cumsum(), "o-", markersize=3, label="added up")
        panel.plot(ranks, ranks / len(share), "k:", linewidth=1, label="if all were alike")
        panel.set(xlabel="basis, largest first", ylim=(0, 1.03))
    return _finished(figure, panels, "share of the update")


def weight_figure(cases: Sequence[Case]) -> "Figure | None":
    """Draw how far the gate opens on each kind of prompt (Fig. 2); None without records."""
    weights = {prompt: gate_records(cases, "basis", prompt) for prompt in _PROMPTS}
    layers = sorted({layer for by_layer in weights.values() for layer in by_layer})
    if not layers:
        return None
    figure, panels = _panels([f"layer {layer}" for layer in layers])
    for panel, layer in zip(panels, layers, strict=True):
        for i, (prompt, label) in enumerate(_PROMPTS.items()):
            if (values := weights[prompt].get(layer)) is not None:
                places = np.arange(1, values.shape[1] + 1) + 0.22 * (i - 1)
                means, spread = values.mean(0), values.std(0)
                panel.errorbar(places, means, spread, fmt=_MARKERS[i], markersize=4, label=label)
        panel.set(xlabel="basis", ylim=(-0.03, 1.03))
    return _finished(figure, panels, "weight w(h)")


def _label(method: str) -> str:
    """Return a row's name as matplotlib shows it: no mathematics, and not hidden by a `_`."""
    shown = method.replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown


def batch_figure(results: Sequence[Result], looks: Mapping[str, Any]) -> "Figure":
    """Draw scores against the size of a batch (Fig. 3), of results with the same T."""
    names = [n for n in TEACHER_FORCED if any(r.number(n) is not None for r in results)]
    figure, panels = _panels([_TITLES[name] for name in names])
    for panel, name in zip(panels, names, strict=True):
        for method in dict.fromkeys(result.method for result in results):
            own = [r for r in results if r.method == method and r.number(name) is not None]
            sizes = [result.setting.batch_size for result in own]
            scores = [result.values[name] for result in own]
            panel.plot(sizes, scores, label=_label(method), **looks[method])
        panel.set(xlabel="records per edit call, B", xscale="log", ylim=(-0.03, 1.03))
        ticks = sorted({result.setting.batch_size for result in results})
        panel.set_xticks(ticks, [str(size) for size in ticks])
        panel.minorticks_off()
    return _finished(figure, panels, "score")


def retention_figure(results: Sequence[Result], looks: Mapping[str, Any]) -> "Figure":
    """Draw scores against the age of the edit, of results with the same T."""
    names = ("rewrite_acc", "rephrase_acc")
    figure, panels = _panels([_TITLES[name] for name in names], width=4.5)
    for result in results:
        cases = result.cases()
        for panel, name in zip(panels, names, strict=True):
            bins = retention(cases, name, result.setting.T)
            panel.plot(*bins.T, label=_label(result.method), **looks[result.method])
    for panel in panels:
        panel.set(xlabel="edits made since", ylim=(-0.03, 1.03))
    return _finished(figure, panels, "score")


def _looks(methods: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return how each method is drawn; BaFT and ReFT always the same, and more strongly."""
    return {
        method: {
            "color": f"C{i % 10}",
            "marker": _MARKERS[i % len(_MARKERS)],
            "markersize": 4,
            "linewidth": 2.2 if method in OUR_METHODS else 1.2,
            "zorder": 5 if method in OUR_METHODS else 3,
        }
        for i, method in enumerate(dict.fromkeys([*OUR_METHODS, *methods]))
    }


def _panels(titles: Sequence[str], width: float = 2.6) -> "tuple[Figure, list[Axes]]":
    """Return a figure and panels in a row, `width` inches wide each."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * len(titles) + 1.5, 3.0), layout="constrained")
    FigureCanvasAgg(figure)  # draws without a display, and without pyplot's global state
    panels = list(figure.subplots(1, len(titles), squeeze=False, sharey=True).flat)
    for panel, title in zip(panels, titles, strict=True):
        panel.set_title(title, fontsize=10)
        panel.grid(alpha=0.3, linewidth=0.6)
        panel.tick_params(labelsize=8)
    return figure, panels


def _finished(figure: "Figure", panels: "Sequence[Axes]", ylabel: str) -> "Figure":
    """Label the vertical axis, and put one legend for all panels to their right."""
    figure.supylabel(ylabel, fontsize=10)
    entries: dict[str, Any] = {}
    for panel in panels:
        handles, labels = panel.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    columns = ceil(len(entries) / 14)  # as many as fit below each other
    figure.set_figwidth(figure.get_figwidth() + 1.5 * (columns - 1))
    figure.legend(
        list(entries.values()), list(entries), loc="outside right center", ncols=columns, fontsize=8
    )
    return figure
