"""A model is freed when its last reference goes, without the garbage collector."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch

from baft_easyedit import BaFTEditor
from baft_easyedit.training import cuda_graph, loop, step
from baft_easyedit.training.forward import Forward
from baft_easyedit.training.known_steps import KnownSteps
from tests.conftest import make_model

OTHER = {"prompt": "The capital of Cuba's", "target_new": "Rome", "loc_prompt": "Ice is cold"}


@pytest.fixture
def short(hparams):
    return replace(hparams, num_steps=5, early_stop_loss=0.0)


@pytest.fixture
def uncollected():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


class Remembered:
    """Takes the place of a CUDA graph: it has its results, and knows of nothing else."""

    def __init__(self, compute, pool):
        self.result = compute()

    def run(self):
        return self.result


@pytest.fixture
def graphs(monkeypatch):
    """Steps are captured as on a CUDA device; nothing is computed anew, and nobody looks."""
    monkeypatch.setattr(Forward, "device", torch.device("cuda"))
    monkeypatch.setattr(loop, "_is_on_gpu", lambda model: True)
    monkeypatch.setattr(step, "CudaGraph", Remembered)
    monkeypatch.setattr(cuda_graph, "_capture_stream", lambda device: None)
    monkeypatch.setattr(cuda_graph, "_check_same", lambda *_: None)
    monkeypatch.setattr(step, "check_equal", lambda *_: None)


def is_alive_after(use, tokenizer, hparams, request):
    """Whether a model is there after an editor of it was used and let go, and what is kept."""
    model = make_model()
    reference = weakref.ref(model)
    kept = use(BaFTEditor(model, tokenizer, hparams), request)
    del model
    return reference() is not None, kept


def edit(editor, request):
    editor.edit(request)


def edit_and_undo(editor, request):
    editor.edit(request)
    editor.undo()
    return editor.model_edit


def edit_twice(editor, request):
    editor.edit(request)
    editor.edit(OTHER)


def edit_side_by_side(editor, request):
    editor.edit(request)
    return editor.learn_apart([request, OTHER])


@pytest.mark.usefixtures("uncollected")
@pytest.mark.parametrize("engine", ["cached", "full"])
@pytest.mark.parametrize("use", [edit, edit_and_undo, edit_twice, edit_side_by_side])
def test_an_edited_model_is_freed(use, engine, tokenizer, short, request_dict):
    hparams = replace(short, engine=engine)
    is_alive, _ = is_alive_after(use, tokenizer, hparams, request_dict)
    assert not is_alive


@pytest.mark.parametrize("use", [edit, edit_and_undo, edit_twice])
def test_a_model_whose_steps_were_captured_is_freed(
    use, tokenizer, short, request_dict, uncollected, graphs
):
    is_alive, kept = is_alive_after(use, tokenizer, short, request_dict)
    assert not is_alive
    # An undo keeps what later edits can use.
    assert kept is None or len(kept.caches[KnownSteps]) == 1


def test_detach_drops_what_was_captured(model, tokenizer, short, request_dict, graphs):
    editor = BaFTEditor(model, tokenizer, short)
    editor.edit(request_dict)
    model_edit = editor.model_edit
    assert len(model_edit.caches[KnownSteps]) == 1
    model_edit.detach()
    assert not model_edit.caches
    assert all(p.grad is None for p in model_edit.parameters())
