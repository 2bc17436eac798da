from dataclasses import replace

import pytest

from baft_easyedit import BaFTHyperParams, ReFTHyperParams
from baft_easyedit.bench.methods import our_hparams
from baft_easyedit.demo.bundled import (
    DEMO_METHODS,
    _config,
    check_methods,
    compare,
    is_bundled,
    show_edits,
    tables,
)
from tests.conftest import save_tiny_llama


@pytest.fixture(scope="module")
def bundled_hparams():
    return BaFTHyperParams.from_hparams("BaFT/facts-llama")


def test_edits_are_shown_with_their_rephrasings_and_neighbours(bundled_hparams):
    lines = list(show_edits(bundled_hparams))
    edited = [line for line in lines if line.startswith("  edited")]
    assert len(edited) == 3
    for headline, line in zip(lines[::5], edited, strict=True):
        prompt, _, new = headline.strip().split("   ")[0].partition(" -> ")
        assert line.startswith(f"  edited     {prompt} ... ")
        assert line.endswith(f" -> {new}")
    assert sum(line.endswith("(as before)") for line in lines if "neighbour" in line) >= 2


@pytest.mark.easyedit
@pytest.mark.usefixtures("worker_here")
def test_comparison_runs_methods_through_easyedit_and_keeps_failures_as_rows(bundled_hparams):
    made = tables(compare(bundled_hparams, ["BaFT", "SERAC"], num_cases=2, num_jobs=1), 2)
    lines = "\n".join(made).splitlines()
    assert lines[1] == "**2 single edits**"
    assert lines[8] == "**the same, 2 edits in a row, scored after the last**"
    rows = [line for line in lines if line.startswith("| BaFT")]
    assert len(rows) == 2
    assert rows[0].split("|")[2].strip() == "1.00"
    assert "28,464" in rows[0]
    assert sum("SERAC" in line and "not run: " in line for line in lines) == 2


@pytest.mark.parametrize("method", [BaFTHyperParams, ReFTHyperParams])
def test_the_bundled_models_own_settings_are_so_however_it_is_loaded(method):
    own = method.from_hparams(f"{method.algorithm}/facts-llama", fp16=True, device=0)
    assert is_bundled(own)
    assert is_bundled(replace(own, fp16=False, device="cpu", model_parallel=True))
    assert not is_bundled(replace(own, rank=3))


@pytest.fixture(scope="module")
def other_model(tmp_path_factory):
    return str(save_tiny_llama(tmp_path_factory.mktemp("models")))


@pytest.mark.parametrize("bundled", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"rank": 3, "lr": 0.1, "seed": 4, "learn_end": True},
        {"rehearsal": 2, "rehearsal_irrelevant": 1, "rehearsal_memory": 3},
        {"past_states": 8, "use_chat_template": True},
        {"fp16": True, "batch_size": 5, "device": "cpu", "model_parallel": True},
        {"bf16": True},
    ],
    ids=lambda change: next(iter(change), "none"),
)
@pytest.mark.parametrize("method", [BaFTHyperParams, ReFTHyperParams])
def test_rows_are_of_the_given_hyper_parameters(method, bundled, change, other_model):
    hparams = method("bundled" if bundled else other_model, [0, 2], **change)
    config = _config(hparams, ("BaFT", "ReFT", "FT-L"), 4, (1, 4), 1)
    own = next(row for row in config.methods if row.method == method.algorithm)
    assert own.name == method.algorithm + ("+rehearsal" if "rehearsal" in change else "")
    for protocol in config.protocols:
        assert our_hparams(config, own, protocol) == replace(hparams, batch_size=1)
    assert (config.model, config.fp16) == (hparams.model_name, hparams.fp16)
    assert config.bf16 == hparams.bf16


def test_methods_are_checked():
    assert check_methods(()) == DEMO_METHODS
    assert check_methods(["BaFT", "GRACE"]) == ("BaFT", "GRACE")
    with pytest.raises(ValueError, match=r"method must be one of .*; got 'EDIT'"):
        check_methods(["EDIT"])


@pytest.mark.parametrize(("cases", "jobs", "name"), [(0, 1, "cases"), (1, 0, "jobs")])
def test_numbers_below_one_are_refused(bundled_hparams, cases, jobs, name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1; got 0"):
        compare(bundled_hparams, ["BaFT"], cases, jobs)
