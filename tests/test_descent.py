"""Steps by a recording against steps as they are, and what a step must not do on a GPU."""

import logging
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from baft_easyedit import BaFTEditor, ModelEdit, ReFTHyperParams, descent, repeat
from baft_easyedit.descent import Descent
from baft_easyedit.engine import Engine
from baft_easyedit.forward import Forward
from baft_easyedit.gates import GATES
from baft_easyedit.independent import IndependentEdits
from baft_easyedit.learning import _frozen
from baft_easyedit.repeat import CudaGraph, Repeated
from baft_easyedit.requests import as_requests, text_rows
from baft_easyedit.tape import Tape
from tests.conftest import make_model, random_edit

REQUESTS = [
    {"prompt": "The capital of France is", "target_new": "Rome", "loc_prompt": "Ice is cold"},
    {"prompt": "The capital of Peru is", "target_new": "Oslo", "loc_prompt": "Fire is hot"},
]


@pytest.fixture
def rows(tokenizer):
    return text_rows(as_requests(REQUESTS), tokenizer)


def replayed(model, edit, *edits, **options):
    """A replayed forward; older transformers have families that cannot be."""
    engine = Engine(model, edit, "replay", **options)
    forward = engine.prepare(edits)
    if not engine.is_replay:
        pytest.skip("not replayed under transformers below 4.53")
    return forward


def never_recorded(monkeypatch):
    monkeypatch.setattr(Descent, "_recorder", lambda *_: None)


class StandIn:
    """Takes the place of a CUDA graph: the computation itself, in the same memory each time."""

    def __init__(self, compute, pool):
        self.compute = compute
        self.edit = compute.func.__self__._edit
        self.bases = self.edit._given_bases
        self.result = compute()
        self.gradients = self.result[1]

    def run(self):
        with self.edit.given_bases(self.bases):  # which a graph has captured
            step, gradients = self.compute()
        for memory, gradient in zip(self.gradients, gradients, strict=True):
            memory.copy_(gradient)
        return step, self.gradients


def with_stand_in(monkeypatch):
    monkeypatch.setattr(Forward, "device", torch.device("cuda"))
    monkeypatch.setattr(descent, "CudaGraph", StandIn)
    monkeypatch.setattr(repeat, "_capture_stream", lambda device: f"a stream of {device}")


def states(model, tokenizer, hparams, requests):
    """What two edits in a row learn, and their reports but for the time."""
    editor = BaFTEditor(model, tokenizer, hparams)
    reports = [replace(editor.edit(request), time_s=0) for request in requests]
    state = editor.model_edit.snapshot()
    editor.model_edit.detach()
    return state, reports


def assert_same(state, other):
    """Compare two states to the bit."""
    assert state.keys() == other.keys()
    for name, value in other.items():
        assert torch.equal(state[name], value), name


@pytest.fixture
def long(hparams):
    return replace(hparams, num_steps=12, early_stop_loss=0.0, lr=1e-3, gate_lr=1e-2)


@pytest.mark.parametrize("gate", sorted(GATES.keys() - {"one"}))
def test_recorded_edits_equal_computed_ones_to_the_bit(gate, model, tokenizer, long, monkeypatch):
    hparams = replace(long, gate=gate)
    recorded, reports = states(model, tokenizer, hparams, REQUESTS)
    never_recorded(monkeypatch)
    computed, expected = states(model, tokenizer, hparams, REQUESTS)
    assert reports == expected
    assert_same(recorded, computed)


def test_every_family_is_recorded(family_model, rows, long, caplog):
    """Also in the full forward, which some have to fall back to."""
    edit = random_edit(layers=long.layers)
    edit.attach(family_model)
    steps = Descent(edit, long)
    computed = Descent(edit, replace(long, engine="full"))
    with _frozen(family_model), caplog.at_level(logging.INFO, "baft_easyedit.repeat"):
        forward = Engine(family_model, edit, "replay").prepare([rows])
        for _ in range(6):
            with torch.no_grad():
                for p in edit.parameters():
                    p.add_(torch.randn_like(p) * 1e-2)
            step = steps.step(forward)
            gradients = [p.grad.clone() for p in edit.parameters()]
            expected = computed.step(forward)
            assert torch.equal(step.loss, expected.loss)
            assert step.terms.keys() == expected.terms.keys() == {"answer", "balance", "locality"}
            for gradient, p in zip(gradients, edit.parameters(), strict=True):
                assert torch.equal(gradient, p.grad)
    assert isinstance(steps._compute._recording, Tape)
    assert not computed._compute.is_recorded
    assert not caplog.messages


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_of_half_precision_are_recorded(dtype, tokenizer, long, monkeypatch, caplog):
    with caplog.at_level(logging.INFO, "baft_easyedit.repeat"):
        recorded, reports = states(make_model(dtype=dtype), tokenizer, long, REQUESTS)
    assert not caplog.messages
    never_recorded(monkeypatch)
    computed, expected = states(make_model(dtype=dtype), tokenizer, long, REQUESTS)
    assert reports == expected
    assert_same(recorded, computed)


ALIKE = [
    {"prompt": f"The capital of {country} is", "target_new": city, "loc_prompt": "Ice is cold"}
    for country, city in (("Fiji", "Rome"), ("Iran", "Oslo"), ("Cuba", "Bern"), ("Oman", "Nice"))
]
"""Requests whose texts have as many tokens each."""


@pytest.fixture
def tapes(monkeypatch):
    """The tapes that are made."""
    made = []

    class Counted(Tape):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(descent, "Tape", Counted)
    return made


@pytest.mark.parametrize("gate", sorted(GATES))
def test_edits_of_one_size_share_a_recording(gate, model, tokenizer, long, tapes, monkeypatch):
    hparams = replace(long, gate=gate)
    if gate == "one":
        hparams = ReFTHyperParams("x", long.layers, device="cpu", rank=4, num_steps=12)
        hparams = replace(hparams, early_stop_loss=0.0)
    repeated, reports = states(model, tokenizer, hparams, ALIKE)
    assert len(tapes) == 1
    never_recorded(monkeypatch)
    computed, expected = states(model, tokenizer, hparams, ALIKE)
    assert reports == expected
    assert_same(repeated, computed)


def test_edits_of_one_size_share_a_recording_in_every_family(family_model, tokenizer, long, tapes):
    edits = [text_rows(as_requests([request]), tokenizer) for request in ALIKE]
    edit = random_edit(layers=long.layers)
    edit.attach(family_model)
    computed = Descent(edit, replace(long, engine="full"))
    with _frozen(family_model):
        for rows in edits:
            steps = Descent(edit, long, edit.known_steps)
            forward = replayed(family_model, edit, rows, rounds=True)
            for _ in range(4):
                loss = steps.step(forward).loss.clone()
                gradients = [p.grad.clone() for p in edit.parameters()]
                assert torch.equal(loss, computed.step(forward).loss)
                for gradient, p in zip(gradients, edit.parameters(), strict=True):
                    assert torch.equal(gradient, p.grad)
                with torch.no_grad():
                    for p in edit.parameters():
                        p.add_(torch.randn_like(p) * 1e-2)
    assert len(tapes) == 1


def test_an_edit_of_a_known_size_runs_the_model_once(model, tokenizer, long):
    """To record its texts, which is what its first step is compared with."""
    editor = BaFTEditor(model, tokenizer, long)
    editor.edit(ALIKE[0] | {"loc_prompt": "Fire is hot"})
    calls = []
    model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    editor.edit(ALIKE[1])
    assert len(calls) == 1


def edited_twice(model, tokenizer, hparams, between):
    """The states after two edits of one size, with something done in between."""
    editor = BaFTEditor(model, tokenizer, hparams)
    editor.edit(ALIKE[0])
    undo = between(editor)
    editor.edit(ALIKE[1])
    state = editor.model_edit.snapshot()
    if callable(undo):
        undo()
    editor.model_edit.detach()
    return state


def scale_a_weight(editor):
    weight = editor.model.model.layers[3].mlp.down_proj.weight
    with torch.no_grad():
        weight.mul_(2)

    def put_back():
        with torch.no_grad():
            weight.div_(2)

    return put_back


def hook_a_layer(editor):
    """What no version of the weights tells: the model computes something else from now on."""
    mlp = editor.model.model.layers[3].mlp
    return mlp.register_forward_hook(lambda m, a, out: out * 1.5).remove


@pytest.mark.parametrize(
    ("between", "num_tapes"),
    [
        (lambda editor: None, 1),
        (lambda editor: editor.undo(), 1),
        (lambda editor: setattr(editor, "hparams", replace(editor.hparams, num_steps=7)), 1),
        (lambda editor: setattr(editor, "hparams", replace(editor.hparams, alpha=0.2)), 2),
        (lambda editor: editor.model_edit.start_afresh(editor.hparams.rank), 1),
        (lambda editor: editor.model_edit.grow(editor.hparams.rank + 1), 2),
        (scale_a_weight, 2),
        (hook_a_layer, 1),
    ],
)
def test_what_happens_between_two_edits_is_taken_note_of(
    between, num_tapes, model, tokenizer, long, tapes, monkeypatch
):
    repeated = edited_twice(model, tokenizer, long, between)
    assert len(tapes) == num_tapes
    never_recorded(monkeypatch)
    computed = edited_twice(model, tokenizer, long, between)
    assert_same(repeated, computed)


def test_a_step_that_depends_on_the_first_is_not_shared(model, tokenizer, long, tapes):
    states(model, tokenizer, replace(long, rescaling="match-first-step"), ALIKE[:2])
    assert len(tapes) == 2


def test_large_models_on_the_cpu_keep_no_steps(model, tokenizer, long, tapes, monkeypatch):
    monkeypatch.setattr("baft_easyedit.learning._SMALL_BYTES", 1000)
    states(model, tokenizer, long, ALIKE[:2])
    assert len(tapes) == 2


def test_a_saved_or_copied_model_leaves_the_recordings_behind(model, tokenizer, long, tmp_path):
    editor = BaFTEditor(model, tokenizer, long)
    editor.edit(ALIKE[0])
    assert len(editor.model_edit.known_steps) == 1
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    for other in (loaded, deepcopy(model)):
        copied = BaFTEditor(other, tokenizer, long)
        assert len(copied.model_edit.known_steps) == 0
        copied.edit(ALIKE[1])
        assert len(copied.model_edit.known_steps) == 1
    assert len(editor.model_edit.known_steps) == 1


def test_edits_of_several_sizes_find_their_own_recordings(model, tokenizer, long, tapes):
    short, wide = ALIKE[:2], [{**r, "loc_prompt": "Ice is cold " * 4} for r in ALIKE[2:]]
    states(model, tokenizer, long, [short[0], wide[0], short[1], wide[1]])
    assert len(tapes) == 2


def test_reft_and_edits_side_by_side_are_recorded(model, tokenizer, long, monkeypatch):
    reft = ReFTHyperParams("x", long.layers, device="cpu", rank=4, num_steps=12)
    for hparams in (replace(reft, early_stop_loss=0.0), long):
        recorded = BaFTEditor(model, tokenizer, hparams).learn_apart(REQUESTS)
        with monkeypatch.context() as patch:
            never_recorded(patch)
            computed = BaFTEditor(model, tokenizer, hparams).learn_apart(REQUESTS)
        for a, b in zip(recorded, computed, strict=True):
            assert a.report.losses == b.report.losses
            for name, value in b.state.items():
                assert torch.equal(a.state[name], value)


def test_what_cannot_be_recorded_is_edited_all_the_same(
    model, tokenizer, long, monkeypatch, caplog
):
    monkeypatch.setattr(descent, "_TAPE_BYTES", 1000)
    with caplog.at_level(logging.INFO, logger="baft_easyedit"):
        reports = states(model, tokenizer, long, REQUESTS[:1])[1]
    assert "steps are computed one by one" in caplog.text
    assert "more than 1000 bytes" in caplog.text
    never_recorded(monkeypatch)
    assert reports == states(model, tokenizer, long, REQUESTS[:1])[1]


def test_the_full_engine_is_never_recorded(model, rows, long):
    edit = random_edit(layers=long.layers)
    edit.attach(model)
    steps = Descent(edit, replace(long, engine="full"))
    with _frozen(model):
        forward = Engine(model, edit, "full").prepare([rows])
        for _ in range(6):
            steps.step(forward)
    assert not steps._compute.is_recorded


def test_another_forward_is_recorded_anew(model, rows, long):
    edit = random_edit(layers=long.layers)
    edit.attach(model)
    steps = Descent(edit, long)
    with _frozen(model):
        engine = Engine(model, edit, "replay")
        forwards = [engine.prepare([rows]), engine.prepare([rows[:1]])]
        for forward in forwards:
            for _ in range(5):
                step = steps.step(forward)
            assert steps._compute.is_recorded
            assert len(step.row_losses) == len(forward.layout.rows)


def test_models_on_several_devices_are_not_recorded(model, rows, long, monkeypatch):
    edit = random_edit(layers=long.layers)
    edit.attach(model)
    with _frozen(model):
        forward = Engine(model, edit, "replay").prepare([rows])
        assert forward.device == torch.device("cpu")
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.to("meta"))
        assert forward.device is None
        assert Descent(edit, long)._recorder(forward) is None


@pytest.mark.parametrize("num_edits", [1, 2])
def test_graph_of_a_step_leaves_the_bases_outside(num_edits, model, rows, long, monkeypatch):
    """With a stand-in for CUDA's graph; the gradients are those of the step as it is."""
    with_stand_in(monkeypatch)
    edit: ModelEdit = random_edit(layers=long.layers)
    edit = edit if num_edits == 1 else IndependentEdits(edit, num_edits)
    edit.attach(model)
    parameters = list(edit.learned_parameters().values())
    steps = Descent(edit, long)
    with _frozen(model):
        forward = Engine(model, edit, "replay").prepare([rows] * num_edits)
        for _ in range(6):
            with torch.no_grad():
                for p in parameters:
                    p.add_(torch.randn_like(p) * 1e-2)
            step, gradients = steps._objective.gradients(forward, parameters)
            repeated = steps.step(forward)
            assert torch.allclose(repeated.loss, step.loss)
            for p, gradient in zip(parameters, gradients, strict=True):
                assert torch.allclose(p.grad, gradient, atol=1e-6, rtol=1e-4)
                assert p.grad.is_contiguous()
    assert isinstance(steps._compute, Repeated)
    assert isinstance(steps._compute._recording, descent._StepGraph)


def test_edits_by_graphs_are_those_without(model, tokenizer, long, monkeypatch, caplog):
    computed, expected = states(model, tokenizer, long, REQUESTS)
    with_stand_in(monkeypatch)
    with caplog.at_level(logging.INFO, "baft_easyedit.repeat"):
        recorded, reports = states(model, tokenizer, long, REQUESTS)
    assert not caplog.messages
    for report, other in zip(reports, expected, strict=True):
        assert report.final_loss == pytest.approx(other.final_loss, rel=1e-3)
    for name, value in computed.items():
        assert torch.allclose(recorded[name], value, atol=1e-3)


class NoLooking(TorchDispatchMode):
    """Raises where a computation looks at values, for which a GPU would have to be waited for."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        given = [a for arg in args[1:] for a in (arg if isinstance(arg, list) else [arg])]
        is_mask = any(isinstance(a, torch.Tensor) and a.dtype == torch.bool for a in given)
        if torch.Tag.dynamic_output_shape in op.tags and "index" in str(op):
            assert not is_mask, f"{op} waits"
        else:
            assert not {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & {
                *op.tags
            }, f"{op} waits"
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("num_edits", [1, 2])
def test_a_replayed_step_waits_for_no_value(num_edits, family_model, rows, long):
    edit: ModelEdit = random_edit(layers=long.layers)
    edit = edit if num_edits == 1 else IndependentEdits(edit, num_edits)
    edit.attach(family_model)
    with _frozen(family_model):
        forward = replayed(family_model, edit, *[rows] * num_edits)
        steps = Descent(edit, replace(long, engine="full"))
        with NoLooking():
            steps.step(forward)


def test_edits_of_one_size_share_a_graph(model, tokenizer, long, monkeypatch, caplog):
    computed, expected = states(model, tokenizer, long, ALIKE)
    made = []

    class Counted(StandIn):
        def __init__(self, compute, pool):
            assert pool.stream == "a stream of cuda"
            super().__init__(compute, pool)
            made.append(self)

    with_stand_in(monkeypatch)
    monkeypatch.setattr(descent, "CudaGraph", Counted)
    with caplog.at_level(logging.INFO, "baft_easyedit.repeat"):
        repeated, reports = states(model, tokenizer, long, ALIKE)
    assert not caplog.messages
    assert len(made) == 1
    for report, other in zip(reports, expected, strict=True):
        assert report.final_loss == pytest.approx(other.final_loss, rel=1e-3)
    for name, value in computed.items():
        assert torch.allclose(repeated[name], value, atol=1e-3)


def test_full_forwards_and_many_tokens_are_not_captured(model, rows, long, monkeypatch):
    with_stand_in(monkeypatch)
    edit = random_edit(layers=long.layers)
    edit.attach(model)
    steps = Descent(edit, long)
    assert steps._recorder(Engine(model, edit, "full").prepare([rows])) is None
    forward = Engine(model, edit, "replay").prepare([rows])
    assert steps._recorder(forward) is not None
    monkeypatch.setattr(descent, "_MOST_CAPTURED", forward.layout.input_ids.numel() - 1)
    assert steps._recorder(forward) is None


def test_what_could_not_be_recorded_is_not_tried_again(model, tokenizer, long, monkeypatch, caplog):
    def fail(*_):
        raise RuntimeError("no tapes here")

    monkeypatch.setattr(descent, "Tape", fail)
    with caplog.at_level(logging.INFO, "baft_easyedit.repeat"):
        tried, _ = states(model, tokenizer, long, ALIKE)
    assert len(caplog.messages) == 1
    never_recorded(monkeypatch)
    computed, _ = states(model, tokenizer, long, ALIKE)
    for name, value in computed.items():
        assert torch.allclose(tried[name], value, atol=1e-4), name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("dtype", "rel"), [(torch.float32, 1e-2), (torch.bfloat16, 0.2)])
def test_edits_of_one_size_share_a_graph_on_cuda(
    dtype, rel, model, tokenizer, long, monkeypatch, caplog
):
    model.to("cuda", dtype)
    with caplog.at_level(logging.INFO, "baft_easyedit.repeat"):
        editor = BaFTEditor(model, tokenizer, long)
        reports = [editor.edit(request) for request in (*ALIKE, *REQUESTS, *ALIKE)]
        known = editor.model_edit.known_steps
        editor.model_edit.detach()
    assert not caplog.messages
    assert 1 <= len(known) <= 3
    never_recorded(monkeypatch)
    expected = states(model, tokenizer, long, [*ALIKE, *REQUESTS, *ALIKE])[1]
    for report, other in zip(reports, expected, strict=True):
        assert report.final_loss == pytest.approx(other.final_loss, rel=rel)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_on_cuda_are_captured(dtype, model, rows, long, caplog):
    model.to("cuda", dtype)
    edit = random_edit(layers=long.layers).cuda()
    edit.attach(model)
    steps, computed = Descent(edit, long), Descent(edit, replace(long, engine="full"))
    with _frozen(model), caplog.at_level(logging.INFO, "baft_easyedit.repeat"):
        forward = Engine(model, edit, "replay").prepare([rows])
        for _ in range(8):
            with torch.no_grad():
                for p in edit.parameters():
                    p.add_(torch.randn_like(p) * 1e-2)
            loss = steps.step(forward).loss.clone()
            assert torch.allclose(loss, computed.step(forward).loss, rtol=1e-2)
    assert isinstance(steps._compute._recording._graph, CudaGraph)
    assert not caplog.messages
