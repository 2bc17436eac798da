import pytest

from baft_easyedit.bench.tables import (
    Cell,
    Column,
    Table,
    latex_text,
    markdown_text,
    to_latex,
    to_markdown,
)


def bold(values, **column):
    """Return which rows of a table with one column have a bold value."""
    rows = {str(i): [Cell(value)] for i, value in enumerate(values)}
    lines = to_markdown(Table("caption", [Column("Rel", **column)], rows)).splitlines()[4:]
    return ["**" in line for line in lines]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.5, 0.9, 0.7], [False, True, False]),
        ([0.901, 0.899, 0.7], [True, True, False]),  # both read 0.90
        ([None, 0.2, 0.3, "0.99"], [False, False, True, False]),
        ([0.2, 0.2], [False, False]),
        ([0.2, None], [False, False]),
    ],
)
def test_best_is_bold(values, expected):
    assert bold(values) == expected


def test_lower_is_better_where_the_column_says_so():
    assert bold([3.0, 1.0], is_higher_better=False) == [False, True]
    assert bold([3.0, 1.0], is_higher_better=None) == [False, False]


@pytest.fixture
def table():
    columns = [Column(name, heading=T) for T in ("T = 1", "T = 10") for name in ("Rel", "Gen")]
    rows = {
        "BaFT": [Cell(0.987, 0.012, "1.00"), Cell(0.9), Cell(0.8), Cell()],
        "WISE_x|y": [Cell(0.5), Cell(0.9), Cell("not run"), Cell()],
        "ROME": "50% done & killed_9",
        "MEMIT": f"ValueError: MEMIT is not in the release {'x' * 50} of EasyEdit, use a clone",
    }
    return Table("100% of *zsre*", columns, rows)


def test_markdown(table):
    caption, empty, *lines = to_markdown(table).splitlines()
    assert (caption, empty) == (r"**100% of \*zsre\***", "")
    cut = "not run: ValueError: MEMIT is not in the release…"
    assert [[text.strip() for text in line.strip("|").split(" | ")] for line in lines] == [
        ["method", "T = 1: Rel", "T = 1: Gen", "T = 10: Rel", "T = 10: Gen"],
        [":" + "-" * 8, "-" * 21 + ":", "-" * 9 + ":", "-" * 10 + ":", "-" * 10 + ":"],
        ["BaFT", "**0.99** ± 0.01 [1.00]", "0.90", "0.80", "–"],
        [r"WISE_x\|y", "0.50", "0.90", "not run", "–"],
        ["ROME", "not run: 50% done & killed_9", "", "", ""],
        ["MEMIT", cut, "", "", ""],
    ]
    assert len({len(line) for line in lines[:-2]}) == 1  # columns stand below each other


def test_latex(table):
    text = to_latex(table)
    assert r"\caption{100\% of *zsre*}" in text
    assert text.partition("\\toprule\n")[2].partition("\nMEMIT")[0].splitlines() == [
        r" & \multicolumn{2}{c}{T = 1} & \multicolumn{2}{c}{T = 10} \\",
        r"\cmidrule(lr){2-3}\cmidrule(lr){4-5}",
        r"method & Rel & Gen & Rel & Gen \\",
        r"\midrule",
        r"BaFT & \textbf{0.99} {\scriptsize $\pm$ 0.01} {\scriptsize [1.00]} & 0.90 & 0.80 & -- \\",
        r"WISE\_x|y & 0.50 & 0.90 & not run & -- \\",
        r"ROME & \multicolumn{4}{l}{\scriptsize not run: 50\% done \& killed\_9} \\",
    ]
    assert text.count("{") == text.count("}")


def test_numbers_have_the_decimals_of_their_column():
    table = Table("caption", [Column("parameters", 0)], {"BaFT": [Cell(606256.0)]})
    assert to_markdown(table).endswith(" 606,256 |")
    assert "606,256" in to_latex(table)
    assert "cmidrule" not in to_latex(table)  # groups without a heading need no rule


def test_texts_are_escaped_and_put_on_one_line():
    assert markdown_text("a|b\n*c* <d> `e`") == r"a\|b \*c\* \<d\> \`e\`"
    assert latex_text("a\n50% & $x_1 {#} \\ ~ ^ < > – ± …") == (
        r"a 50\% \& \$x\_1 \{\#\} \textbackslash{} \textasciitilde{} \textasciicircum{} "
        r"\textless{} \textgreater{} -- $\pm$ \ldots{}"
    )
