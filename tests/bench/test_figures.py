import pytest
from synthetic import METHODS, write_run

from baft_easyedit.bench.figures import draw, retention, update_figure, weight_figure
from baft_easyedit.bench.results import read_run

PROTOCOLS = ("single", "continual-T20", "batched-B2-T1", "batched-B10-T20")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    names = {f"{method}-{i}" for method in METHODS for i in (1, 2)}
    methods = ["BaFT", "ReFT", *sorted(names)]
    run = write_run(
        tmp_path_factory.mktemp("run"), methods=methods, protocols=PROTOCOLS, num_cases=20
    )
    figures = {name: figure for name, _, figure in draw(read_run(run).results)}
    for figure in figures.values():
        figure.canvas.draw()
    return figures


def test_legend_stands_beside_the_panels_and_in_the_picture(drawn):
    for figure in drawn.values():
        box = figure.legends[0].get_window_extent()
        assert not [panel for panel in figure.axes if panel.get_window_extent().overlaps(box)]
        assert figure.bbox.y0 <= box.y0 < box.y1 <= figure.bbox.y1
        assert box.x1 <= figure.bbox.x1


def test_methods_look_different_and_alike_in_all_figures(drawn):
    looks = [
        {line.get_label(): (line.get_color(), line.get_marker()) for line in figure.axes[0].lines}
        for name, figure in drawn.items()
        if name.startswith(("figure3", "retention"))
    ]
    assert looks == [looks[0]] * 3
    assert len(set(looks[0].values())) == len(looks[0]) == 24


def test_updates_are_sorted_in_each_case_and_then_averaged():
    cases = [
        {"update": {"rewrite": {"3": [1.0, 3.0, 0.0]}, "locality": {"3": [9.0, 0.0, 0.0]}}},
        {"update": {"rewrite": {"3": [0.0, 1.0, 1.0]}}},
        {"update": {"rewrite": {"3": [0.0, 0.0, 0.0]}}},
        {"update": None},
    ]
    (panel,) = update_figure(cases).axes
    assert panel.get_title() == "layer 3"
    assert [bar.get_height() for bar in panel.patches] == [0.625, 0.375, 0]
    added, even = panel.lines
    assert list(added.get_ydata()) == pytest.approx([0.625, 1, 1])
    assert list(even.get_ydata()) == pytest.approx([1 / 3, 2 / 3, 1])
    assert update_figure(cases[2:]) is None


def test_weights_are_drawn_by_kind_of_prompt():
    cases = [
        {"basis": {"rewrite": {"9": [0.2, 1.0]}, "locality": {"9": [0.1, 0.1]}}},
        {"basis": {"rewrite": {"9": [0.4, 0.0]}, "rephrase": None}},
    ]
    (panel,) = weight_figure(cases).axes
    assert panel.get_legend_handles_labels()[1] == ["edit", "unrelated"]
    assert list(panel.lines[0].get_ydata()) == pytest.approx([0.3, 0.5])
    assert weight_figure([{"basis": None}]) is None


def test_batch_figure_puts_a_method_at_its_own_batch_sizes(tmp_path):
    rows = {("ReFT", "batched-B5-T1"): {"error": "no memory"}}
    options = {"methods": ["BaFT", "ReFT"], "num_cases": 10, "rows": rows}
    slugs = ("batched-B5-T1", "single", "batched-B10-T1")
    results = read_run(write_run(tmp_path, protocols=slugs, **options)).results
    (figure,) = [figure for name, _, figure in draw(results) if "figure3" in name]
    lines = figure.axes[0].lines
    assert [list(line.get_xdata()) for line in lines] == [[1, 5, 10], [1, 10]]
    assert [t.get_text() for t in figure.axes[0].get_xticklabels()] == ["1", "5", "10"]
    assert lines[0].get_ydata()[0] == results[1].values["rewrite_acc"]


def case(position, length, score):
    return {"position": position, "chunk_length": length, "scores": {"rewrite_acc": score}}


def test_retention_bins_by_the_edits_made_after_a_case():
    cases = [case(i, 20, i / 20) for i in range(20)]
    cases += [case(0, 1, 0.0), case(3, 20, None)]  # a short last chunk, and an unscored case
    bins = retention(cases, "rewrite_acc", T=20)
    assert bins[:, 0].tolist() == pytest.approx([1 / 3, *(2.5 + 2 * i for i in range(9))])
    assert bins[0, 1] == pytest.approx((19 + 18 + 0) / 20 / 3)  # the last edits
    assert len(retention([case(0, 1, None)], "rewrite_acc", T=10)) == 0
