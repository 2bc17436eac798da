"""Steps by a graph (a stand-in for it) against steps as they are; what none must do on a GPU."""

import logging
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from baft_easyedit import BaFTEditor, ModelEdit
from baft_easyedit.model.independent import IndependentEdits
from baft_easyedit.training import cuda_graph, loop
from baft_easyedit.training import step as training_step
from baft_easyedit.training.cuda_graph import CudaGraph, Repeated
from baft_easyedit.training.forward import Forward
from baft_easyedit.training.known_steps import KnownSteps
from baft_easyedit.training.loop import _frozen
from baft_easyedit.training.prefix_cache import full_forward, prepared
from baft_easyedit.training.requests import as_requests, text_rows
from baft_easyedit.training.step import Objective, TrainingStep, _captured_on
from tests.conftest import random_edit

REQUESTS = [
    {"prompt": "The capital of France is", "target_new": "Rome", "loc_prompt": "Ice is cold"},
    {"prompt": "The capital of Peru is", "target_new": "Oslo", "loc_prompt": "Fire is hot"},
]


@pytest.fixture
def rows(tokenizer):
    return text_rows(as_requests(REQUESTS), tokenizer)


def on_cache(model, edit, *edits):
    """A forward on a cached prefix; older transformers have families that cannot be."""
    forward, _ = prepared(model, edit, edits, "auto")
    if not forward.is_cached:
        pytest.skip("no prefix cache under transformers below 4.53")
    return forward


def never_captured(monkeypatch):
    monkeypatch.setattr(training_step, "_captured_on", lambda _: None)


class StandIn:
    """Takes the place of a CUDA graph: the computation itself, in the same memory each time."""

    def __init__(self, compute, pool):
        self.compute = compute
        self.result = compute()
        self.gradients = self.result[1]

    def run(self):
        step, gradients = self.compute()
        for memory, gradient in zip(self.gradients, gradients, strict=True):
            memory.copy_(gradient)
        return step, self.gradients


@pytest.fixture
def stand_ins(monkeypatch):
    """Steps are captured as on a CUDA device, by stand-ins; those that are made."""
    made = []

    class Counted(StandIn):
        def __init__(self, compute, pool):
            assert pool.stream == "a stream of cuda"
            super().__init__(compute, pool)
            made.append(self)

    monkeypatch.setattr(Forward, "device", torch.device("cuda"))
    monkeypatch.setattr(loop, "_is_on_gpu", lambda model: True)
    monkeypatch.setattr(training_step, "CudaGraph", Counted)
    monkeypatch.setattr(cuda_graph, "_capture_stream", lambda device: f"a stream of {device}")
    return made


def of_graphs(caplog):
    """What the log says of graphs."""
    return [r.message for r in caplog.records if r.name == "baft_easyedit.training.cuda_graph"]


def states(model, tokenizer, hparams, requests):
    """What two edits in a row learn, and their reports but for the time."""
    editor = BaFTEditor(model, tokenizer, hparams)
    reports = [replace(editor.edit(request), time_s=0) for request in requests]
    state = editor.model_edit.snapshot()
    editor.model_edit.detach()
    return state, reports


def assert_close(state, other):
    """Compare two states."""
    assert state.keys() == other.keys()
    for name, value in other.items():
        assert torch.allclose(state[name], value, atol=1e-3), name


@pytest.fixture
def long(hparams):
    return replace(hparams, num_steps=12, early_stop_loss=0.0, lr=1e-3, gate_lr=1e-2)


ALIKE = [
    {"prompt": f"The capital of {country} is", "target_new": city, "loc_prompt": "Ice is cold"}
    for country, city in (("Fiji", "Rome"), ("Iran", "Oslo"), ("Cuba", "Bern"), ("Oman", "Nice"))
]
"""Requests whose texts have as many tokens each."""


def test_an_edit_of_a_known_size_runs_the_model_to_record_only(model, tokenizer, long, stand_ins):
    """Once a text, and once on all recordings to check them; the steps are graphs."""
    editor = BaFTEditor(model, tokenizer, replace(long, num_steps=4))
    editor.edit(ALIKE[0] | {"loc_prompt": "Fire is hot"})
    (graph,) = stand_ins
    run, calls, seen = graph.run, [], []
    model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    graph.run = lambda: (seen.append(len(calls)), run())[1]
    editor.edit(ALIKE[1])
    assert seen[0] == 3  # the request, its irrelevant prompt, and the check


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
    ("between", "num_graphs"),
    [
        (lambda editor: None, 1),
        (lambda editor: editor.undo(), 1),
        (lambda editor: setattr(editor, "hparams", replace(editor.hparams, num_steps=7)), 1),
        (lambda editor: setattr(editor, "hparams", replace(editor.hparams, alpha=0.2)), 2),
        (lambda editor: editor.model_edit.start_afresh(), 1),
        (scale_a_weight, 2),
        (hook_a_layer, 1),
    ],
)
def test_what_happens_between_two_edits_is_taken_note_of(
    between, num_graphs, model, tokenizer, long, stand_ins, monkeypatch
):
    repeated = edited_twice(model, tokenizer, long, between)
    assert len(stand_ins) == num_graphs
    never_captured(monkeypatch)
    computed = edited_twice(model, tokenizer, long, between)
    assert_close(repeated, computed)


def test_a_saved_or_copied_model_leaves_the_graphs_behind(
    model, tokenizer, long, stand_ins, tmp_path
):
    editor = BaFTEditor(model, tokenizer, long)
    editor.edit(ALIKE[0])
    assert len(editor.model_edit.caches[KnownSteps]) == 1
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    for other in (loaded, deepcopy(model)):
        copied = BaFTEditor(other, tokenizer, long)
        assert len(copied.model_edit.caches[KnownSteps]) == 0
        copied.edit(ALIKE[1])
        assert len(copied.model_edit.caches[KnownSteps]) == 1
    assert len(editor.model_edit.caches[KnownSteps]) == 1


@pytest.mark.parametrize("num_edits", [1, 2])
def test_gradients_of_a_graph_are_those_of_the_step(num_edits, model, rows, long, stand_ins):
    edit: ModelEdit = random_edit(layers=long.layers)
    edit = edit if num_edits == 1 else IndependentEdits(edit, num_edits)
    edit.attach(model)
    parameters = list(edit.learned_parameters().values())
    with _frozen(model):
        forward = on_cache(model, edit, *[rows] * num_edits)
        steps, objective = TrainingStep(edit, long, forward), Objective(edit, long)
        for _ in range(6):
            with torch.no_grad():
                for p in parameters:
                    p.add_(torch.randn_like(p) * 1e-2)
            step, gradients = objective.gradients(forward)
            repeated = steps.run()
            assert torch.allclose(repeated.terms["answer"], step.terms["answer"])
            for p, gradient in zip(parameters, gradients, strict=True):
                assert torch.allclose(p.grad, gradient, atol=1e-6, rtol=1e-4)
                assert p.grad.is_contiguous()
    assert isinstance(steps._compute, Repeated)
    assert len(stand_ins) == 1


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
def test_a_cached_step_waits_for_no_value(num_edits, family_model, rows, long):
    edit: ModelEdit = random_edit(layers=long.layers)
    edit = edit if num_edits == 1 else IndependentEdits(edit, num_edits)
    edit.attach(family_model)
    with _frozen(family_model):
        forward = on_cache(family_model, edit, *[rows] * num_edits)
        steps = TrainingStep(edit, long, forward)
        with NoLooking():
            steps.run()


def test_edits_of_one_size_share_a_graph(model, tokenizer, long, stand_ins, monkeypatch, caplog):
    with caplog.at_level(logging.WARNING, "baft_easyedit.training.cuda_graph"):
        repeated, reports = states(model, tokenizer, long, ALIKE)
    assert not of_graphs(caplog)
    assert len(stand_ins) == 1
    never_captured(monkeypatch)
    computed, expected = states(model, tokenizer, long, ALIKE)
    for report, other in zip(reports, expected, strict=True):
        assert report.final_loss == pytest.approx(other.final_loss, rel=1e-3)
    assert_close(repeated, computed)


def test_full_forwards_and_many_tokens_are_not_captured(model, rows, long, stand_ins, monkeypatch):
    edit = random_edit(layers=long.layers)
    edit.attach(model)
    assert _captured_on(full_forward(model, edit, [rows])) is None
    forward = on_cache(model, edit, rows)
    assert _captured_on(forward) is not None
    monkeypatch.setattr(training_step, "_MOST_CAPTURED", forward.layout.input_ids.numel() - 1)
    assert _captured_on(forward) is None


def test_what_could_not_be_captured_is_not_tried_again(
    model, tokenizer, long, stand_ins, monkeypatch, caplog
):
    def fail(*_):
        raise RuntimeError("no graphs here")

    monkeypatch.setattr(training_step, "CudaGraph", fail)
    with caplog.at_level(logging.WARNING, "baft_easyedit.training.cuda_graph"):
        tried, _ = states(model, tokenizer, long, ALIKE)
    assert len(of_graphs(caplog)) == 1
    never_captured(monkeypatch)
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
    with caplog.at_level(logging.WARNING, "baft_easyedit.training.cuda_graph"):
        editor = BaFTEditor(model, tokenizer, long)
        reports = [editor.edit(request) for request in (*ALIKE, *REQUESTS, *ALIKE)]
        known = editor.model_edit.caches[KnownSteps]
        editor.model_edit.detach()
    assert not of_graphs(caplog)
    assert 1 <= len(known) <= 3
    never_captured(monkeypatch)
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
    with _frozen(model), caplog.at_level(logging.WARNING, "baft_easyedit.training.cuda_graph"):
        forward = on_cache(model, edit, rows)
        steps, objective = TrainingStep(edit, long, forward), Objective(edit, long)
        for _ in range(8):
            with torch.no_grad():
                for p in edit.parameters():
                    p.add_(torch.randn_like(p) * 1e-2)
            loss = steps.run().terms["answer"].clone()
            assert torch.allclose(loss, objective.value(forward).terms["answer"], rtol=1e-2)
    assert isinstance(steps._compute._state.graph, CudaGraph)
    assert not of_graphs(caplog)
