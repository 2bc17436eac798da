import pytest

from baft_easyedit.bench.paper import read_paper_numbers
from baft_easyedit.bench.protocol import Protocol

PAPER = read_paper_numbers()
MAIN, ABLATION = (1, 2), (4,)


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("llama-2-7b", "llama-2-7b"),
        ("meta-llama/Llama-2-7b-hf", "llama-2-7b"),
        ("Llama-2-7b-chat-hf", "llama-2-7b"),
        ("meta-llama/Meta-Llama-3-8B-Instruct", "llama-3-8b-instruct"),
        ("google/gemma-1.1-7b-it", "gemma-1.1-7b-it"),
        ("Llama-2-13b-hf", None),
        ("Meta-Llama-3-8B", None),
        ("Llama-3.1-8B-Instruct", None),
        ("facts-llama", None),
    ],
)
def test_models_are_matched_by_name(name, family):
    assert PAPER.family(name) == family


def test_model_that_the_paper_did_not_use_is_refused():
    assert PAPER.check_model("meta-llama/Llama-2-7b-hf") == "llama-2-7b"
    with pytest.raises(ValueError, match=r"a model of the paper, llama-2-7b, .*; got 'gpt2'"):
        PAPER.check_model("gpt2")


def test_scores_are_those_of_the_paper():
    printed = PAPER.scores(MAIN, "llama-2-7b", "zsre", Protocol(1000))
    assert printed["BaFT"] == {"rewrite_acc": 0.63, "rephrase_acc": 0.60, "locality_acc": 0.98}
    assert printed["ReFT"]["locality_acc"] == 0.73
    single = PAPER.scores(MAIN, "gemma-1.1-7b-it", "zsre", Protocol())
    assert single["BaFT"]["rephrase_acc"] == 0.84


def test_ablation_has_scores_of_its_own():
    main = PAPER.scores(MAIN, "llama-2-7b", "zsre", Protocol(100))
    ablation = PAPER.scores(ABLATION, "llama-2-7b", "zsre", Protocol(100))
    assert (main["BaFT"]["rewrite_acc"], ablation["BaFT"]["rewrite_acc"]) == (0.75, 0.73)
    assert list(ablation) == ["ReFT", "+ss-w", "+ba-w", "+ss-w&lr", "BaFT"]


@pytest.mark.parametrize(
    ("family", "dataset", "protocol"),
    [
        (None, "zsre", Protocol(100)),
        ("llama-2-7b", "wikibio", Protocol(100)),
        ("llama-2-7b", "zsre", Protocol(20)),
        ("llama-2-7b", "zsre", Protocol(100, 10)),
    ],
)
def test_cell_that_the_paper_lacks_has_no_scores(family, dataset, protocol):
    assert PAPER.scores(MAIN, family, dataset, protocol) == {}


def test_costs_are_those_of_the_paper():
    assert PAPER.costs("llama-2-7b")["BaFT"] == {
        "trainable_parameters": 606256,
        "edit_time_s": 13.5,
    }
    assert PAPER.costs("gemma-1.1-7b-it")["BaFT"]["trainable_parameters"] == 454704
    assert PAPER.costs(None) == {}


@pytest.mark.parametrize(
    ("family", "hidden"), [("llama-3-8b-instruct", 4096), ("gemma-1.1-7b-it", 3072)]
)
def test_parameters_follow_from_the_method(family, hidden):
    # Table 6 prints Gemma's number for LLaMA-3: the formula tells them apart.
    reft = 4 * (2 * 12 * hidden + 12)
    costs = PAPER.costs(family)
    assert costs["ReFT"]["trainable_parameters"] == reft
    assert costs["BaFT"]["trainable_parameters"] == reft + 4 * 13 * hidden
