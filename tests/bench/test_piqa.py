import json

import pytest
import torch

from baft_easyedit.bench.piqa import PiqaItem, load_piqa, piqa_accuracy
from tests.conftest import random_edit

ITEMS = [
    PiqaItem(goal="How to open a jar", sol1="turn the lid", sol2="eat it all up at once", label=0),
    PiqaItem(goal="dresser", sol1="a", sol2="use a drawer", label=1),
    PiqaItem(goal="boil water", sol1="heat it", sol2="cool it", label=0),
]


def losses_one_by_one(model, tokenizer):
    """The same by transformers' own loss, one text at a time."""
    found = []
    for item in ITEMS:
        for solution in (item.sol1, item.sol2):
            ids = tokenizer(f"{item.goal} {solution}", return_tensors="pt")["input_ids"]
            labels = ids.clone()
            labels[:, : len(tokenizer(item.goal)["input_ids"])] = -100
            with torch.no_grad():
                found.append(model(input_ids=ids, labels=labels).loss.item())
    return torch.tensor(found).reshape(-1, 2)


@pytest.mark.parametrize("is_edited", [False, True])
def test_the_less_surprising_solution_is_chosen(model, tokenizer, is_edited):
    if is_edited:
        random_edit().attach(model)
    chosen = losses_one_by_one(model, tokenizer).argmin(-1)
    right = torch.tensor([item.label for item in ITEMS])
    expected = (chosen == right).float().mean().item()
    assert piqa_accuracy(model, tokenizer, ITEMS) == pytest.approx(expected)
    flipped = [item.model_copy(update={"label": 1 - item.label}) for item in ITEMS]
    assert piqa_accuracy(model, tokenizer, flipped) == pytest.approx(1 - expected)


@pytest.fixture
def piqa(tmp_path):
    """Write PIQA's two files; return their directory."""

    def write(questions, labels):
        lines = [q if isinstance(q, str) else json.dumps(q) for q in questions]
        (tmp_path / "valid.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        (tmp_path / "valid-labels.lst").write_text("\n".join(labels) + "\n")
        return tmp_path

    return write


QUESTION = {"goal": "to dry\u2028hands", "sol1": "use a towel ", "sol2": " use a brick"}


def test_piqa_joins_questions_with_their_labels(piqa):
    folder = piqa([json.dumps(QUESTION, ensure_ascii=False)] * 2, ["0", "1"])
    items, files = load_piqa(folder)
    assert [item.label for item in items] == [0, 1]
    assert items[0] == PiqaItem(
        goal="to dry\u2028hands", sol1="use a towel", sol2="use a brick", label=0
    )
    assert [file.name for file in files] == ["valid.jsonl", "valid-labels.lst"]
    assert load_piqa(folder / "valid.jsonl", limit=1) == (items[:1], files)


@pytest.mark.parametrize(
    ("questions", "labels", "error", "message"),
    [
        ([QUESTION], ["0", "1"], ValueError, r"a label for each of the 1 lines of.*; got 2"),
        ([QUESTION], ["2"], ValueError, r"valid\.jsonl, record 0: label: Input should be 0 or 1"),
        (["{"], ["0"], ValueError, r"valid\.jsonl, record 0 must be JSON"),
        (["[]"], ["0"], TypeError, r"valid\.jsonl, record 0 must be an object with goal.*got \[\]"),
        ([{**QUESTION, "sol2": " "}], ["0"], ValueError, r"record 0: sol2: String should have"),
    ],
)
def test_piqa_files_that_break_a_rule_are_errors(piqa, questions, labels, error, message):
    with pytest.raises(error, match=message):
        load_piqa(piqa(questions, labels))


def test_piqa_needs_as_many_items_as_asked_for(piqa):
    with pytest.raises(ValueError, match=r"limit must be in \[1, 1\] for piqa"):
        load_piqa(piqa([QUESTION], ["0"]), limit=2)
    with pytest.raises(FileNotFoundError, match=r"valid\.jsonl; there is none"):
        load_piqa("nowhere")
