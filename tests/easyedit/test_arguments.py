"""Arguments of `BaseEditor`'s ways to edit mean the same in both generations of EasyEdit."""

import json

import pytest
import torch
from conftest import edit_arguments, logits

from baft_easyedit import BaFTEditor, BaFTHyperParams, attached_edit
from baft_easyedit.easyedit.arguments import prepare_requests, read_call, request_arguments
from tests.test_readme import blocks_of

PROBE = {"prompt": ["The sky is"] * 3, "ground_truth": ["blue"] * 3}
IRRELEVANT = "Water is wet"


@pytest.fixture
def learned(monkeypatch):
    """The requests of each edit call."""
    seen, edit = [], BaFTEditor.edit

    def noting(self, requests):
        seen.append(requests)
        return edit(self, requests)

    monkeypatch.setattr(BaFTEditor, "edit", noting)
    return seen


@pytest.fixture
def quick(make_editor):
    def make(method="BaFT", **overrides):
        return make_editor(method, num_steps=2, **overrides)

    return make


def is_edited(editor):
    return attached_edit(editor.model) is not None


# ---- README


@pytest.mark.easyedit
def test_the_readmes_script_does_what_it_says(host, make_hparams, learned, monkeypatch):
    (script,) = blocks_of("In an EasyEdit script")
    assert "llama-3-8b-instruct.yaml" in script
    monkeypatch.setattr(BaFTHyperParams, "from_hparams", lambda path: make_hparams())
    scope = {}
    exec(compile(script, "README", "exec"), scope)
    editor, (metric,) = scope["editor"], scope["metrics"]
    assert learned[0][0]["loc_prompt"] == "Who started the business IKEA? Ingvar Kamprad"
    assert metric["post"]["rewrite_acc"] == [1.0]
    assert not is_edited(editor)
    kept = script.replace("sequential_edit=False", "sequential_edit=True")
    exec(compile(kept, "README", "exec"), scope)
    assert is_edited(scope["editor"])


# ---- kept or undone


@pytest.mark.easyedit
@pytest.mark.parametrize(
    ("way", "options", "keeps"),
    [
        ("edit", {"sequential_edit": True}, True),
        ("edit", {"sequential_edit": False}, False),
        ("edit", {"keep_original_weight": True}, False),
        ("edit", {"keep_original_weight": False}, True),
        ("edit", {"sequential_edit": False, "keep_original_weight": False}, False),
        ("edit", {}, None),
        ("batch_edit", {"sequential_edit": True}, True),
        ("batch_edit", {"sequential_edit": False}, False),
        ("edit_requests", {"sequential_edit": False}, False),
    ],
)
def test_edits_are_kept_or_undone_as_asked(host, quick, requests, way, options, keeps):
    if keeps is None:  # as the host does by itself
        keeps = host.generation == "pypi"
    editor = quick("ReFT", **({"batch_size": 2} if way == "batch_edit" else {}))
    before = logits(editor, "The sky is")
    given = {"requests": requests} if way == "edit_requests" else edit_arguments(requests)
    metrics, _, weights_copy = getattr(editor, way)(**{**given, "verbose": False}, **options)
    assert [metric["requested_rewrite"]["prompt"] for metric in metrics] == [
        request["prompt"] for request in requests
    ]
    assert is_edited(editor) is keeps
    assert torch.equal(logits(editor, "The sky is"), before) is not keeps
    edited = logits(editor, "The sky is")
    assert not weights_copy.items()
    assert torch.equal(logits(editor, "The sky is"), edited)
    weights_copy()  # the latest edit, if it is there
    assert torch.equal(logits(editor, "The sky is"), edited) is not keeps


@pytest.mark.easyedit
@pytest.mark.parametrize("keeps", [False, True])
def test_edit_dataset_keeps_or_undoes_edits(host, quick, tmp_path, keeps):
    if host.generation == "current":
        pytest.skip("the current EasyEdit has no edit_dataset")
    from easyeditor import ZsreDataset

    record = {"src": "The sky is", "alt": "red", "answers": ["blue"], "rephrase": "Skies are"}
    record |= {"loc": "nq question: what is wet", "loc_ans": "water", "subject": "sky"}
    (tmp_path / "zsre.json").write_text(json.dumps([record] * 2))
    editor = quick()
    metrics, _, _ = editor.edit_dataset(
        ZsreDataset(str(tmp_path / "zsre.json")), verbose=False, sequential_edit=keeps
    )
    assert len(metrics) == 1  # of the last edit call, as the release does
    assert is_edited(editor) is keeps


@pytest.mark.easyedit
def test_an_edit_is_undone_if_its_scoring_fails(host, quick, requests, monkeypatch):
    editor = quick()
    before = logits(editor, "The sky is")
    calls = []

    def failing(*args, **kwargs):
        calls.append(args)
        if len(calls) > 4:  # before the edits, and after the first
            raise RuntimeError("no scores")
        return {"rewrite_acc": [0.0], "locality": {}, "portability": {}}

    monkeypatch.setattr("easyeditor.editors.editor.compute_edit_quality", failing)
    with pytest.raises(RuntimeError, match="no scores"):
        editor.edit(**edit_arguments(requests), sequential_edit=False)
    assert len(calls) == 5
    assert not is_edited(editor)
    assert torch.equal(logits(editor, "The sky is"), before)
    monkeypatch.undo()
    editor.edit(**edit_arguments(requests), sequential_edit=False)  # as if nothing had been


# ---- what requests are made of


@pytest.mark.easyedit
@pytest.mark.parametrize(("way", "container"), [("edit", list), ("batch_edit", tuple)])
def test_every_argument_reaches_the_requests(host, quick, requests, learned, way, container):
    editor = quick(**({"batch_size": 2} if way == "batch_edit" else {}))
    texts = [request["prompt"] for request in requests]
    metrics, _, _ = getattr(editor, way)(
        container(texts),
        container(request["target_new"] for request in requests),
        container(["Paris"] * 3),
        rephrase_prompts=container(["People vote in"] * 3),
        target_neg=container(["Bonn"] * 3),
        subject=container(request["subject"] for request in requests),
        loc_prompts=container([IRRELEVANT, "Ice is cold"]),
        locality_inputs={"nq": PROBE, "some": {**PROBE, "prompt": ["Tea is", None, None]}},
        portability_inputs={"hop": PROBE},
        eval_metric="token_em",
        train_ds=None,
        sequential_edit=False,
        verbose=False,
    )
    done = [request for batch in learned for request in batch]
    assert [request["prompt"] for request in done] == texts
    assert [request["subject"] for request in done] == [r["subject"] for r in requests]
    assert [r["loc_prompt"] for r in done] == [IRRELEVANT, "Ice is cold", IRRELEVANT]
    assert [sorted(r["locality"]) for r in done] == [["nq", "some"], ["nq"], ["nq"]]
    assert [sorted(r["portability"]) for r in done] == [["hop"]] * 3
    assert [request["ground_truth"] for request in done] == ["Paris"] * 3
    assert all("rephrase_acc" in metric["post"] for metric in metrics)
    assert len(learned) == (2 if way == "batch_edit" else 3)
    assert PROBE["prompt"] == ["The sky is"] * 3


def test_requests_are_completed():
    probes = {"x": None, "y": {"prompt": ""}}
    (request,) = prepare_requests([{"prompt": "a", "target_new": "b", "locality": probes}])
    added = {"ground_truth": None, "case_id": 0, "locality": {}, "portability": {}}
    assert request == {"prompt": "a", "target_new": "b", **added}


def test_what_is_none_is_left_out():
    given = dict.fromkeys(("subject", "loc_prompts", "rephrase_prompts", "locality_inputs"))
    assert request_arguments(
        {"prompts": "a", "target_new": "b", "ground_truth": None, **given}
    ) == {"prompts": ["a"], "target_new": ["b"]}


# ---- refusals


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"target_new": None}, TypeError, "target_new must be given"),
        ({"prompts": [], "target_new": []}, ValueError, "prompts must hold at least one prompt"),
        ({"prompts": 3}, TypeError, "prompts must be a text or a list of texts; got int"),
        ({"target_neg": ["c"]}, ValueError, "target_neg must have one entry for each .* got 1 for"),
        ({"subject": ["a", None]}, TypeError, "subject must be given for each prompt, or for none"),
        ({"loc_prompts": []}, ValueError, "loc_prompts must have at least one entry, and .* got 0"),
        ({"loc_prompts": ["c"] * 3}, ValueError, "loc_prompts must .* got 3 for 2 prompts"),
        ({"loc_prompts": [3, "c"]}, TypeError, "loc_prompt must be a string or a list of strings"),
        ({"target_new": ["b", " "]}, ValueError, "target_new must not be empty"),
        (
            {"prompts": ["Malm\u00f6"] * 2, "subject": ["Malmo\u0308"] * 2},
            ValueError,
            "Unicode form",
        ),
        (
            {"portability_inputs": {"hop": {"prompt": ["a"] * 2}}},
            ValueError,
            "have the key 'ground",
        ),
        (
            {"portability_inputs": {"hop": {"prompt": ["a"], "ground_truth": ["b"] * 2}}},
            ValueError,
            r"portability_inputs\['hop'\]\['prompt'\] must have one entry for each prompt",
        ),
        ({"locality_inputs": {"nq": ["c"]}}, TypeError, "locality_inputs must be a dict of dicts"),
    ],
)
def test_bad_requests_are_refused(change, error, message):
    good = {"prompts": ["aa", "ba"], "target_new": ["b", "d"]}
    with pytest.raises(error, match=message):
        request_arguments({**good, **change})


@pytest.mark.easyedit
@pytest.mark.parametrize(
    ("way", "options", "error", "message"),
    [
        ("edit", {"loc_prompt": "x"}, TypeError, "does not read 'loc_prompt'; it .*loc_prompts"),
        ("batch_edit", {"metric_kwargs": []}, TypeError, "does not read 'metric_kwargs'"),
        ("batch_edit", {"eval_metric": "ppl"}, ValueError, "eval_metric must be a token accuracy"),
        ("edit_requests", {"loc_prompts": ["x"]}, TypeError, "does not read 'loc_prompts'"),
        ("edit", {}, ValueError, r"batch_size must be 1 for edit\(\).* got 2: use batch"),
    ],
)
def test_what_easyedit_would_drop_is_refused(
    host, quick, requests, learned, way, options, error, message
):
    editor = quick(batch_size=1 if options else 2)
    given = {"requests": requests} if way == "edit_requests" else edit_arguments(requests)
    with pytest.raises(
        error, match=rf"{message}" if error is ValueError else rf"{way}\(\).*{message}"
    ):
        getattr(editor, way)(**given, **options)
    assert not learned
    assert not is_edited(editor)


@pytest.mark.easyedit
def test_perplexity_is_scored_where_it_can_be(host, quick, requests):
    editor, options = quick(), {"eval_metric": "ppl", "verbose": False}
    (metric,) = editor.edit_requests(requests[:1], sequential_edit=False, **options)[0]
    assert "rewrite_ppl" in metric["post"]
    given = {**edit_arguments(requests[:1]), **options}
    if host.generation == "pypi":
        with pytest.raises(
            ValueError, match=r"accuracy in edit\(\) of .*\(pypi\); got 'ppl': use ed"
        ):
            editor.edit(**given)
    else:
        assert "rewrite_ppl" in editor.edit(**given)[0][0]["post"]


@pytest.mark.easyedit
@pytest.mark.parametrize("given", [[], [{"prompt": "a"}], [{"prompt": "a", "target_new": " "}]])
def test_bad_requests_are_refused_before_the_first_is_edited(host, quick, requests, learned, given):
    with pytest.raises(ValueError, match=r"at least one request|must have the key|not be empty"):
        quick().edit_requests([*requests, *given] if given else [])
    assert not learned


def test_arguments_have_their_own_names():
    def edit(self, prompts, target_new, ground_truth=None, verbose=True, **kwargs):
        """Stand for EasyEdit's."""

    given = {"target_new": "b", "verbose": False}
    parts, keeps = read_call(edit, "current", ("a",), given, 1)
    assert parts == [
        {"prompts": ["a"], "target_new": ["b"], "verbose": False, "sequential_edit": False}
    ]
    assert not keeps
    with pytest.raises(TypeError, match=r"edit\(\) got multiple values for argument 'prompts'"):
        read_call(edit, "pypi", ("a",), {"prompts": "b"}, 1)
    with pytest.raises(TypeError, match="too many positional arguments"):
        read_call(edit, "pypi", range(9), {}, 1)
