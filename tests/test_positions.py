import pytest
import torch

from baft_easyedit.model.inspect import CACHE_NAMES
from baft_easyedit.model.positions import (
    edit_positions,
    positions_of_call,
    real_tokens,
    says_nothing_of_prompts,
)


def mask(*rows):
    return torch.tensor([[c == "1" for c in row] for row in rows])


def forward(input_ids=None, attention_mask=None, past_key_values=None, labels=None):
    """Signature of a causal language model."""


@pytest.mark.parametrize(
    ("real", "num_new", "num_prompt_positions", "options", "expected"),
    [
        (["11111"], 5, 3, {}, ["00111"]),
        (["1111111"], 7, 3, {"prompt_lengths": [5]}, ["0011111"]),
        (["111111"], 6, 2, {"labels": torch.tensor([[-100] * 4 + [7, 8]])}, ["001111"]),
        # labels of padding do not count
        (["001111"], 6, 1, {"labels": torch.tensor([[9, 9, -100, -100, 7, 8]])}, ["000111"]),
        # new tokens on a cache are output; part of a prompt needs, and uses, its length
        (["0011111", "1111111"], 2, 3, {}, ["11", "11"]),
        (["1111111"], 3, 2, {"prompt_lengths": [7]}, ["011"]),
    ],
)
def test_the_rule(real, num_new, num_prompt_positions, options, expected):
    found = edit_positions(mask(*real), num_new, num_prompt_positions, **options)
    assert torch.equal(found, mask(*expected))


@pytest.mark.parametrize("given", ["lengths", "labels", "nothing"])
def test_padding_side_does_not_matter(given):
    left, right = mask("0011111", "1111111"), mask("1111100", "1111111")
    options = [{}, {}]
    if given == "lengths":
        options = [{"prompt_lengths": [4, 5]}] * 2
    if given == "labels":
        left_labels = torch.where(mask("0000001", "0000011"), 1, -100)
        right_labels = torch.where(mask("0000100", "0000011"), 1, -100)
        options = [{"labels": left_labels}, {"labels": right_labels}]
    a = edit_positions(left, 7, 2, **options[0])
    b = edit_positions(right, 7, 2, **options[1])
    assert torch.equal(a[0, 2:], b[0, :5])
    assert torch.equal(a[1], b[1])
    assert not (a & ~left).any()


def test_one_length_serves_all_rows_and_beams_repeat_each_row():
    real = mask("11111", "11111", "11111", "11111")
    assert torch.equal(edit_positions(real, 5, 1, prompt_lengths=[4])[3], mask("00011")[0])
    repeated = edit_positions(real, 5, 1, prompt_lengths=[4, 5])
    assert torch.equal(repeated, mask("00011", "00011", "00001", "00001"))


@pytest.mark.parametrize("lengths", [[], [3, 3]])
def test_lengths_that_do_not_fit_the_rows_are_refused(lengths):
    with pytest.raises(ValueError, match=rf"prompt_lengths has {len(lengths)} values.*3 rows"):
        edit_positions(mask("11", "11", "11"), 2, 1, prompt_lengths=lengths)


@pytest.mark.parametrize(
    "attention_mask",
    [
        torch.tensor([[0, 0, 1, 1, 1]]),
        torch.ones(5, 5).tril().bool().logical_and(mask("00111"))[None, None],
        torch.where(  # a static cache is longer
            torch.ones(5, 6).tril().bool() & mask("001111"), 0.0, -1e9
        )[None, None],
        {"sliding_attention": None, "full_attention": torch.tensor([[0, 0, 1, 1, 1]])},
    ],
    ids=["2d", "bool", "additive", "dict"],
)
def test_real_tokens_reads_every_mask_of_transformers(attention_mask):
    real = real_tokens(attention_mask, 1, 5, torch.device("cpu"))
    assert torch.equal(real, mask("00111"))


def prepared(real, window, num_new=None, attends_from_padding=False, num_columns=None):
    """The mask [B, 1, T, columns] that transformers prepares for a static cache."""
    total = real.shape[1]
    num_columns = num_columns or total
    row = torch.arange(total - (num_new or total), total)[:, None]
    column = torch.arange(num_columns)
    near = (column <= row) & (row - column < window)  # [T, columns]
    padded = torch.nn.functional.pad(real, (0, num_columns - total))
    sees = near & padded[:, None]
    if attends_from_padding:  # which torch's attention wants of rows that see nothing
        sees = sees | ~sees.any(-1, keepdim=True)
    return sees[:, None]


@pytest.mark.parametrize("attends_from_padding", [False, True])
@pytest.mark.parametrize("num_columns", [9, 12])
@pytest.mark.parametrize("window", [3, 100])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_prepared_mask_tells_padding_from_what_the_window_hides(
    attends_from_padding, num_columns, window, dtype
):
    real = mask("001111111", "111111111", "111110000"[::-1])
    given = prepared(real, window, None, attends_from_padding, num_columns)
    if dtype == torch.float32:
        given = torch.where(given, 0.0, -1e9)
    assert torch.equal(real_tokens(given, 3, 9, torch.device("cpu")), real)


@pytest.mark.parametrize("num_new", [1, 4])
def test_past_tokens_out_of_the_window_are_counted(num_new):
    real = mask("111111111")
    given = prepared(real, 3, num_new)
    assert torch.equal(real_tokens(given, 1, 9, torch.device("cpu")), real)


def test_padding_before_a_part_of_a_prompt_is_no_token():
    real = mask("001111111", "111111111")
    given = prepared(real, 100, 4)
    assert torch.equal(real_tokens(given, 2, 9, torch.device("cpu")), real)


def test_cache_of_a_window_has_the_last_columns():
    given = prepared(mask("11111"), 100, 1)
    assert torch.equal(real_tokens(given, 1, 9, torch.device("cpu")), mask("111111111"))


@pytest.mark.parametrize(("width", "expected"), [(9, "0111"), (7, "1111"), (12, "0000")])
def test_width_of_the_prompts_tells_where_they_end(width, expected):
    real = mask("111111111")
    assert torch.equal(edit_positions(real, 4, 3, prompt_width=width), mask(expected))
    padded = mask("001111111", "111111111")
    row = edit_positions(padded, 4, 3, prompt_width=width)[0]
    assert torch.equal(row, mask(expected)[0])


def test_mask_of_the_new_tokens_leaves_the_past_real():
    real = real_tokens(torch.tensor([[1, 0]]), 1, 5, torch.device("cpu"))
    assert torch.equal(real, mask("11110"))


def test_positional_arguments_of_the_model_are_understood():
    ids, attention_mask = torch.zeros(1, 4).long(), torch.tensor([[0, 1, 1, 1]])
    positions = positions_of_call(forward, (ids, attention_mask), {}, 2)
    assert torch.equal(positions, mask("0011"))


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_cache_given_as_tuples_is_understood(name):
    past = ((torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3, 8)),)
    ids = torch.zeros(1, 1).long()
    assert torch.equal(positions_of_call(forward, (), {"input_ids": ids, name: past}, 2), mask("1"))
    namespace = {}
    exec(f"def forward(input_ids, {name}): ...", namespace)
    assert torch.equal(positions_of_call(namespace["forward"], (ids, past), {}, 2), mask("1"))
    assert not says_nothing_of_prompts(forward, (), {"input_ids": torch.ones(1, 5), name: past}, 2)


@pytest.mark.parametrize(
    ("counted", "width", "is_edited"),
    [
        *((8, width, width >= 13) for width in (10, 12, 13, 15, 16)),  # in a window of 8
        *((0, width, width >= 13) for width in (10, 15, 16)),
        (8, None, True),
    ],
)
def test_mask_counts_what_a_cache_does_not(counted, width, is_edited):
    past = ((torch.zeros(1, 2, counted, 8),) * 2,)
    given = {} if width is None else {"attention_mask": torch.ones(1, width)}
    kwargs = {"input_ids": torch.ones(1, 1), "past_key_values": past, **given}
    positions = positions_of_call(forward, (), kwargs, 3, prompt_width=15)
    assert positions.tolist() == [[is_edited]]


def test_embeddings_stand_in_for_tokens_and_a_call_without_either_has_no_positions():
    kwargs = {"inputs_embeds": torch.zeros(1, 4, 8)}
    assert torch.equal(positions_of_call(forward, (), kwargs, 1), mask("0001"))
    assert positions_of_call(forward, (), {}, 1) is None
