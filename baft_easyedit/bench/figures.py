"""Figures from plain numbers.

Every method has its own colour, marker and line, the same in all figures of a report; colours are
Paul Tol's `muted`, which colour-blind readers can tell apart. Legends stand beside the panels.
"""

from collections.abc import Mapping, Sequence
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from baft_easyedit.bench.curves import Bin, Spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Style = Mapping[str, Any]
"""Keywords of matplotlib: how a method is drawn."""

_BAFT, _REFT = "#CC6677", "#332288"
_COLOURS = (
    *("#117733", "#88CCEE", "#DDCC77", "#882255"),
    *("#44AA99", "#999933", "#AA4499", "#777777"),
)
_MARKERS = "D^v<>PXphd*"
_LINES = ("-", "--", ":", "-.")
_PROMPT_STYLES = {
    "rewrite": ("edit", _REFT, "o"),
    "rephrase": ("rephrasing", _COLOURS[4], "s"),
    "locality": ("unrelated", _BAFT, "^"),
}
_OURS: Mapping[str, Style] = {
    "BaFT": {"color": _BAFT, "marker": "o", "linestyle": "-", "linewidth": 2.2, "zorder": 5},
    "ReFT": {"color": _REFT, "marker": "s", "linestyle": "-", "linewidth": 2.2, "zorder": 4},
}
_PANEL = 2.6
"""Width and height of a panel, in inches."""
_LEGEND = 1.5
"""Width of a column of the legend, in inches."""
_ENTRIES = 14
"""Entries that fit in a column of the legend."""


def method_styles(methods: Sequence[str]) -> dict[str, Style]:
    """Return a style for each method; BaFT and ReFT always have the same one.

    Args:
        methods: Names, in the order of the tables.
    """
    others = [name for name in dict.fromkeys(methods) if name not in _OURS]
    return dict(_OURS) | {
        name: {
            "color": _COLOURS[i % len(_COLOURS)],
            "marker": _MARKERS[i % len(_MARKERS)],
            "linestyle": _LINES[i // len(_COLOURS) % len(_LINES)],
            "linewidth": 1.2,
            "zorder": 3,
        }
        for i, name in enumerate(others)
    }


def save_figure(figure: "Figure", out: Path, name: str) -> list[Path]:
    """Write a figure as `name.png` and `name.pdf`; return the files."""
    files = [out / f"{name}.{suffix}" for suffix in ("png", "pdf")]
    for file in files:
        figure.savefig(file, dpi=150)
    return files


def update_figure(shares: Mapping[int, Spread]) -> "Figure":
    """Draw how few bases carry an update (Liu et al. 2025, Fig. 1).

    Args:
        shares: By layer, the shares of r bases in the update's size, the largest first.
    """
    figure, panels = _panels([f"layer {layer}" for layer in shares])
    for panel, spread in zip(panels, shares.values(), strict=True):
        ranks = range(1, len(spread.mean) + 1)
        sums = [sum(spread.mean[:k]) for k in ranks]
        even = [k / len(ranks) for k in ranks]
        panel.bar(ranks, spread.mean, color=_COLOURS[1], label="share of a basis")
        panel.plot(ranks, sums, color=_REFT, marker="o", markersize=3, label="added up")
        panel.plot(
            ranks, even, color="black", linewidth=1, linestyle=":", label="if all were alike"
        )
        panel.set(xlabel="basis, largest first", ylim=(0, 1.03))
        _whole_numbers(panel)
    _finish(figure, panels, "share of the update")
    return figure


def weight_figure(weights: Mapping[int, Mapping[str, Spread]]) -> "Figure":
    """Draw how far the gate opens each basis on related and unrelated prompts (Fig. 2).

    Args:
        weights: By layer and kind of prompt, the weights of r bases.
    """
    figure, panels = _panels([f"layer {layer}" for layer in weights])
    for panel, by_prompt in zip(panels, weights.values(), strict=True):
        for shift, (prompt, (label, color, marker)) in enumerate(_PROMPT_STYLES.items(), -1):
            if (spread := by_prompt.get(prompt)) is not None:
                panel.errorbar(
                    [k + 0.22 * shift for k in range(1, len(spread.mean) + 1)],
                    spread.mean,
                    spread.deviation,
                    label=label,
                    color=color,
                    marker=marker,
                    markersize=3.5,
                    linestyle="none",
                    elinewidth=0.9,
                )
        panel.set(xlabel="basis", ylim=(-0.03, 1.03))
        _whole_numbers(panel)
    _finish(figure, panels, "weight w(h)")
    return figure


def batch_figure(
    scores: Mapping[str, Mapping[str, Mapping[int, float]]], styles: Mapping[str, Style]
) -> "Figure":
    """Draw scores against the size of a batch (Fig. 3).

    Args:
        scores: By name of the score and method, the score at each batch size.
        styles: How methods are drawn.
    """
    figure, panels = _panels(list(scores))
    for panel, by_method in zip(panels, scores.values(), strict=True):
        sizes = sorted({size for values in by_method.values() for size in values})
        for method, values in by_method.items():
            places = [sizes.index(size) for size in sorted(values)]
            heights = [values[size] for size in sorted(values)]
            panel.plot(places, heights, label=method, markersize=5, **styles[method])
        panel.set_xticks(range(len(sizes)), [str(size) for size in sizes])
        panel.set(xlabel="records per edit call, B", ylim=(-0.03, 1.03))
        panel.set_xlim(-0.3, len(sizes) - 0.7)
    _finish(figure, panels, "score")
    return figure


def retention_figure(
    curves: Mapping[str, Mapping[str, Sequence[Bin]]], styles: Mapping[str, Style]
) -> "Figure":
    """Draw scores against the age of the edit.

    Args:
        curves: By name of the score and method, the bins.
        styles: How methods are drawn.
    """
    figure, panels = _panels(list(curves), width=1.9)
    for panel, by_method in zip(panels, curves.values(), strict=True):
        for method, bins in by_method.items():
            ages = [(b.youngest + b.oldest) / 2 for b in bins]
            panel.plot(ages, [b.mean for b in bins], label=method, markersize=4, **styles[method])
        longest = max(by_method.values(), key=len)
        ticks = [f"{_span(b)}\n({_counts(by_method, b.youngest)})" for b in longest]
        panel.set_xticks([(b.youngest + b.oldest) / 2 for b in longest], ticks, fontsize=7)
        panel.set(xlabel="edits made since, and (cases in the mean)", ylim=(-0.03, 1.03))
    _finish(figure, panels, "score")
    return figure


def _span(ages: Bin) -> str:
    """Return the ages of a bin as text."""
    return str(ages.oldest) if ages.youngest == ages.oldest else f"{ages.youngest}–{ages.oldest}"


def _counts(by_method: Mapping[str, Sequence[Bin]], youngest: int) -> str:
    """Return how many cases are in a bin, of the method with fewest and with most."""
    counts = {b.count for bins in by_method.values() for b in bins if b.youngest == youngest}
    return str(max(counts)) if len(counts) == 1 else f"{min(counts)}–{max(counts)}"


def cost_figure(
    points: Mapping[str, Mapping[str, tuple[float, float]]], styles: Mapping[str, Style]
) -> "Figure":
    """Draw scores against the seconds of an edit.

    Args:
        points: By name of the score and method, seconds above 0 and score.
        styles: How methods are drawn.
    """
    figure, panels = _panels(list(points))
    for panel, by_method in zip(panels, points.values(), strict=True):
        for method, (seconds, score) in by_method.items():
            look = {**styles[method], "linestyle": "none", "markeredgecolor": "white"}
            panel.plot(seconds, score, label=method, markersize=9, **look)
        panel.set(xlabel="seconds per edit", xscale="log", ylim=(-0.03, 1.03))
        _plain_logarithms(panel, [seconds for seconds, _ in by_method.values()])
    _finish(figure, panels, "score")
    return figure


def _panels(titles: Sequence[str], width: float = 1.0) -> "tuple[Figure, list[Axes]]":
    """Return a figure and a titled panel for each title, at most four in a row."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(4, len(titles))
    rows = ceil(len(titles) / columns)
    size = (_PANEL * width * columns + _LEGEND, _PANEL * rows + 0.4)
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)  # draws without a display, and without pyplot's global state
    panels = list(figure.subplots(rows, columns, squeeze=False, sharey=True).flat)
    for panel in panels[len(titles) :]:
        panel.set_visible(False)
    for panel, title in zip(panels, titles, strict=False):
        panel.set_title(title, fontsize=10)
        panel.grid(alpha=0.3, linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize=8)
    return figure, panels[: len(titles)]


def _finish(figure: "Figure", panels: "Sequence[Axes]", ylabel: str) -> None:
    """Label the vertical axis, and put one legend for all panels to their right."""
    figure.supylabel(ylabel, fontsize=10)
    entries: dict[str, Any] = {}
    for panel in panels:
        handles, labels = panel.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    columns = ceil(len(entries) / _ENTRIES)
    width, height = figure.get_size_inches()
    figure.set_size_inches(width + _LEGEND * (columns - 1), height)
    figure.legend(
        list(entries.values()),
        list(entries),
        loc="outside right center",
        ncols=columns,
        fontsize=8,
        frameon=False,
    )


def _whole_numbers(panel: "Axes") -> None:
    """Number the horizontal axis in whole numbers."""
    from matplotlib.ticker import MaxNLocator

    panel.xaxis.set_major_locator(MaxNLocator(integer=True))


def _plain_logarithms(panel: "Axes", values: Sequence[float]) -> None:
    """Number a logarithmic horizontal axis around some values with a few plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    lowest, highest = min(values) / 2, max(values) * 2  # room, so that there is a number at all
    panel.set_xlim(lowest, highest)
    steps = (1.0, 2.0, 5.0) if highest / lowest < 100 else (1.0,)
    panel.xaxis.set_major_locator(LogLocator(subs=steps))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.xaxis.set_minor_formatter(NullFormatter())
