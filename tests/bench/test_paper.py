import pytest

from baft_easyedit.bench.layouts import PaperNumbers
from baft_easyedit.bench.protocol import Protocol
from baft_easyedit.bench.results import Result

PAPER = PaperNumbers()
MAIN, ABLATION = (1, 2), (4,)


def result(method="BaFT", model="Llama-2-7b-hf", dataset="zsre", T=100, batch_size=1):
    return Result(method, model, dataset, Protocol(T, batch_size), None, {}, None)


@pytest.mark.parametrize(
    ("cell", "tables", "printed"),
    [
        ({"T": 1000}, MAIN, ("0.63", "0.60", "0.98")),
        ({"T": 1, "model": "gemma-1.1-7b-it"}, MAIN, ("1.00", "0.84", "0.94")),
        ({}, MAIN, ("0.75", "0.70", "0.98")),
        ({}, ABLATION, ("0.73", "0.67", "0.98")),
        ({"method": "+ss-w&lr"}, ABLATION, ("0.67", "0.61", "0.99")),
        ({"model": "meta-llama/Llama-2-7b-chat-hf"}, MAIN, ("0.75", "0.70", "0.98")),
        ({"model": "Meta-Llama-3-8B-Instruct", "T": 10}, MAIN, ("0.89", "0.82", "0.95")),
        ({"model": "Llama-2-13b-hf"}, MAIN, ("", "", "")),
        ({"model": "Meta-Llama-3-8B"}, MAIN, ("", "", "")),
        ({"dataset": "wikibio"}, MAIN, ("", "", "")),
        ({"T": 20}, MAIN, ("", "", "")),
        ({"batch_size": 10}, MAIN, ("", "", "")),
    ],
)
def test_scores_are_those_that_the_paper_prints_for_the_cell(cell, tables, printed):
    names = ("rewrite_acc", "rephrase_acc", "locality_acc", "portability_acc")
    found = tuple(PAPER.score(result(**cell), name, tables) for name in names)
    assert found == (*printed, "")


@pytest.mark.parametrize(
    ("model", "hidden"),
    [("llama-2-7b", 4096), ("llama-3-8b-instruct", 4096), ("gemma-1.1-7b-it", 3072)],
)
def test_parameters_follow_from_the_method(model, hidden):
    # Table 6 prints Gemma's number for LLaMA-3: the formula tells them apart.
    reft = 4 * (2 * 12 * hidden + 12)
    for method, count in (("ReFT", reft), ("BaFT", reft + 4 * 13 * hidden)):
        assert PAPER.cost(result(method, model), "trainable_parameters") == f"{count:,}"


def test_seconds_are_those_of_the_paper():
    assert PAPER.cost(result(), "edit_time_s") == "13.5"
    assert PAPER.cost(result(model="gpt2"), "edit_time_s") == ""
