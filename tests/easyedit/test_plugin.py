"""BaFT and ReFT as methods of a real EasyEdit; runs on whichever generation is found."""

import copy
import importlib
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import edit_arguments, logits

from baft_easyedit import attached_edit, register
from baft_easyedit.easyedit.host import HOME_VARIABLE
from baft_easyedit.easyedit.plugin import apply_baft_to_model, apply_reft_to_model
from baft_easyedit.generation import load_model

pytestmark = pytest.mark.easyedit


def test_register_twice_changes_nothing_more(host):
    evaluation = importlib.import_module("easyeditor.evaluate.evaluate")
    editor = importlib.import_module("easyeditor.editors.editor")
    before = evaluation.test_prediction_acc, editor.BaseEditor.edit, editor.BaseEditor.__init__
    batchable = editor.BatchEditor.is_batchable_method
    assert register() is host
    after = evaluation.test_prediction_acc, editor.BaseEditor.edit, editor.BaseEditor.__init__
    assert after == before
    assert editor.BatchEditor.is_batchable_method is batchable
    assert editor.ALG_DICT["BaFT"] is apply_baft_to_model
    assert editor.ALG_DICT["ReFT"] is apply_reft_to_model
    assert all(batchable(name) for name in ("BaFT", "ReFT", "FT"))
    assert not batchable("ROME")


def test_device_that_is_missing_is_refused_or_means_the_cpu(host, make_editor, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if host.generation == "pypi":  # which knows CUDA devices only
        assert make_editor(device=0).model.device.type == "cpu"
    else:
        with pytest.raises(ValueError, match=r"device must be on this machine.* no CUDA device"):
            make_editor(device=0)


def test_bf16_casts_what_easyedit_loaded(host, make_editor, requests, model_path, caplog):
    editor = make_editor(bf16=True)
    assert "bf16: EasyEdit loads no bfloat16, so it loaded float32" in caplog.text
    model, _ = load_model(model_path, "cpu", torch.bfloat16)
    assert {p.dtype for p in editor.model.parameters()} == {torch.bfloat16}
    before = logits(editor, requests[0]["prompt"])
    batch = editor.tok(requests[0]["prompt"], return_tensors="pt")
    assert torch.equal(before, model(**batch).logits)
    metrics, _, _ = editor.edit(**edit_arguments(requests[:1]), sequential_edit=False)
    assert metrics[0]["post"]["rewrite_acc"] == [1.0]
    assert torch.equal(logits(editor, requests[0]["prompt"]), before)


def apply(editor, request, **options):
    return apply_baft_to_model(editor.model, editor.tok, [request], editor.hparams, **options)


def test_undo_of_an_edit_that_is_not_the_latest_is_refused(make_editor, requests):
    editor, prompt = make_editor(num_steps=2), requests[0]["prompt"]
    before = logits(editor, prompt)
    undos = [apply(editor, request)[1] for request in requests]
    edited = logits(editor, prompt)
    for undo in undos[:2]:
        with pytest.raises(
            ValueError,
            match=r"an undo must take back the latest change of the model, but .* is the edit of "
            rf"'{requests[2]['prompt']}', by another editor: undo that first, with its .*weights_c",
        ):
            undo()
        assert torch.equal(logits(editor, prompt), edited)
    assert [*undos[0].items(), *undos[0]] == []  # reading one does nothing
    assert type(apply(editor, requests[0], copy=True, return_orig_weights=False)[1]) is dict
    for undo in reversed(undos):
        undo()
        undone = logits(editor, prompt)
        undo()  # once is enough
        assert torch.equal(logits(editor, prompt), undone)
    assert torch.equal(undone, before)


def test_single_edits_use_the_memory_of_those_before(make_editor, requests):
    """And are what they would be on a model that was never edited."""
    alone, states = make_editor(num_steps=9), []
    for request in requests:
        apply(alone, request)
        states.append(attached_edit(alone.model).snapshot())
        attached_edit(alone.model).detach()
    editor, edits = make_editor(num_steps=9), []
    for request, state in zip(requests, states, strict=True):
        _, undo = apply(editor, request)
        edits.append(attached_edit(editor.model))
        for name, value in edits[-1].snapshot().items():
            assert torch.allclose(value, state[name], atol=1e-6), name
        undo()
        assert attached_edit(editor.model) is None
    assert all(edit is edits[0] for edit in edits)


def test_copies_and_files_of_a_model_hold_no_undone_edit(make_editor, requests):
    editor = make_editor(num_steps=2)
    apply(editor, requests[0])[1]()
    names = [name for name, value in vars(editor.model).items() if "Undone" in repr(value)]
    assert len(names) == 1
    for other in (copy.deepcopy(editor.model), pickle.loads(pickle.dumps(editor.model))):
        assert vars(other)[names[0]] is None
        editor.model = other
        copied, undo = apply(editor, requests[0], copy=True)
        assert attached_edit(copied) is not attached_edit(other) is None
        undo()
        assert attached_edit(copied) is None
        apply(editor, requests[0])
        assert attached_edit(other) is not None


def test_a_model_in_memory_is_edited(make_editor, requests):
    loaded = make_editor()

    class InMemory(str):  # what EasyEdit takes for a pair of model and tokenizer
        __slots__ = ()

        def __iter__(self):
            return iter((loaded.model, loaded.tok))

    hparams = loaded.hparams
    hparams.model_name = InMemory("llama-in-memory")
    from easyeditor import BaseEditor

    editor = BaseEditor.from_hparams(hparams)
    assert editor.model is loaded.model
    metrics, _, _ = editor.edit(**edit_arguments(requests[:1]), sequential_edit=False)
    assert metrics[0]["post"]["rewrite_acc"][0] == 1.0


def test_a_misleading_path_is_read_rightly(host, make_hparams, model_path, tmp_path):
    from easyeditor import BaseEditor

    misleading = tmp_path / "gpt-runs"
    misleading.symlink_to(model_path)
    hparams = make_hparams()
    hparams.model_name = str(misleading)
    assert type(BaseEditor.from_hparams(hparams).model).__name__ == "LlamaForCausalLM"
    assert hparams.model_name == str(misleading)


@pytest.mark.slow
@pytest.mark.skipif(HOME_VARIABLE not in os.environ, reason="this is the run on the release")
def test_contract_holds_on_the_release_too():
    """Run the tests of this file, and of what differs elsewhere, on the installed EasyEdit."""
    names = ("test_arguments.py", "test_plugin.py", "test_scoring.py", "test_session.py")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *(str(Path(__file__).with_name(name)) for name in names)],
        env={k: v for k, v in os.environ.items() if k != HOME_VARIABLE},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-4000:]
