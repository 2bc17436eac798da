"""Lay the texts of a step out in few rows of the model's batch, so that little padding is computed.

A bin is one row of the batch. It holds the computed tokens of several texts, one after another. The
attention mask lets each token attend only to its own text and that text's past (the columns before
the first computed token, whose keys and values `prefix_cache` has recorded). Without bins each text
would need a row as wide as the longest text::

    one text a row               two bins
    a a a a a a a a a a          a a a a a a a a a a
    b b b . . . . . . .          b b b c c d d d d .
    c c . . . . . . . .
    d d d d . . . . . .          '.': padding, computed for nothing

The mask of the second bin, here without a past (row: a token, column: what it may attend to)::

        b b b c c d d d d .
    b   x
    b   x x
    b   x x x
    c         x
    c         x x
    d             x
    ...

Needs torch only.

Shapes: E independent edits with as many bins each, B bins in all, W columns of a bin, S columns of
its past, A answer tokens, R rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from baft_easyedit.model.positions import first_edited
from baft_easyedit.training.requests import TextRow

_LINEAR_COST = 6
"""Cost of a token in a layer's weights (12 D^2 multiplications) over the cost of one column that
the token attends to (2 D), divided by D. The ratio weighs wider bins against more bins. A rough
value is enough, as all layouts give the same results."""

_PADDING = {
    **{"input_ids": 0, "position_ids": 0, "row_of": -1},
    **{"edited": False, "irrelevant": False},
}
"""The fields of a layout that are [B, W], and what stands in their padding."""
_PAST_PADDING = {"past_position_ids": 0, "past_row_of": -1}
"""Likewise of those that are [B, S]."""


_LEAST_COLUMNS, _LEAST_PAST, _LEAST_ANSWERS = 32, 64, 16
"""Of rounded layouts, W, S and A are multiples of these. A column of the past costs the least; an
answer costs a row of logits."""


class Piece(NamedTuple):
    """A row and its first computed column, `start`; the columns before it are the row's past."""

    row: TextRow
    start: int

    @property
    def length(self) -> int:
        """Number of computed columns."""
        return len(self.row.ids) - self.start


@dataclass(frozen=True)
class Layout:
    """The place of each computed token of all rows; all tensors are on one device."""

    num_edits: int
    """E."""
    rows: tuple[TextRow, ...]
    """R rows; the rows of one edit follow one another."""
    bins: tuple[tuple[int, ...], ...]
    """Indices of the rows in each bin, in the order of their columns."""
    input_ids: Tensor
    """[B, W], int64."""
    position_ids: Tensor
    """[B, W], int64, the position of each token in its own text."""
    row_of: Tensor
    """[B, W], int64, the index of each token's row."""
    past_position_ids: Tensor
    """[B, S], int64."""
    past_row_of: Tensor
    """[B, S], int64."""
    edited: Tensor
    """[B, W], True where the intervention applies to an edit."""
    irrelevant: Tensor
    """[B, W], True where the intervention applies to an irrelevant prompt."""
    predicting: Tensor
    """[A], int64, flat indices into [B, W] of the columns that predict answers, row by row."""
    labels: Tensor
    """[A], int64, the answer tokens."""
    label_rows: Tensor
    """[A], int64, the index of each answer token's row; R for a token that is padding."""
    label_owners: Tensor
    """[A], int64, the index of each answer token's edit; E for a token that is padding."""

    @property
    def positions(self) -> Tensor:
        """True where the intervention applies, [B, W]."""
        return self.edited | self.irrelevant

    def attention(self, window: int | None = None) -> Tensor:
        """Return which past and computed columns each token attends to, [B, W, S + W], bool.

        Args:
            window: Columns that a token sees in a sliding-window layer, its own included; None for
                all.
        """
        rows = torch.cat([self.past_row_of, self.row_of], 1)[:, None]  # [B, 1, S + W]
        columns = torch.cat([self.past_position_ids, self.position_ids], 1)[:, None]
        distance = self.position_ids[:, :, None] - columns  # [B, W, S + W]
        seen = (self.row_of[:, :, None] == rows) & (distance >= 0)
        return seen if window is None else seen & (distance < window)


def lay_out(
    edits: Sequence[Sequence[Piece]],
    num_prompt_positions: int,
    hidden_size: int | None,
    device: torch.device | str,
) -> Layout:
    """Place the tokens of each edit's pieces in bins.

    Args:
        edits: Pieces of each independent edit.
        num_prompt_positions: P.
        hidden_size: D of the model, which decides the cheapest number of bins; None for one bin a
            row, for rows without a past.
        device: Device of the tensors.
    """
    pieces = [piece for edit in edits for piece in edit]
    bins = _bins(edits, hidden_size)
    columns = [[_columns(i, pieces[i], num_prompt_positions) for i in load] for load in bins]

    def tensor(name: str, padding: int) -> Tensor:
        rows = [[value for row in parts for value in row[name]] for parts in columns]
        dtype = torch.bool if padding is False else torch.long
        values = [torch.tensor(row, dtype=dtype) for row in rows]
        return pad_sequence(values, batch_first=True, padding_value=padding).to(device)

    tensors = {name: tensor(name, padding) for name, padding in (_PADDING | _PAST_PADDING).items()}
    width = tensors["input_ids"].shape[1]
    predicting, labels, label_rows = _answers(pieces, bins, width).to(device)
    owners = [e for e, edit in enumerate(edits) for _ in edit]
    return Layout(
        num_edits=len(edits),
        rows=tuple(piece.row for piece in pieces),
        bins=bins,
        **tensors,
        predicting=predicting,
        labels=labels,
        label_rows=label_rows,
        label_owners=torch.tensor(owners).to(device)[label_rows],
    )


def _columns(i: int, piece: Piece, num_prompt_positions: int) -> dict[str, Sequence[int]]:
    """Return the contents of row i's columns by the names of `Layout`'s fields."""
    row, start = piece
    places = range(start, len(row.ids))
    nowhere = [False] * len(places)
    first = first_edited(row.prompt_length, num_prompt_positions)
    here = [place >= first for place in places]
    return {
        "input_ids": row.ids[start:],
        "position_ids": places,
        "row_of": [i] * len(places),
        "edited": here if row.is_edit else nowhere,
        "irrelevant": nowhere if row.is_edit else here,
        "past_position_ids": range(start),
        "past_row_of": [i] * start,
    }


def _answers(pieces: Sequence[Piece], bins: Sequence[Sequence[int]], width: int) -> Tensor:
    """Return `predicting`, `labels` and `label_rows` of a layout of W columns, [3, A]."""
    first = {}  # flat index in [B, W] of each row's token 0, which may lie in the past
    for b, load in enumerate(bins):
        column = b * width
        for i in load:
            first[i] = column - pieces[i].start
            column += pieces[i].length
    answers = [
        (first[i] + t - 1, row.ids[t], i)
        for i, (row, _) in enumerate(pieces)
        if row.is_edit
        for t in range(row.prompt_length, len(row.ids))
    ]
    return torch.tensor(answers, dtype=torch.long).view(-1, 3).mT


def rounded(layout: Layout) -> Layout:
    """Pad a layout to one of few sizes, so that edits of similar sizes replay one CUDA graph.

    A few tokens more cost nothing on a GPU, as reading the weights takes the time there.
    The added columns are padding, and the added answer tokens belong to no row and no edit.
    """
    num_answers = len(layout.labels)
    columns = _round_up(layout.input_ids.shape[1], _LEAST_COLUMNS, 8) - layout.input_ids.shape[1]
    past = _round_up(layout.past_row_of.shape[1], _LEAST_PAST, 4) - layout.past_row_of.shape[1]
    answers = _round_up(num_answers, _LEAST_ANSWERS, 4) - num_answers
    bins = torch.div(layout.predicting, layout.input_ids.shape[1], rounding_mode="floor")

    def again(values: Tensor) -> Tensor:  # repeats a column whose loss is surely finite
        return torch.cat([values, values[:1].expand(answers)])

    padded: dict[str, Any] = {
        name: F.pad(getattr(layout, name), (0, width), value=padding)
        for width, fields in ((columns, _PADDING), (past, _PAST_PADDING))
        for name, padding in fields.items()
    }
    return replace(
        layout,
        **padded,
        predicting=again(layout.predicting + bins * columns),
        labels=again(layout.labels),
        label_rows=F.pad(layout.label_rows, (0, answers), value=len(layout.rows)),
        label_owners=F.pad(layout.label_owners, (0, answers), value=layout.num_edits),
    )


def _round_up(size: int, least: int, parts: int) -> int:
    """Round up to a multiple of `least`, or, if larger, of `size`'s power of two / `parts`."""
    if not size:
        return 0
    step = max(least, 2 ** (size.bit_length() - 1) // parts)
    return -(-size // step) * step


def _bins(edits: Sequence[Sequence[Piece]], hidden_size: int | None) -> tuple[tuple[int, ...], ...]:
    """Distribute all pieces (by index) over equally many bins for each edit, at the lowest cost."""
    firsts = [0, *accumulate(map(len, edits))]
    if hidden_size is None:
        return tuple((i,) for i in range(firsts[-1]))
    most = max(map(len, edits))
    counts = {most, *(2**i for i in range(most.bit_length()) if 2**i < most)}
    layouts = [[_distribute(edit, count) for edit in edits] for count in sorted(counts)]

    def cost(layout: list[list[list[int]]]) -> int:
        loads = [(edit, load) for edit, loads in zip(edits, layout, strict=True) for load in loads]
        width = max(sum(edit[i].length for i in load) for edit, load in loads)
        past = max(sum(edit[i].start for i in load) for edit, load in loads)
        return len(loads) * width * (_LINEAR_COST * hidden_size + past + width)

    best = min(layouts, key=cost)
    at = zip(firsts, best, strict=False)
    return tuple(tuple(first + i for i in load) for first, loads in at for load in loads)


def _distribute(pieces: Sequence[Piece], num_bins: int) -> list[list[int]]:
    """Give each piece, the longest first, to the bin with the fewest columns so far."""
    loads: list[list[int]] = [[] for _ in range(num_bins)]
    sizes = [0] * num_bins
    for i in sorted(range(len(pieces)), key=lambda i: -pieces[i].length):
        b = sizes.index(min(sizes))
        loads[b].append(i)
        sizes[b] += pieces[i].length
    return loads
