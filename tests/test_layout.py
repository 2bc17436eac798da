"""Packing: every token once, each sees its own text only, and little is padded."""

import pytest
import torch

from baft_easyedit.model.positions import edit_positions
from baft_easyedit.training.layout import Piece, lay_out, rounded
from baft_easyedit.training.requests import TextRow

HIDDEN = 64
LONG = TextRow(tuple(range(10, 40)), 26, is_edit=True)
SHORT = TextRow((1, 2, 3, 4, 5), 2, is_edit=True)
IRRELEVANT = TextRow((6, 7, 8, 9), 0, is_edit=False)


def pieces(*rows):
    return [Piece(row, max(0, row.prompt_length - 3)) for row in rows]


def test_every_computed_token_stands_somewhere_once():
    layout = lay_out([pieces(LONG, SHORT, IRRELEVANT)], 3, HIDDEN, "cpu")
    for i, piece in enumerate(pieces(LONG, SHORT, IRRELEVANT)):
        here = layout.row_of == i
        assert layout.input_ids[here].tolist() == list(piece.row.ids[piece.start :])
        assert layout.position_ids[here].tolist() == list(range(piece.start, len(piece.row.ids)))
        past = layout.past_row_of == i
        assert layout.past_position_ids[past].tolist() == list(range(piece.start))
    assert (layout.row_of >= 0).sum() == 7 + 5 + 4


def test_positions_are_those_of_the_rule():
    layout = lay_out([[Piece(row, 0) for row in (LONG, SHORT, IRRELEVANT)]], 3, None, "cpu")
    expected = edit_positions(layout.row_of >= 0, 30, 3, prompt_lengths=[26, 2, 0])
    assert torch.equal(layout.positions, expected)
    assert torch.equal(layout.edited.any(1), torch.tensor([True, True, False]))
    assert torch.equal(layout.irrelevant.any(1), torch.tensor([False, False, True]))


def test_columns_predict_the_answers_next_token():
    layout = lay_out([pieces(SHORT, IRRELEVANT, LONG)], 3, HIDDEN, "cpu")
    assert layout.labels.tolist() == [3, 4, 5, 36, 37, 38, 39]
    assert layout.label_rows.tolist() == [0, 0, 0, 2, 2, 2, 2]
    before = layout.input_ids.flatten()[layout.predicting]
    assert before.tolist() == [2, 3, 4, 35, 36, 37, 38]


@pytest.mark.parametrize("window", [None, 4])
def test_a_token_sees_its_own_past_only(window):
    layout = lay_out([pieces(LONG, SHORT, IRRELEVANT)], 3, HIDDEN, "cpu")
    seen = layout.attention(window)
    rows = torch.cat([layout.past_row_of, layout.row_of], 1)
    columns = torch.cat([layout.past_position_ids, layout.position_ids], 1)
    for b, column in (layout.row_of >= 0).nonzero().tolist():
        row, at = layout.row_of[b, column], int(layout.position_ids[b, column])
        assert (rows[b][seen[b, column]] == row).all()
        first = 0 if window is None else max(0, at + 1 - window)
        assert sorted(columns[b][seen[b, column]].tolist()) == list(range(first, at + 1))


def test_edits_get_as_many_bins_each():
    edits = [pieces(LONG, IRRELEVANT), pieces(SHORT, IRRELEVANT), pieces(SHORT, SHORT)]
    layout = lay_out(edits, 3, HIDDEN, "cpu")
    per_edit = layout.row_of.view(3, -1)
    for e in range(3):
        assert set(per_edit[e].tolist()) - {-1} == {2 * e, 2 * e + 1}
    assert layout.label_owners.tolist() == [0] * 4 + [1] * 3 + [2] * 6


def test_long_pasts_are_not_looked_at_by_all_rows():
    long = TextRow((1,) * 20_008, 20_003, is_edit=True)
    short = TextRow((1,) * 20_006, 20_003, is_edit=True)
    assert len(lay_out([pieces(long, short)], 3, HIDDEN, "cpu").bins) == 2
    assert len(lay_out([pieces(long, short)], 3, 100 * 4096, "cpu").bins) == 1


def test_little_is_padded():
    rows = [TextRow((1,) * n, 0, is_edit=True) for n in (30, 4, 5, 6, 7, 8, 3, 28)]
    layout = lay_out([pieces(*rows)], 3, 4096, "cpu")
    assert (layout.row_of >= 0).float().mean() > 0.9


def test_rounded_sizes_are_few():
    rows = [TextRow(tuple(range(n)), n - 2, is_edit=True) for n in range(6, 150)]
    layouts = [rounded(lay_out([pieces(row, IRRELEVANT)], 3, 10**6, "cpu")) for row in rows]
    assert {tuple(layout.input_ids.shape) for layout in layouts} == {(1, 32)}
    assert {layout.past_row_of.shape[1] for layout in layouts} == {64, 128, 192}
    assert {len(layout.labels) for layout in layouts} == {16}
    long = TextRow(tuple(range(300)), 150, is_edit=True)
    layout = rounded(lay_out([pieces(long)], 3, 10**6, "cpu"))
    assert (layout.input_ids.shape[1], layout.past_row_of.shape[1]) == (160, 192)
    assert len(layout.labels) == 160


def test_rounding_adds_nothing_but_padding():
    exact = lay_out([pieces(LONG, SHORT, IRRELEVANT)], 3, HIDDEN, "cpu")
    wide = rounded(exact)
    assert wide.input_ids.shape[1] % 32 == 0
    assert wide.past_row_of.shape[1] % 64 == 0
    assert len(wide.labels) % 16 == 0
    columns, past = exact.input_ids.shape[1], exact.past_row_of.shape[1]
    for name in ("input_ids", "position_ids", "row_of", "edited", "irrelevant"):
        assert torch.equal(getattr(wide, name)[:, :columns], getattr(exact, name))
    assert torch.equal(wide.past_row_of[:, :past], exact.past_row_of)
    assert (wide.row_of[:, columns:] == -1).all()
    assert (wide.past_row_of[:, past:] == -1).all()
    assert not wide.positions[:, columns:].any()
    num_answers = len(exact.labels)
    before = wide.input_ids.flatten()[wide.predicting]
    assert torch.equal(before[:num_answers], exact.input_ids.flatten()[exact.predicting])
    assert (wide.label_rows[num_answers:] == 3).all()
    assert (wide.label_owners[num_answers:] == 1).all()
    assert wide.attention().any(-1).all()
