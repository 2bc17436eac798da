import itertools

import pytest

from baft_easyedit.bench.curves import Bin, Spread
from baft_easyedit.bench.figures import (
    batch_figure,
    cost_figure,
    method_styles,
    retention_figure,
    save_figure,
    update_figure,
    weight_figure,
)

METHODS = ["BaFT", "ReFT", *(f"Method-{i}" for i in range(22))]
STYLES = method_styles(METHODS)
TITLES = ("Reliability", "Generality", "Locality")
SPREAD = Spread([k / 12 for k in range(12, 0, -1)], [0.05] * 12)
LAYERS = (9, 18, 24, 28)


def of_every_method(value):
    return {title: {m: value(i) for i, m in enumerate(METHODS)} for title in TITLES}


FIGURES = {
    "update": lambda: update_figure(dict.fromkeys(LAYERS, SPREAD)),
    "weights": lambda: weight_figure(
        {layer: dict.fromkeys(("rewrite", "rephrase", "locality"), SPREAD) for layer in LAYERS}
    ),
    "batch": lambda: batch_figure(of_every_method(lambda i: {1: 0.9, 10: i / 24}), STYLES),
    "retention": lambda: retention_figure(
        of_every_method(lambda i: [Bin(100 * b, 100 * b + 99, i / 24, 1000) for b in range(10)]),
        STYLES,
    ),
    "cost": lambda: cost_figure(of_every_method(lambda i: (0.01 * 1.5**i, i / 24)), STYLES),
    "cost, all alike": lambda: cost_figure(of_every_method(lambda i: (0.61, 0.5)), STYLES),
}


@pytest.fixture(params=FIGURES)
def figure(request):
    drawn = FIGURES[request.param]()
    drawn.canvas.draw()
    return drawn


def boxes(texts):
    return [t.get_window_extent() for t in texts if t.get_text() and t.get_visible()]


def test_texts_do_not_overlap(figure):
    panels = [panel for panel in figure.axes if panel.get_visible()]
    for panel in panels:
        low, high = panel.get_xlim()
        ticks = zip(panel.get_xticks(), panel.get_xticklabels(), strict=True)
        labels = [label for place, label in ticks if low <= place <= high]
        assert labels
        texts = boxes([*labels, panel.xaxis.label, panel.title])
        assert not [1 for a, b in itertools.combinations(texts, 2) if a.overlaps(b)]


def test_legend_stands_beside_the_panels_and_in_the_picture(figure):
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert not [panel for panel in figure.axes if panel.get_window_extent().overlaps(box)]
    assert figure.bbox.y0 <= box.y0 < box.y1 <= figure.bbox.y1
    assert box.x1 <= figure.bbox.x1
    labels = [text.get_text() for text in legend.get_texts()]
    assert len(set(labels)) == len(labels) >= 3


def test_methods_look_different_and_ours_always_the_same():
    looks = {(s["color"], s["marker"], s["linestyle"]) for s in STYLES.values()}
    assert len(looks) == len(METHODS)
    ours = {name: STYLES[name] for name in ("BaFT", "ReFT")}
    colours = {STYLES[name]["color"] for name in METHODS[2:]}
    assert not colours & {style["color"] for style in ours.values()}
    assert method_styles(["ROME", "ReFT"]).items() >= ours.items()


def test_update_figure_draws_shares_and_their_sum():
    panel = update_figure({9: Spread([0.5, 0.3, 0.2], [0.0] * 3)}).axes[0]
    assert panel.get_title() == "layer 9"
    assert [bar.get_height() for bar in panel.patches] == [0.5, 0.3, 0.2]
    added, even = panel.lines
    assert list(added.get_ydata()) == pytest.approx([0.5, 0.8, 1.0])
    assert list(even.get_ydata()) == pytest.approx([1 / 3, 2 / 3, 1.0])


def test_weight_figure_passes_over_prompts_that_a_layer_lacks():
    panel = weight_figure({9: {"rewrite": SPREAD, "locality": SPREAD}}).axes[0]
    assert panel.get_legend_handles_labels()[1] == ["edit", "unrelated"]


def test_batch_figure_puts_a_method_at_its_own_batch_sizes():
    scores = {"Reliability": {"BaFT": {1: 0.9, 50: 0.5}, "ReFT": {10: 0.7, 50: 0.4}}}
    panel = batch_figure(scores, STYLES).axes[0]
    assert [label.get_text() for label in panel.get_xticklabels()] == ["1", "10", "50"]
    assert [list(line.get_xdata()) for line in panel.lines] == [[0, 2], [1, 2]]


def test_retention_figure_tells_the_number_of_cases():
    bins = {"BaFT": [Bin(0, 1, 1.0, 20), Bin(2, 3, 0.9, 20)], "ReFT": [Bin(0, 1, 0.8, 18)]}
    panel = retention_figure({"Reliability": bins}, STYLES).axes[0]
    assert [t.get_text() for t in panel.get_xticklabels()] == ["0–1\n(18–20)", "2–3\n(20)"]
    assert list(panel.lines[0].get_xdata()) == [0.5, 2.5]


def test_figure_is_written_as_png_and_pdf(tmp_path):
    png, pdf = save_figure(FIGURES["update"](), tmp_path, "figure1")
    assert (png.name, pdf.name) == ("figure1.png", "figure1.pdf")
    assert png.read_bytes().startswith(b"\x89PNG")
    assert pdf.read_bytes().startswith(b"%PDF")
