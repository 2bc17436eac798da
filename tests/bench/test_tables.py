import pytest

from baft_easyedit.bench.tables import (
    Cell,
    Column,
    Group,
    Row,
    Table,
    latex_text,
    make_table,
    markdown_text,
    to_latex,
    to_markdown,
)

ONE_COLUMN = [Group("", (Column("Rel"),))]


def one_column(values, **column):
    rows = [Row(f"m{i}", (Cell(value),)) for i, value in enumerate(values)]
    return make_table("caption", [Group("", (Column("Rel", **column),))], rows)


def styles(table):
    return [row.cells[0].style for row in table.rows]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.5, 0.9, 0.7], ["plain", "best", "second"]),
        ([0.9, 0.9, 0.7, 0.7, 0.1], ["best", "best", "second", "second", "plain"]),
        ([0.901, 0.899, 0.7], ["best", "best", "second"]),  # both read 0.90
        ([None, 0.2, 0.3], ["plain", "second", "best"]),
        ([0.2, 0.2], ["plain", "plain"]),
        ([0.2, None], ["plain", "plain"]),
    ],
)
def test_best_and_second_are_marked(values, expected):
    assert styles(one_column(values)) == expected


def test_lower_is_better_where_the_column_says_so():
    table = one_column([3.0, 1.0, 2.0], is_higher_better=False)
    assert styles(table) == ["plain", "best", "second"]
    assert styles(one_column([3.0, 1.0], is_higher_better=None)) == ["plain", "plain"]


def test_texts_and_rows_with_errors_do_not_compete():
    rows = [
        Row("ours", (Cell(0.5),)),
        Row("theirs", (Cell(0.4),)),
        Row("failed", (), error="no memory"),
        Row("paper", (Cell(text="0.99"),)),
    ]
    table = make_table("caption", ONE_COLUMN, rows)
    assert [row.cells[0].style if row.cells else None for row in table.rows] == [
        "best",
        "second",
        None,
        "plain",
    ]


def test_row_must_fit_the_header():
    with pytest.raises(
        ValueError, match=r"row 'm' must have one cell for each of 1 columns; got 2"
    ):
        make_table("caption", ONE_COLUMN, [Row("m", (Cell(1.0), Cell(1.0)))])


@pytest.fixture
def table():
    scores = (Column("Rel"), Column("Gen"))
    header = [Group("T = 1", scores), Group("T = 10", scores)]
    rows = [
        Row("BaFT", (Cell(0.987, 0.012, "1.00"), Cell(0.9), Cell(0.8), Cell())),
        Row("WISE_x|y", (Cell(0.5), Cell(0.9), Cell(text="not run", marks=(2,)), Cell()), (1,)),
        Row("ROME", (), error="50% done & killed_9"),
    ]
    return make_table("100% of *zsre*", header, rows)


def test_markdown(table):
    caption, empty, *lines = to_markdown(table).splitlines()
    assert (caption, empty) == (r"**100% of \*zsre\***", "")
    assert [[text.strip() for text in line.strip("|").split(" | ")] for line in lines] == [
        ["method", "T = 1: Rel", "T = 1: Gen", "T = 10: Rel", "T = 10: Gen"],
        [":" + "-" * 20, "-" * 21 + ":", "-" * 9 + ":", "-" * 18 + ":", "-" * 10 + ":"],
        ["BaFT", "**0.99** ± 0.01 [1.00]", "0.90", "0.80", "–"],
        [r"WISE_x\|y<sup>1</sup>", "<u>0.50</u>", "0.90", "not run<sup>2</sup>", "–"],
        ["ROME", "not run: 50% done & killed_9", "", "", ""],
    ]
    assert len({len(line) for line in lines[:-1]}) == 1  # columns stand below each other


def test_latex(table):
    assert to_latex(table).splitlines() == [
        r"\begin{table}[ht]",
        r"\centering",
        r"\caption{100\% of *zsre*}",
        r"\medskip",
        r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
        r"\begin{tabular}{lrrrr}",
        r"\toprule",
        r" & \multicolumn{2}{c}{T = 1} & \multicolumn{2}{c}{T = 10} \\",
        r"\cmidrule(lr){2-3}\cmidrule(lr){4-5}",
        r"method & Rel & Gen & Rel & Gen \\",
        r"\midrule",
        r"BaFT & \textbf{0.99} {\scriptsize $\pm$ 0.01} {\scriptsize [1.00]} & 0.90 & 0.80 & -- \\",
        r"WISE\_x|y\textsuperscript{1} & \underline{0.50} & 0.90 & "
        r"not run\textsuperscript{2} & -- \\",
        r"ROME & \multicolumn{4}{l}{\scriptsize not run: 50\% done \& killed\_9} \\",
        r"\bottomrule",
        r"\end{tabular}}",
        r"\end{table}",
    ]


def test_numbers_have_the_decimals_of_their_column():
    header = (Group("", (Column("parameters", decimals=0),)),)
    table = Table("caption", header, (Row("BaFT", (Cell(606256.0),)),))
    assert to_markdown(table).endswith(" 606,256 |")
    assert "606,256" in to_latex(table)
    assert "cmidrule" not in to_latex(table)  # groups without a heading need no rule


def test_texts_are_escaped_and_put_on_one_line():
    assert markdown_text("a|b\n*c* <d> `e`") == r"a\|b \*c\* \<d\> \`e\`"
    assert latex_text("a\n50% & $x_1 {#} \\ ~ ^ < >") == (
        r"a 50\% \& \$x\_1 \{\#\} \textbackslash{} \textasciitilde{} \textasciicircum{} "
        r"\textless{} \textgreater{}"
    )
    assert latex_text("– ± × ≥ …") == r"-- $\pm$ $\times$ $\geq$ \ldots{}"
