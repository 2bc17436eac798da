"""The paper's protocols with EasyEdit's own evaluators."""

import importlib
import json

import pytest
import torch
from conftest import logits

from baft_easyedit import attached_edit
from baft_easyedit.easyedit.peers import peer_hparams
from baft_easyedit.easyedit.protocols import (
    Session,
    prepare_requests,
    run_continual,
    run_single,
)
from baft_easyedit.easyedit.records import RunResult, summarise

pytestmark = pytest.mark.easyedit


@pytest.fixture
def make_peer(host, model_path, tmp_path):
    def make(name, **overrides):
        from easyeditor import BaseEditor

        hparams, _ = peer_hparams(
            name, model_path, "cpu", tmp_path, host.generation, overrides=overrides
        )
        return BaseEditor.from_hparams(hparams)

    return make


def test_single_edits_score_and_restore(make_editor, requests):
    editor = make_editor()
    before = logits(editor, "The sky is")
    calls = []
    result = run_single(editor, requests, lambda *call: calls.append(call))
    assert (result.method, result.protocol, result.n) == ("BaFT", "single", 3)
    assert result.rewrite_acc == 1.0
    assert all(
        0 <= score <= 1
        for score in (result.rephrase_acc, result.locality_acc, result.portability_acc)
    )
    assert (result.num_restored, result.num_restores) == (3, 3)
    assert torch.equal(logits(editor, "The sky is"), before)
    assert [(done, total) for done, total, _ in calls] == [(1, 3), (2, 3), (3, 3)]
    assert [case["case_id"] for case in result.cases] == [0, 1, 2]
    assert result.edit_time_s > 0


def test_single_edits_count_our_parameters(make_editor, requests):
    editor = make_editor("ReFT")
    result = run_single(editor, requests[:1])
    assert result.trainable_parameters == 2 * (2 * 4 * 48 + 4)  # layers (R, A and b)


def test_continual_edits_are_scored_after_the_last_of_each_run(make_editor, requests):
    editor = make_editor()
    before = logits(editor, "The sky is")
    scored = []
    session_score = Session.post_score

    def post_score(self, edited, request, pre):
        scored.append(attached_edit(edited).snapshot())
        return session_score(self, edited, request, pre)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Session, "post_score", post_score)
        result = run_continual(editor, requests, 2)
    first, second, third = ([v.tolist() for v in state.values()] for state in scored)
    assert first == second  # both after the second edit
    assert third != second
    assert (result.protocol, result.n) == ("continual-2", 3)
    assert (result.num_restored, result.num_restores) == (2, 2)
    assert torch.equal(logits(editor, "The sky is"), before)


def test_one_edit_in_a_row_is_single(make_editor, requests):
    single = run_single(make_editor(), requests[:2])
    continual = run_continual(make_editor(), requests[:2], 1)
    for score in ("rewrite_acc", "rephrase_acc", "locality_acc", "portability_acc"):
        assert getattr(single, score) == getattr(continual, score)


def test_a_peer_runs_and_counts_the_weights_it_changed(make_peer, requests):
    result = run_single(make_peer("FT-L", num_steps=3), requests[:2])
    assert result.error is None
    assert (result.num_restored, result.num_restores) == (2, 2)
    assert result.trainable_parameters == 48 * 96


def test_lora_is_scored_without_dropout_and_restored(make_peer, requests):
    editor = make_peer("LoRA", num_steps=2)
    result = run_single(editor, requests[:2])
    assert (result.num_restored, result.num_restores) == (2, 2)
    assert result.trainable_parameters > 0
    assert "scored in eval mode" in result.notes


def test_a_model_that_is_not_restored_is_replaced(make_editor, requests, monkeypatch):
    editor = make_editor()
    before = logits(editor, "The sky is")
    original = editor.apply_algo

    def forgets(*args, **kwargs):
        return original(*args, **kwargs)[0], {}

    editor.apply_algo = forgets
    result = run_single(editor, requests[:2])
    assert (result.num_restored, result.num_restores) == (0, 2)
    assert any("2 of 2 times" in note for note in result.notes)
    assert torch.equal(logits(editor, "The sky is"), before)


def test_a_restore_that_fails_is_told_and_made_good(make_editor, requests):
    editor = make_editor()
    before = logits(editor, "The sky is")
    original = editor.apply_algo

    class Broken(dict):
        def items(self):
            raise RuntimeError("lost them")

    editor.apply_algo = lambda *args, **kwargs: (original(*args, **kwargs)[0], Broken())
    assert run_single(editor, requests[:1]).num_restored == 0
    assert torch.equal(logits(editor, "The sky is"), before)


def test_lora_edits_in_a_row_are_restored_or_made_good(make_peer, requests):
    result = run_continual(make_peer("LoRA", num_steps=2), requests, 2)
    assert (result.n, result.num_restores) == (3, 2)


def test_unverified_restores_are_told(make_editor, requests):
    result = run_single(make_editor(), requests[:1], verify=False)
    assert (result.num_restored, result.num_restores) == (None, None)
    assert "restores were not verified" in result.notes


def test_graces_targets_get_the_space_of_their_tokens(host, make_editor, requests):
    from baft_easyedit.easyedit.peer_fixes import scored_request

    editor = make_editor()
    assert scored_request(requests[0], editor) == requests[0]
    editor.alg_name = "GRACE"
    scored = scored_request(requests[0], editor)
    # With single bytes as tokens the target's own tokens end the text: nothing to put right.
    assert scored == requests[0]
    merged = type(
        "Merging", (), {"encode": lambda self, text, **_: text.replace(" ", " _").split()}
    )
    editor.tok = merged()
    scored = scored_request(requests[0], editor)
    assert scored["target_new"] == " Oslo"
    assert scored["locality"]["nq"] == {"prompt": ["The sky is"], "ground_truth": [" blue"]}
    assert requests[0]["target_new"] == "Oslo"


def test_wise_gets_a_text_that_is_no_probe(make_editor, requests):
    from baft_easyedit.easyedit.peer_fixes import edited_request

    editor = make_editor()
    assert "loc_prompt" not in edited_request(requests[0], editor)
    editor.alg_name = "WISE"
    assert "sky" not in edited_request(requests[0], editor)["loc_prompt"]
    for given in ("x", ["x", "y"]):
        assert edited_request({**requests[0], "loc_prompt": given}, editor)["loc_prompt"] == "x"


def test_requests_are_completed():
    (request,) = prepare_requests(
        [{"prompt": "a", "target_new": "b", "locality": {"x": None, "y": {"prompt": ""}}}]
    )
    assert request == {
        "ground_truth": None,
        "case_id": 0,
        "prompt": "a",
        "target_new": "b",
        "locality": {},
        "portability": {},
    }


def test_protocols_refuse_no_requests_and_no_edits(make_editor, requests):
    editor = make_editor()
    with pytest.raises(ValueError, match="requests must hold at least one request"):
        run_single(editor, [])
    with pytest.raises(ValueError, match="T must be at least 1; got 0"):
        run_continual(editor, requests, 0)


def test_results_survive_json(make_editor, requests):
    result = run_single(make_editor(), requests[:1])
    assert RunResult.from_dict(json.loads(json.dumps(result.to_dict()))) == result


def test_scores_are_means_over_probes_then_cases():
    cases = [
        {
            "edit_time_s": 1.0,
            "post": {
                "rewrite_acc": [1.0],
                "locality": {"a_acc": [1.0, 0.0], "b_acc": [1.0], "a_output": [[3]]},
            },
        },
        {"edit_time_s": 4.0, "post": {"rewrite_acc": [0.0], "locality": {"a_acc": [0.0]}}},
        {"edit_time_s": 2.0, "post": {"rewrite_acc": [0.5]}},
    ]
    scores = summarise(cases)
    assert scores["rewrite_acc"] == pytest.approx(0.5)
    assert scores["locality_acc"] == pytest.approx((0.75 + 0.0) / 2)
    assert scores["portability_acc"] is None
    assert scores["edit_time_s"] == 2.0
    assert scores["edit_time_mean_s"] == pytest.approx(7 / 3)


def test_each_case_is_scored_by_easyedit(host, make_editor, requests, monkeypatch):
    module = importlib.import_module("easyeditor.editors.editor")
    seen = []
    original = module.compute_edit_quality
    monkeypatch.setattr(
        module, "compute_edit_quality", lambda *a, **k: seen.append(a[4]) or original(*a, **k)
    )
    run_single(make_editor(num_steps=1), requests[:2])
    assert len(seen) == 4  # before and after each of two edits
