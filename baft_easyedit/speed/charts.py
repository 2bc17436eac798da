"""Charts of a speed run: bars of what was measured, and a line plot for each sweep."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from baft_easyedit.bench.figures import method_styles
from baft_easyedit.speed.options import MEASURED_ENGINES, Row, swept_value

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from baft_easyedit.speed.report import RowResult, SpeedReport

_PANELS: Mapping[str, tuple[str, Callable[[float], float]]] = {
    "seconds per edit call": ("edit_s", float),
    "milliseconds per step": ("step_s", lambda value: value * 1e3),
    "peak memory above the model, MiB": ("peak_bytes", lambda value: value / (1 << 20)),
    "generation: edited / unedited speed": ("generation_ratio", float),
}
"""Of the bar chart: a name of `SpeedReport.summary`, and how it is scaled."""
_BAR = 0.32
"""Height of a bar with its gap, in inches."""


def write_charts(report: "SpeedReport", stem: Path) -> list[Path]:
    """Draw a run's charts.

    Args:
        report: What was measured.
        stem: Path of the files without what follows it: `.png`, or `-<sweep>.png`.

    Returns:
        The files.
    """
    measured = [r for r in report.rows if r.samples]
    sweeps = [sweep.what for sweep in report.options.sweeps]
    if not sweeps:
        return [_saved(bar_chart(report, measured), stem.with_name(f"{stem.name}.png"))]
    return [
        _saved(
            sweep_plot(what, [r for r in measured if r.row.sweep == what]),
            stem.with_name(f"{stem.name}-{what}.png"),
        )
        for what in sweeps
    ]


def bar_chart(report: "SpeedReport", rows: "Sequence[RowResult]") -> "Figure":
    """Draw what rows cost side by side, a bar each.

    Args:
        report: The run.
        rows: Those that were measured.
    """
    styles = method_styles([result.row.method for result in rows])
    figure = _figure(13.0, 1.3 + _BAR * len(rows))
    panels = figure.subplots(1, len(_PANELS), sharey=True)
    for panel, (title, (name, scaled)) in zip(panels, _PANELS.items(), strict=True):
        panel.set_title(title, fontsize=9)
        values = [report.summary(result)[name] for result in rows]
        for place, (result, value) in enumerate(zip(rows, values, strict=True)):
            look = _bar_style(result.row, styles[result.row.method])
            height = 0.0 if value is None else scaled(value)
            bar = panel.barh(place, height, height=0.7, **look)
            panel.bar_label(bar, ["-" if value is None else f"{height:.3g}"], padding=3, fontsize=8)
        _tidy(panel, "x")
        panel.margins(x=0.22)
    panels[0].set_yticks(range(len(rows)), [result.row.name for result in rows])
    panels[0].invert_yaxis()
    figure.suptitle(_caption(report), fontsize=9)
    return figure


def sweep_plot(what: str, rows: "Sequence[RowResult]") -> "Figure":
    """Draw the seconds of an edit call over the values of a sweep, a line for each method.

    Args:
        what: The swept setting.
        rows: The sweep's rows that were measured.
    """
    figure = _figure(4.6, 3.0)
    panel = figure.subplots()
    lines: dict[tuple[str, str | None], dict[int, float]] = {}
    for result in rows:
        line = lines.setdefault((result.row.method, result.row.engine), {})
        line[swept_value(result.row)] = result.median("edit_s") or 0.0
    several = {method for method, engine in lines if engine != MEASURED_ENGINES[0]}
    for (method, engine), points in lines.items():
        style = method_styles([method])[method]
        is_default = engine == MEASURED_ENGINES[0]
        look = {**style, "linestyle": "-" if is_default else "--", "markersize": 4}
        label = f"{method}-{engine}" if method in several else method
        panel.plot(list(points), list(points.values()), label=label, **look)
    panel.set(xscale="log", xlabel=what.replace("-", " "), ylabel="seconds per edit call", ylim=0)
    _whole_ticks(panel, sorted({swept_value(result.row) for result in rows}))
    _tidy(panel, "both")
    panel.legend(fontsize=8, frameon=False)
    return figure


def _figure(width: float, height: float) -> "Figure":
    """Return a figure that can be drawn without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _bar_style(row: Row, style: Mapping[str, Any]) -> dict[str, Any]:
    """Return how a row's bar is drawn: hatched for an engine that is not the default."""
    is_other = row.engine is not None and row.engine != MEASURED_ENGINES[0]
    return {
        "color": style["color"],
        "alpha": 0.55 if is_other else 1.0,
        "hatch": "///" if is_other else None,
        "edgecolor": "white",
    }


def _tidy(panel: "Axes", grid: Literal["x", "both"]) -> None:
    """Take away lines that say nothing."""
    panel.spines[["top", "right"]].set_visible(False)
    panel.tick_params(labelsize=8)
    panel.grid(axis=grid, alpha=0.3, linewidth=0.6)
    panel.set_axisbelow(True)


def _whole_ticks(panel: "Axes", values: Sequence[int]) -> None:
    """Number a logarithmic axis with the values that were measured, and no others."""
    panel.set_xticks(values, [str(value) for value in values])
    panel.set_xticks([], minor=True)


def _caption(report: "SpeedReport") -> str:
    """Say in a line what was measured."""
    o = report.options
    model = o.model or f"{o.shape_name} (random weights)"
    made_on = report.environment["hardware"]
    on_gpu = made_on["gpus"] and o.device != "cpu"
    place = made_on["gpus"][0] if on_gpu else f"CPU threads: {made_on['torch_threads']}"
    return f"{model}, {o.dtype}, {place}: {o.texts}, batch {o.batch_size}; medians of {o.repeats}"


def _saved(figure: "Figure", file: Path) -> Path:
    """Write a figure."""
    figure.savefig(file, dpi=150)
    return file
