import pytest

from baft_easyedit.bench.scores import kind_scores, metric_scores, row_costs, row_scores


def test_a_case_is_the_mean_over_keys_of_the_means_over_probes():
    scores = metric_scores(
        {
            "rewrite_acc": [1.0, 0.0],
            "locality": {"a_acc": [1.0, 0.0], "b_acc": [1.0], "a_output": [[3]]},
            "portability": {},
        }
    )
    assert scores == {
        "rewrite_acc": 0.5,
        "rephrase_acc": None,
        "locality_acc": 0.75,
        "portability_acc": None,
    }


def test_kinds_of_probes_are_told_apart():
    metrics = {
        "locality": {"Forgetfulness_acc": [1.0, 0.5], "Forgetfulness_output": [[3]]},
        "portability": {"reasoning_acc": [0.25], "none_acc": []},
    }
    assert kind_scores(metrics) == {
        "forced.Loc: Forgetfulness": 0.75,
        "forced.Por: reasoning": 0.25,
    }
    cases = [{"scores": {"forced.x": 1.0}}, {"scores": {"forced.x": 0.5, "wild.y": None}}]
    row = row_scores(cases)
    assert row["more"] == {"forced.x": 0.75, "forced.x_se": 0.25, "wild.y": None, "wild.y_se": None}


def test_a_row_is_the_mean_over_the_cases_that_have_the_score():
    cases = [{"scores": {"rewrite_acc": x, "gen_rewrite_acc": None}} for x in (1.0, 0.0, 0.5)]
    row = row_scores([*cases, {"scores": {"rephrase_acc": 1.0}}])
    assert row["rewrite_acc"] == 0.5
    assert row["rewrite_acc_se"] == pytest.approx(0.5 / 3**0.5)
    assert (row["rephrase_acc"], row["rephrase_acc_se"]) == (1.0, None)
    assert (row["gen_rewrite_acc"], row["locality_acc"]) == (None, None)


def test_costs_are_collected_from_chunks():
    chunk = {"trainable_parameters": 5, "peak_memory_bytes": 100, "restored": True}
    chunk["downstream"] = {"pre_acc": 0.5, "post_acc": 0.25}
    chunks = [
        {**chunk, "edit_times_s": [1.0, 9.0]},
        {**chunk, "edit_times_s": [2.0], "restored": False, "peak_memory_bytes": 300}
        | {"downstream": None},
    ]
    assert row_costs(chunks) == {
        "edit_time_s": 2.0,
        "peak_memory_bytes": 300,
        "trainable_parameters": 5,
        "num_restored": 1,
        "num_restores": 2,
        "downstream_acc": 0.25,
        "downstream_pre_acc": 0.5,
    }
    assert set(row_costs([]).values()) == {None}
