import copy
from dataclasses import replace

import pytest
import torch

from baft_easyedit import BaFTEditor, ReFTHyperParams, attached_edit
from baft_easyedit.hparams import scaled_layers
from baft_easyedit.method.gates import GATES
from tests.conftest import HIDDEN, LAYERS, logits, make_model, random_edit

OTHER = {"prompt": "Water freezes into", "target_new": "ice"}


def answer(model, tokenizer, prompt="The capital of France is", num_tokens=5):
    inputs = tokenizer(prompt, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=num_tokens, do_sample=False, eos_token_id=None)
    return tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :])


def test_edit_writes_the_answer_that_the_model_did_not_give(
    model, tokenizer, hparams, request_dict
):
    assert answer(model, tokenizer) != " Rome"
    hparams = replace(hparams, early_stop_loss=0.1)
    report = BaFTEditor(model, tokenizer, hparams).edit(request_dict)
    assert answer(model, tokenizer) == " Rome"
    assert report.stopped_early
    assert report.final_loss < hparams.early_stop_loss
    assert len(report.losses) == report.num_steps + 1 <= hparams.num_steps
    assert report.losses[0].answer > report.final_loss
    assert report.losses[0].balance == pytest.approx(0, abs=1e-6)
    assert report.losses[0].locality > 0
    assert report.num_requests == 1
    assert report.time_s > 0


@pytest.mark.parametrize("gate", [g for g in GATES if g != "one"])
def test_every_gate_learns_an_edit(model, tokenizer, hparams, request_dict, gate):
    hparams = replace(hparams, gate=gate, early_stop_loss=0.1)
    BaFTEditor(model, tokenizer, hparams).edit(request_dict)
    assert answer(model, tokenizer) == " Rome"


def test_edit_of_every_family(family_model, tokenizer, hparams, request_dict):
    before = logits(family_model)
    editor = BaFTEditor(family_model, tokenizer, replace(hparams, num_steps=15))
    report = editor.edit(request_dict)
    assert report.final_loss < report.losses[0].answer - 0.5
    editor.undo()
    assert torch.equal(logits(family_model), before)


@pytest.mark.parametrize("absent", ["balance", "locality", "loc_prompt", "both"])
def test_each_term_can_be_switched_off(model, tokenizer, hparams, request_dict, absent):
    if absent == "both":
        hparams = ReFTHyperParams(model_name="tiny-llama", layers=[1, 3], device="cpu", rank=4)
    elif absent == "loc_prompt":
        del request_dict["loc_prompt"]
    else:
        hparams = replace(hparams, **{absent: False})
    editor = BaFTEditor(model, tokenizer, replace(hparams, num_steps=1))
    report = editor.edit(request_dict)
    losses = report.losses[0]
    assert (report.gates is None) is (absent == "both")
    assert (losses.balance is None) is (absent in ("balance", "both"))
    assert (losses.locality is None) is (absent != "balance")


def test_locality_closes_the_gate_on_irrelevant_prompts(model, tokenizer, hparams, request_dict):
    open_gate = {}
    for locality in (True, False):
        twin = copy.deepcopy(model)
        settings = replace(hparams, locality=locality, locality_coef=10.0, early_stop_loss=0.0)
        editor = BaFTEditor(twin, tokenizer, settings)
        editor.edit(request_dict)
        with editor.model_edit.recording() as record:
            logits(twin, **tokenizer(request_dict["loc_prompt"], return_tensors="pt"))
        open_gate[locality] = record.weights[1][record.positions].mean()
    assert open_gate[True] < 0.5 * open_gate[False]


def test_report_tells_what_the_gates_did(model, tokenizer, hparams, request_dict):
    editor = BaFTEditor(model, tokenizer, replace(hparams, early_stop_loss=0.0))
    gates = editor.edit(request_dict).gates
    assert set(gates.layers) == {1, 3}
    own = gates.layers[1]
    assert sum(own.edit_weights) > sum(own.irrelevant_weights)
    usage = editor.model_edit.usage(1)
    assert gates.layers[1].usage == pytest.approx((usage.total / usage.count).tolist())


def test_batch_is_learned_at_once(model, tokenizer, hparams, request_dict):
    other = {**OTHER, "target_new": "glass"}
    hparams = replace(hparams, num_steps=150, early_stop_loss=0.1)
    editor = BaFTEditor(model, tokenizer, hparams)
    report = editor.edit([request_dict, other])
    assert report.num_requests == 2
    assert answer(model, tokenizer) == " Rome"
    assert answer(model, tokenizer, "Water freezes into", 6) == " glass"


def test_edits_continue_from_what_is_learned(model, tokenizer, quick, request_dict):
    editor = BaFTEditor(model, tokenizer, quick)
    editor.edit(request_dict)
    once = logits(model)
    used = editor.model_edit.usage(1).count.item()
    editor.edit(OTHER)
    assert not torch.equal(logits(model), once)
    assert editor.model_edit.usage(1).count.item() == used + 3 + 4  # P, and " ice"
    editor.undo()
    assert torch.equal(logits(model), once)
    assert editor.model_edit.usage(1).count.item() == used


def bases(editor):
    """R of each layer, a copy."""
    return [editor.model_edit.intervention(i).basis.detach().clone() for i in (1, 3)]


def test_the_basis_learns_as_fast_in_the_40th_edit_as_in_the_first(model, tokenizer, hparams):
    """It stays orthonormal, or its steps would turn it ever less as it grows."""
    hparams = replace(hparams, num_steps=8, early_stop_loss=0.0)
    editor = BaFTEditor(model, tokenizer, hparams)
    turned, final_losses = [], []
    for n in range(40):
        before = bases(editor)
        report = editor.edit({"prompt": f"Number {n} is", "target_new": "one" if n % 2 else "two"})
        after = bases(editor)
        for old, new in zip(before, after, strict=True):
            assert torch.allclose(new @ new.mT, torch.eye(hparams.rank), atol=1e-5)
            assert torch.allclose(new.norm(dim=1), torch.ones(hparams.rank), atol=1e-5)
            angles = torch.linalg.svdvals(old @ new.mT).clamp(max=1).arccos()
            turned.append(float(angles.mean()))
        final_losses.append(report.final_loss)
    assert sum(turned[-20:]) > 0.7 * sum(turned[:20])
    assert sum(final_losses[-5:]) < 2 * sum(final_losses[:5])


def test_learning_apart_leaves_an_orthonormal_basis(model, tokenizer, hparams):
    editor = BaFTEditor(model, tokenizer, replace(hparams, num_steps=5, early_stop_loss=0.0))
    editor.install(editor.learn_apart([OTHER] * 3)[2])
    for basis in bases(editor):
        assert torch.allclose(basis @ basis.mT, torch.eye(hparams.rank), atol=1e-5)


def test_undo_is_bit_equal_and_the_next_edit_starts_afresh(model, tokenizer, quick, request_dict):
    before, weights = logits(model), copy.deepcopy(model.state_dict())
    editor = BaFTEditor(model, tokenizer, quick)
    first = editor.edit(request_dict)
    edited = logits(model)
    assert editor.is_attached
    editor.undo()
    assert torch.equal(logits(model), before)
    assert attached_edit(model) is None
    assert all(torch.equal(model.state_dict()[k], v) for k, v in weights.items())
    assert editor.edit(request_dict).losses == first.losses
    assert torch.equal(logits(model), edited)


def test_undo_goes_back_as_far_as_its_depth(model, tokenizer, hparams, request_dict):
    editor = BaFTEditor(model, tokenizer, replace(hparams, num_steps=1), undo_depth=2)
    for _ in range(3):
        editor.edit(request_dict)
    editor.undo()
    editor.undo()
    with pytest.raises(ValueError, match="there is no edit to undo"):
        editor.undo()
    assert editor.is_attached


def test_undo_of_a_change_that_is_not_the_latest_is_refused(model, tokenizer, quick, request_dict):
    before = logits(model)
    first = BaFTEditor(model, tokenizer, quick)
    first.edit(request_dict)
    second = BaFTEditor(model, tokenizer, quick)  # goes on with the edit of the first
    with pytest.raises(ValueError, match=r"no edit to undo: .*; the latest .* is the edit of 'The"):
        second.undo()
    once = logits(model)
    changes = {
        "the edit of 'Water freezes into'": lambda: second.edit(OTHER),
        "the edit of 'Water freezes into' and 1 more": lambda: second.edit([OTHER, request_dict]),
        "the install of 'Water freezes into'": lambda: second.install(
            second.learn_apart([OTHER])[0], OTHER
        ),
        "the install": lambda: second.install(second.learn_apart([OTHER])[0]),
    }
    for name, change in changes.items():
        change()
        changed, state = logits(model), first.model_edit.snapshot()
        rule = "an undo must take back the latest change of the model, but .* is"
        remedy = "by another editor: undo that first, .* or take the whole edit off"
        with pytest.raises(ValueError, match=f"{rule} {name}, {remedy}"):
            first.undo()
        assert torch.equal(logits(model), changed)
        now = first.model_edit.state_dict()
        assert all(torch.equal(now[key], value) for key, value in state.items())
        second.undo()
        assert torch.equal(logits(model), once)
    first.undo()
    assert torch.equal(logits(model), before)
    assert not len(first.model_edit.memory)


def test_undo_is_refused_after_a_change_by_other_means(model, tokenizer, quick, request_dict):
    editor = BaFTEditor(model, tokenizer, quick)
    editor.edit(request_dict)
    learned = editor.model_edit.snapshot()
    with torch.no_grad():
        editor.model_edit.intervention(1).source_bias.add_(1)
    changed = logits(model)
    with pytest.raises(ValueError, match=r"latest .*, but it was changed by other means than this"):
        editor.undo()
    assert torch.equal(logits(model), changed)
    editor.model_edit.restore(learned)
    editor.undo()
    assert not editor.is_attached


def test_undo_is_refused_while_another_edit_is_on_the_model(model, tokenizer, quick, request_dict):
    editor = BaFTEditor(model, tokenizer, quick)
    editor.edit(request_dict)
    editor.edit(request_dict)
    editor.model_edit.detach()
    editor.undo()  # a detached edit is no other state
    assert editor.is_attached
    editor.edit(request_dict)
    own = editor.model_edit.snapshot()
    editor.model_edit.detach()
    other = BaFTEditor(model, tokenizer, quick)
    other.edit(OTHER)
    edited = logits(model)
    with pytest.raises(ValueError, match="'Water freezes into', by another editor: undo that fir"):
        editor.undo()
    assert torch.equal(logits(model), edited)
    assert all(torch.equal(editor.model_edit.state_dict()[k], v) for k, v in own.items())
    other.undo()
    random_edit(layers=quick.layers).attach(model)
    with pytest.raises(ValueError, match="carries another edit, attached by other means"):
        editor.undo()
    attached_edit(model).detach()
    editor.undo()
    assert editor.is_attached


def test_what_holds_is_told(model, tokenizer, hparams, request_dict):
    editor, other = BaFTEditor(model, tokenizer, hparams), {"prompt": "Ice is", "target_new": "up"}
    before = editor.model_edit.snapshot()
    editor.check([request_dict, other])
    assert editor.holds([request_dict, other]) == [False, False]
    assert not editor.is_attached
    assert all(torch.equal(before[k], v) for k, v in editor.model_edit.snapshot().items())
    assert editor.edit(request_dict).learned == (True,)
    assert editor.holds([other, request_dict]) == [False, True]
    editor.undo()
    assert editor.holds([request_dict]) == [False]
    with pytest.raises(ValueError, match=r"request 'aaa.*fit the model's context"):
        editor.check([request_dict, {"prompt": "a" * 9999, "target_new": "b"}])


def test_copies_of_a_model_are_undone_apart(model, tokenizer, quick, request_dict):
    before = logits(model)
    editor = BaFTEditor(model, tokenizer, quick)
    editor.edit(request_dict)
    twin = copy.deepcopy(model)
    once, other = logits(twin), BaFTEditor(twin, tokenizer, quick)
    other.edit(OTHER)
    editor.undo()
    other.undo()
    assert torch.equal(logits(model), before)
    assert torch.equal(logits(twin), once)


@pytest.mark.parametrize(
    "change",
    [{"layers": [1]}, {"rank": 2}, {"gate": "sigmoid"}, {"num_prompt_positions": 1}],
    ids=lambda change: next(iter(change)),
)
def test_editor_of_another_shape_is_refused(model, tokenizer, hparams, change):
    random_edit(hparams.layers, hparams.rank, hparams.gate).attach(model)
    name = next(iter(change))
    with pytest.raises(ValueError, match=f"{name} must be .*, as in the edit that the model"):
        BaFTEditor(model, tokenizer, replace(hparams, **change))


def test_same_seed_gives_the_same_edit_and_another_seed_another(tokenizer, quick, request_dict):
    results = []
    for seed in (1, 1, 2):
        model = make_model()
        torch.manual_seed(len(results))  # the global generator plays no part
        BaFTEditor(model, tokenizer, quick, seed=seed).edit(request_dict)
        results.append(logits(model))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_gradients_reach_only_our_parameters_and_none_is_left(
    model, tokenizer, quick, request_dict
):
    model.train()
    model.lm_head.weight.requires_grad_(False)
    editor = BaFTEditor(model, tokenizer, quick)
    edit, weights = editor.model_edit, [p.clone() for p in model.parameters()]
    before = [p.detach().clone() for p in edit.parameters()]
    with torch.no_grad():
        editor.edit(request_dict)
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))
    assert not any(torch.equal(p, b) for p, b in zip(edit.parameters(), before, strict=True))
    assert all(p.grad is None for p in (*model.parameters(), *edit.parameters()))
    assert model.training
    assert not model.lm_head.weight.requires_grad
    assert model.model.embed_tokens.weight.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_model_gets_an_fp32_edit(tokenizer, hparams, request_dict, dtype):
    model = make_model(dtype=dtype)
    before = logits(model)
    editor = BaFTEditor(model, tokenizer, replace(hparams, early_stop_loss=0.1))
    editor.edit(request_dict)
    assert answer(model, tokenizer) == " Rome"
    assert {p.dtype for p in editor.model_edit.parameters()} == {torch.float32}
    assert logits(model).dtype == dtype
    editor.undo()
    assert torch.equal(logits(model), before)


def test_model_whose_weights_accelerate_keeps_elsewhere(tokenizer, hparams, request_dict):
    accelerate = pytest.importorskip("accelerate")
    plain, offloaded = make_model(), make_model()
    accelerate.cpu_offload(offloaded, execution_device=torch.device("cpu"))
    assert offloaded.model.embed_tokens.weight.is_meta
    hparams = replace(hparams, num_steps=3)
    reports = [BaFTEditor(m, tokenizer, hparams).edit(request_dict) for m in (plain, offloaded)]
    assert reports[0].losses == reports[1].losses


def test_loss_that_is_not_finite_is_named(model, tokenizer, hparams, request_dict):
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    editor = BaFTEditor(model, tokenizer, hparams)
    with pytest.raises(FloatingPointError, match="the answer loss became nan: the edit was undone"):
        editor.edit(request_dict)
    assert not editor.is_attached


def test_unusable_request_changes_nothing(model, tokenizer, hparams, request_dict):
    editor = BaFTEditor(model, tokenizer, hparams)
    with pytest.raises(ValueError, match="target_new must not be empty"):
        editor.edit([request_dict, {**request_dict, "target_new": ""}])
    with pytest.raises(ValueError, match=r"context of 256 tokens; the longest text has 2006"):
        editor.edit({"prompt": "a" * 2000, "target_new": "Rome"})
    assert not editor.is_attached


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"layers": [LAYERS]}, {}, f"layers must be below {LAYERS}"),
        ({"rank": HIDDEN + 1}, {}, rf"rank must be in \[1, {HIDDEN}\]"),
        ({}, {"undo_depth": 0}, "undo_depth must be at least 1; got 0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(model, tokenizer, hparams, change, options, message):
    with pytest.raises(ValueError, match=message):
        BaFTEditor(model, tokenizer, replace(hparams, **change), **options)


GUARDED = {"use_chat_template": True, "min_similarity": 0.5}
OPEN = GUARDED | {"min_similarity": None}
IN_TEMPLATE = "changes most other answers in the template"


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (GUARDED, None),
        (OPEN, IN_TEMPLATE),
        (OPEN | {"gate": "one"}, None),  # has no gates
        (OPEN | {"use_chat_template": False}, None),
    ],
)
def test_settings_that_leave_other_answers_open_are_told_once(
    model, tokenizer, hparams, given, told, caplog
):
    editor = BaFTEditor(model, tokenizer, replace(hparams, **given, layers="auto"))
    editor.hparams = replace(editor.hparams, num_steps=1)
    BaFTEditor(model, tokenizer, editor.hparams, edit=editor.model_edit)
    assert len(caplog.messages) == (told is not None)
    assert all(told in text for text in caplog.messages)


def test_automatic_layers_are_those_of_the_models_depth(
    model, tokenizer, quick, request_dict, tmp_path
):
    auto = replace(quick, layers="auto")
    with BaFTEditor.open(model, tokenizer, tmp_path / "kept", auto) as editor:
        editor.edit(request_dict)
        assert editor.model_edit.layers == tuple(scaled_layers(4)) == (1, 2, 3)
        editor.hparams = replace(auto, num_steps=1)
        assert editor.hparams.layers == [1, 2, 3]
    editor.model_edit.detach()
    with BaFTEditor.open(model, tokenizer, tmp_path / "kept", auto) as editor:
        assert editor.hparams.layers == [1, 2, 3]
    assert BaFTEditor(model, tokenizer, auto).model_edit is editor.model_edit  # goes on with it


def test_an_editor_learns_into_a_given_edit_of_its_shape(model, tokenizer, hparams, request_dict):
    edit = random_edit(layers=hparams.layers, rank=hparams.rank)
    editor = BaFTEditor(model, tokenizer, hparams, edit=edit)
    assert editor.model_edit is edit
    editor.edit(request_dict)
    with pytest.raises(ValueError, match="rank must be 4, as in the given edit; got 8"):
        BaFTEditor(make_model(), tokenizer, replace(hparams, rank=8), edit=edit)
    other = replace(hparams, min_similarity=0.5)
    with pytest.raises(ValueError, match="min_similarity must be None, as in the given edit"):
        BaFTEditor(make_model(), tokenizer, other, edit=edit)


def test_a_report_tells_which_requests_were_learned(model, tokenizer, hparams, caplog):
    requests = [
        {"prompt": "The capital of France is", "target_new": "R"},
        {"prompt": "Ice is", "target_new": "a long answer of many tokens, which takes more steps"},
    ]
    editor = BaFTEditor(model, tokenizer, hparams)
    assert editor.edit(requests[0]).learned == (True,)
    assert not caplog.messages
    editor.hparams = replace(hparams, num_steps=2)
    report = editor.edit(requests)  # one is known, and two steps do not teach the other
    assert report.learned == (True, False)
    (warning,) = caplog.messages
    assert "1 of 2 requests not learned in 2 steps: 'Ice is' -> 'a long answer" in warning


def test_what_greedy_decoding_gives_is_learned_whatever_its_loss(model, tokenizer, hparams):
    unsure = replace(hparams, early_stop_loss=0.0)
    editor = BaFTEditor(model, tokenizer, unsure)
    report = editor.edit({"prompt": "Ice is", "target_new": "hot"})
    assert report.num_steps == hparams.num_steps
    assert report.learned == (True,)
    assert answer(model, tokenizer, "Ice is", 4) == " hot"
    editor.hparams = replace(unsure, num_steps=1, lr=1e-9, early_stop_loss=100.0)
    assert editor.edit({"prompt": "Ice is", "target_new": "hot"}).learned == (True,)
    assert editor.edit({"prompt": "Ice is", "target_new": "wet"}).learned == (False,)


def test_many_unlearned_requests_are_counted(model, tokenizer, hparams, caplog):
    editor = BaFTEditor(model, tokenizer, replace(hparams, num_steps=1))
    requests = [{"prompt": f"Number {n} is", "target_new": "one"} for n in range(5)]
    apart = [learned.report.learned for learned in editor.learn_apart(requests)]
    assert (editor.edit(requests).learned, apart) == ((False,) * 5, [(False,)] * 5)
    for told in caplog.messages:
        assert "5 of 5 requests not learned" in told
        assert " and 2 more; raise num_steps or lr" in told
    assert len(caplog.messages) == 2


def test_a_batch_does_not_stop_while_one_of_its_requests_is_far_from_learned(
    model, tokenizer, hparams
):
    """A long answer that is known would outweigh a short one that is not."""
    editor = BaFTEditor(model, tokenizer, replace(hparams, num_steps=200))
    known = {"prompt": "Ice is", "target_new": "a long answer of very many tokens"}
    assert editor.edit(known).final_loss < 1.0
    editor.hparams = replace(hparams, early_stop_loss=2.5, num_steps=200)
    report = editor.edit([known, {"prompt": "The capital of France is", "target_new": "X"}])
    assert report.losses[0].answer < 2.5  # the mean is low from the beginning
    assert report.num_steps > 0
    assert report.request_losses[1] < 2.5


def test_one_prompt_with_two_targets_is_refused(model, tokenizer, quick):
    editor = BaFTEditor(model, tokenizer, quick)
    before = logits(model)
    pair = [{"prompt": "Ice is", "target_new": "hot"}, {"prompt": "Ice is", "target_new": "wet"}]
    with pytest.raises(ValueError, match="one prompt two targets; 'Ice is' has 'hot' and 'wet'"):
        editor.edit(pair)
    assert torch.equal(logits(model), before)
    assert len(editor.learn_apart(pair)) == 2
    editor.edit([pair[0], pair[0]])


def test_values_of_another_type_are_named(model, tokenizer, quick, tmp_path):
    path = "mine.yaml"
    with pytest.raises(TypeError, match=r"hparams must be BaFTHyperParams .*got 'mine.yaml': BaFT"):
        BaFTEditor(model, tokenizer, path)
    with pytest.raises(TypeError, match="hparams must be BaFTHyperParams"):
        BaFTEditor.open(model, tokenizer, tmp_path / "kept", path)
    assert not (tmp_path / "kept").exists()
    editor = BaFTEditor(model, tokenizer, quick)
    with pytest.raises(TypeError, match="hparams must be BaFTHyperParams"):
        editor.hparams = {"lr": 0.1}
    with pytest.raises(TypeError, match="to must be the id of an entry, a whole number; got '2'"):
        editor.rollback(to="2")
    with pytest.raises(TypeError, match="prompt must be a string; got 7"):
        editor.forget(7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_default_dtype_of_torch_changes_nothing(tokenizer, hparams, request_dict, dtype):
    hparams = replace(
        hparams,
        num_steps=3,
        min_similarity=0.5,
        gate="basis-subspace-bias",
    )
    states, models, before = [], [make_model(), make_model()], torch.get_default_dtype()
    for default, model in zip((before, dtype), models, strict=True):
        torch.set_default_dtype(default)
        try:
            editor = BaFTEditor(model, tokenizer, hparams)
            editor.edit(request_dict)
            states.append(editor.model_edit.snapshot())
        finally:
            torch.set_default_dtype(before)
    floats = {v.dtype for n, v in states[1].items() if not n.endswith(".texts")}
    assert floats == {torch.float32}
    assert all(torch.equal(states[1][name], value) for name, value in states[0].items())


def test_model_made_in_inference_mode_is_refused(tokenizer, hparams, request_dict):
    with torch.inference_mode():
        model = make_model()
        before = logits(model)
    editor = BaFTEditor(model, tokenizer, hparams)
    message = r"but model\.embed_tokens\.weight was made in torch\.inference_mode\(\): load the mod"
    for change in (editor.edit, editor.learn_apart):
        with pytest.raises(ValueError, match=message):
            change([request_dict])
    assert attached_edit(model) is None
    random_edit().attach(model)  # uses one
    with torch.inference_mode():
        assert not torch.equal(logits(model), before)


def test_failed_edit_is_taken_back_even_if_the_model_is_not(
    model, tokenizer, quick, request_dict, monkeypatch
):
    def fail(*_):
        raise KeyError

    editor = BaFTEditor(model, tokenizer, quick)
    before, learned = logits(model), editor.model_edit.snapshot()
    monkeypatch.setattr("baft_easyedit.training.learner.Surroundings.restore", fail)
    monkeypatch.setattr("baft_easyedit.training.learner._warn_of_unlearned", fail)
    with pytest.raises(KeyError):
        editor.edit(request_dict)
    assert attached_edit(model) is None
    assert torch.equal(logits(model), before)
    after = editor.model_edit.snapshot()
    assert all(torch.equal(after[name], value) for name, value in learned.items())
