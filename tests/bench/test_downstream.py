import pytest
import torch

from baft_easyedit.bench.datasets import PiqaItem
from baft_easyedit.bench.downstream import piqa_accuracy
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


def test_no_questions_are_refused(model, tokenizer):
    with pytest.raises(ValueError, match="items must hold at least one question; got none"):
        piqa_accuracy(model, tokenizer, [])
