import contextlib
import errno
import fcntl
import gc
import io
import json
import os
import runpy
import shutil
import subprocess
import sys
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path

import pytest
import torch

from baft_easyedit import BaFTEditor, attach, attached_edit
from baft_easyedit.cli import main
from baft_easyedit.files import paths
from baft_easyedit.storage import directory as directory_module
from baft_easyedit.storage import journal as journal_module
from baft_easyedit.storage import lock as lock_module
from baft_easyedit.storage.reading import read_history
from baft_easyedit.storage.state import state_hash
from baft_easyedit.training.learner import Learner
from tests.conftest import fact, make_model, now
from tests.new_process import new_processes
from tests.special_files import KINDS, make_special

ROOT = Path(__file__).parent.parent
CHANGED = "changed by other means than its editor since"


def of(editor):
    """The editor's journal."""
    return editor._history.journal


@pytest.fixture
def kept(tmp_path):
    return tmp_path / "kept"


# ---- keeping


def test_journal_has_requests_and_reports_and_checkpoints_lie_beside(opened, kept):
    with opened(checkpoint_every=3) as editor:
        for i in range(7):
            report = editor.edit(fact(i))
        last = json.loads(read_history(kept)[-1].line)
        assert last["requests"] == [{**fact(6), "loc_prompt": ["Tea is hot"]}]
        first, final = report.losses[0].answer, report.losses[-1].answer
        assert last["report"]["losses"]["answer"] == [first, final]
        for to in (-1, 99):
            with pytest.raises(ValueError, match=rf"to must be in \[0, 7\].*; got {to}"):
                editor.rollback(to=to)
    assert {int(f.stem) for f in (kept / "checkpoints").iterdir()} == {0, 3, 6}
    with pytest.raises(ValueError, match="checkpoint_every must be at least 1; got 0"):
        opened(checkpoint_every=0)


def test_replay_uses_the_hparams_of_the_time(opened, quick, kept):
    with opened() as editor:
        editor.edit(fact(0))
        editor.hparams = replace(quick, num_steps=3)
        editor.edit(fact(1))
    with opened(hparams=replace(quick, lr=1.0e-3)) as editor:
        editor.edit(fact(2))
        expected = [e.state_hash for e in read_history(kept)]
        editor._history.recent.clear()
        for to in (3, 5, 1):
            editor.rollback(to=to)
            assert now(editor) == expected[to]
        with pytest.raises(ValueError, match="rank must be 4, as in this edit; got 5"):
            editor.hparams = replace(quick, rank=5)
        editor.undo()
    kinds = [e.kind for e in read_history(kept)][:6]
    assert kinds == ["start", "edit", "settings", "edit", "settings", "edit"]
    assert json.loads((kept / "baft_config.json").read_text())["hparams"]["lr"] == 1.0e-3


def test_installed_edit_is_kept_as_a_checkpoint(opened, kept):
    with opened() as editor:
        editor.edit(fact(0))
        (learned,) = editor.learn_apart([fact(1)])
        editor.install(learned, fact(1))
        editor.edit(fact(2))
        editor._history.recent.clear()
        editor.rollback(to=2)
        assert now(editor) == read_history(kept)[2].state_hash
        editor.rollback(to=3)
        (kept / "checkpoints/00000002.safetensors").unlink()
        editor._history.recent.clear()
        editor.rollback(to=0)
        editor._history.recent.clear()
        at = now(editor)
        rule = r"entry 2 .* \(install\) could not be learned again bit .* \(only .* \[0\] are kept"
        with pytest.raises(ValueError, match=rule):
            editor.rollback(to=2)
        assert now(editor) == at
    assert read_history(kept)[2].requests[0]["prompt"] == fact(1)["prompt"]


def test_replay_that_comes_out_otherwise_is_refused(opened, kept):
    with opened() as editor:
        for i in range(3):
            editor.edit(fact(i))
        editor.edit(fact(3))
        editor._history.recent.clear()
        before, size = now(editor), len(of(editor))
        with torch.no_grad():
            editor.model.lm_head.weight.mul_(1.5)  # as another machine would compute
        with pytest.raises(ValueError, match=r"same: this package's code within its version"):
            editor.rollback(to=2)
        editor.model.set_attn_implementation("eager")
        rule = r"entry 1 .* \(edit\) could not .*\(attention sdpa then, eager now\).*entries \[0\]"
        with pytest.raises(ValueError, match=rule):
            editor.rollback(to=2)
        assert now(editor) == before
        assert len(of(editor)) == size
        editor.rollback(to=0)


def test_change_behind_the_editors_back_is_not_kept(opened, kept, tmp_path):
    with opened() as editor:
        editor.edit(fact(0))
        editor.edit(fact(1))
        editor._history.recent[1][1].learned["_interventions.1.source_bias"].add_(1)
        editor.undo()  # learned again, as what is in memory has another hash
        assert now(editor) == read_history(kept)[1].state_hash
        with torch.no_grad():
            editor.model_edit.intervention(1).source_bias.add_(1)
        with pytest.raises(ValueError, match=r"was changed by other means .* rollback\(to=1\) fir"):
            editor.edit(fact(1))
        with pytest.raises(ValueError, match=r"state after entry 1 of .* must have the hash in"):
            editor._history.commit("rollback", {"to": 1})
        with pytest.raises(ValueError, match="was changed by other means"):
            editor.save(kept)
        assert len(read_history(kept)) == 4
        editor.save(tmp_path / "changed")
        assert now(opened(tmp_path / "changed", None)) == now(editor)
        editor.rollback(to=1)
        editor.edit(fact(1))
        assert now(editor) == read_history(kept)[2].state_hash


def test_what_is_learned_on_changed_weights_is_not_kept(opened):
    model = make_model()
    with opened(model=model) as editor:
        editor.edit(fact(0))
        before = now(editor)
        weight = model.lm_head.weight
        old, weight.data = weight.data, weight.data + 1  # as by a merged adapter
        for refused in (partial(editor.edit, fact(1)), partial(editor.forget, fact(0)["prompt"])):
            with pytest.raises(ValueError, match="its weights have other values"):
                refused()
        assert now(editor) == before
        editor.undo()
        weight.data = old
        editor.edit(fact(1))


def test_loaded_edit_that_learns_on_changed_weights_is_one_of_them(
    opened, kept, tokenizer, tmp_path
):
    with opened() as editor:
        editor.edit(fact(0))
    model = make_model()
    loaded = BaFTEditor.load(model, tokenizer, kept)
    model.lm_head.weight.data += 1
    loaded.edit(fact(1))
    loaded.save(tmp_path / "saved")
    (start,) = read_history(tmp_path / "saved")
    assert "learned on another model" in start.content["snapshot_of"]
    with pytest.raises(ValueError, match="its weights have other values"):
        attach(make_model(), tmp_path / "saved")
    loaded.model_edit.detach()
    attach(model, tmp_path / "saved")


def test_change_by_another_editor_is_named_and_not_dropped(opened, quick, kept, tokenizer):
    with opened() as editor:
        editor.edit(fact(0))
        other = BaFTEditor(editor.model, tokenizer, quick)
        other.edit(fact(1))
        before = now(editor)
        message = r"must be as .* keeps it, but .* is the edit of 'Fact number 1 is', by another"
        for change in (editor.undo, lambda: editor.edit(fact(2))):
            with pytest.raises(ValueError, match=message + r" editor: call rollback\(to=1\) first"):
                change()
            assert now(editor) == before
        other.undo()
        editor.edit(fact(2))
        with pytest.raises(ValueError, match=r"no edit to undo.* 'Fact number 2 is', by the edito"):
            other.undo()
        editor.undo()
        other.edit(fact(1))
        editor.rollback(to=0)  # which says that all else is dropped
        assert not editor.is_attached
        with pytest.raises(ValueError, match=r"is the rollback to entry 0, by the editor of .*ke"):
            other.undo()
    assert [e.kind for e in read_history(kept)] == ["start", "edit", "edit", "undo", "rollback"]


# ---- saving


def test_save_brings_an_earlier_save_up_to_date(opened, kept, tmp_path):
    saved = tmp_path / "saved"
    with opened() as editor:
        for i in range(2):
            editor.edit(fact(i))
            editor.save(saved)
            editor.save(saved)
            assert read_history(saved) == read_history(kept)
            assert (saved / "journal.jsonl").read_bytes() == (kept / "journal.jsonl").read_bytes()
            editor.save_pretrained(kept)  # beside its lock
        editor.save(kept)
    with opened(saved, None) as other:
        assert now(other) == now(editor)
        other.edit(fact(7))
    with pytest.raises(ValueError, match="it holds another edit with a history of 4 entries"):
        editor.save(saved)
    with pytest.raises(ValueError, match="must be open in this process to take a change, and is"):
        editor.save(kept)


def test_save_takes_new_hparams_along(opened, quick, kept, tokenizer, tmp_path):
    new = replace(quick, num_steps=3)
    with opened() as editor:
        editor.edit(fact(0))
        other = BaFTEditor.load(make_model(), tokenizer, kept)
        for saving, path in ((editor, tmp_path / "saved"), (other, tmp_path / "of a loaded one")):
            saving.save(path)
            saving.hparams = new
            saving.save(path)
            assert BaFTEditor.load(make_model(), tokenizer, path).hparams.num_steps == 3
            assert (path / "journal.jsonl").read_text().splitlines() == lines_of(path)
        editor.save(kept)
    with opened(hparams=None) as again:
        assert again.hparams.num_steps == 3
    with opened(tmp_path / "saved", None) as again:
        assert again.hparams.num_steps == 3
        again.edit(fact(1))
        assert [e.kind for e in of(again).entries] == ["start", "edit", "settings", "edit"]


@pytest.mark.parametrize(
    ("name", "value"),
    [("rank", 2), ("num_prompt_positions", 1), ("min_similarity", 0.5), ("lr", -1.0)],
)
def test_what_the_edit_is_not_cannot_be_kept(opened, quick, kept, tmp_path, name, value):
    with opened(hparams=replace(quick)) as editor:
        editor.edit(fact(0))
        before = now(editor)
        setattr(editor.hparams, name, value)
        for refused in (
            partial(editor.edit, fact(1)),
            partial(editor.save, kept),
            partial(editor.save, tmp_path / "saved"),
        ):
            with pytest.raises(ValueError, match=f"{name} must be"):
                refused()
    with opened(hparams=None) as again:
        assert now(again) == before
        assert getattr(again.hparams, name) == getattr(quick, name)


def lines_of(path):
    return [entry.line for entry in read_history(path)]


def test_loaded_edit_is_saved_with_the_journal_that_led_to_it(opened, kept, tokenizer, tmp_path):
    with opened() as editor:
        for i in range(2):
            editor.edit(fact(i))
    saved = tmp_path / "saved"
    other = BaFTEditor.load(make_model(), tokenizer, kept)
    other.edit(fact(2))
    other.save(saved)
    assert lines_of(saved)[:3] == lines_of(kept)
    assert read_history(saved)[3].requests[0]["prompt"] == fact(2)["prompt"]
    other.edit(fact(3))
    other.undo()
    other.undo()
    with pytest.raises(ValueError, match="rollback needs the journal of a directory, and none is"):
        other.rollback(to=1)
    other.hparams = replace(other.hparams, num_steps=3)
    other.edit(fact(4))
    other.save(saved)
    kinds = ["start", "edit", "edit", "edit", "edit", "undo", "undo", "settings", "edit"]
    assert [e.kind for e in read_history(saved)] == kinds
    assert [read_history(saved)[i].to for i in (5, 6)] == [3, 2]
    with opened(saved, None) as again:
        assert now(again) == now(other)
        again.edit(fact(5))
        again.rollback(to=8)
        assert now(again) == now(other)
        again.rollback(to=1)  # learned again from a new edit
        assert now(again) == read_history(kept)[1].state_hash
    assert len(read_history(kept)) == 3


def start_of(path):
    (entry,) = read_history(path)
    return entry.content["snapshot_of"]


def test_snapshot_says_of_what_it_is(opened, kept, tokenizer, quick, tmp_path, capsys):
    new = BaFTEditor(make_model(), tokenizer, quick)
    new.edit(fact(0))
    new.save(tmp_path / "new")
    assert start_of(tmp_path / "new") == "an edit that was in memory only"
    with opened() as editor:
        editor.edit(fact(0))
    of_last = read_history(kept)[-1].reference
    assert of_last.startswith("entry 1, whose line has the SHA-256 ")

    def change(editor):
        with torch.no_grad():
            editor.model_edit.intervention(1).source_bias.add_(1)

    for name, then in [("at once", None), ("later", lambda e: e.edit(fact(1)))]:
        other = BaFTEditor.load(make_model(), tokenizer, kept)
        change(other)
        if then:
            then(other)
        other.save(tmp_path / name)
        assert start_of(tmp_path / name) == f"{of_last}; {CHANGED}"
    other = BaFTEditor.load(make_model(), tokenizer, kept)
    other.edit(fact(1))
    other._history.recent[0][1].learned["_interventions.1.source_bias"].add_(1)
    other.undo()
    other.save(tmp_path / "undone")
    assert CHANGED in start_of(tmp_path / "undone")
    other = BaFTEditor.load(make_model(seed=1), tokenizer, kept, allow_other_model=True)
    other.save(tmp_path / "of another model")
    assert "; learned on another model, " in start_of(tmp_path / "of another model")
    other = BaFTEditor.load(make_model(), tokenizer, kept, allow_other_model=True)
    other.save(tmp_path / "of the same")
    assert lines_of(tmp_path / "of the same") == lines_of(kept)
    assert main(["history", str(tmp_path / "later")]) == 0
    assert "start    snapshot of entry 1, whose" in capsys.readouterr().out
    (kept / "journal.jsonl").write_text("{}\n{}\n{}\n")
    BaFTEditor.load(make_model(), tokenizer, kept).save(tmp_path / "no journal")
    assert "; the journal before it could not be read" in start_of(tmp_path / "no journal")


def test_snapshot_of_another_edit_is_replaced_only_when_asked(tokenizer, quick, tmp_path):
    editors = [BaFTEditor(make_model(), tokenizer, quick) for _ in range(2)]
    for i, editor in enumerate(editors):
        editor.edit(fact(i))
    editors[0].save(tmp_path)
    before = {f: f.read_bytes() for f in tmp_path.iterdir()}
    for save in (editors[1].save, editors[1].save_pretrained):
        with pytest.raises(ValueError, match=r"a snapshot of another edit: .* overwrite=True, on"):
            save(tmp_path)
        assert {f: f.read_bytes() for f in tmp_path.iterdir()} == before
    editors[1].save(tmp_path, overwrite=True)
    assert now(BaFTEditor.load(make_model(), tokenizer, tmp_path)) == now(editors[1])
    editors[1].undo()
    editors[1].save(tmp_path)  # its own
    editors[0].save_pretrained(tmp_path, overwrite=True)
    assert now(BaFTEditor.load(make_model(), tokenizer, tmp_path)) == now(editors[0])
    loaded = BaFTEditor.load(make_model(), tokenizer, tmp_path)
    loaded.model_edit.intervention(1).source_bias.data.add_(1)
    loaded.save(tmp_path)  # a newer snapshot of what it was loaded from
    loaded = BaFTEditor.load(make_model(), tokenizer, tmp_path)
    loaded.edit(fact(2))
    loaded.save(tmp_path)
    with pytest.raises(ValueError, match="holds another edit with a history of 2 entries"):
        editors[0].save(tmp_path, overwrite=True)


def refuses_changes(editor, match):
    before = now(editor)
    for use in (lambda: editor.edit(fact(1)), editor.undo, lambda: editor.rollback(to=0)):
        with pytest.raises(ValueError, match=match):
            use()
        assert now(editor) == before


def test_closed_editor_takes_no_edit_and_the_model_keeps_its_own(opened):
    model = make_model()
    with opened(model=model) as editor:
        editor.edit(fact(0))
    refuses_changes(editor, "is closed: open it again")
    assert attached_edit(model) is editor.model_edit
    with opened(model=model, hparams=None) as again:
        assert again.model_edit is editor.model_edit
        again.edit(fact(1))


# ---- the lock


def test_second_process_is_refused_and_told_who_is_there(opened, kept):
    opened().close()
    code = (
        "import fcntl, os, sys, time; f = open(sys.argv[1], 'r+'); fcntl.flock(f, fcntl.LOCK_EX);"
        "f.truncate(); f.write(str(os.getpid())); f.flush(); print(flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(kept / "lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(BlockingIOError, match=rf"process {other.pid} has it: close that edit"):
            opened(hparams=None)
        attach(make_model(), kept)  # reading needs no lock
        assert len(read_history(kept)) == 1
        other.kill()
    opened(hparams=None).edit(fact(0))
    with pytest.raises(BlockingIOError, match=rf"process {os.getpid()} has it"):
        opened(hparams=None)


@pytest.mark.parametrize("error", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_file_system_without_locks_is_named(opened, monkeypatch, error):
    monkeypatch.setattr(fcntl, "flock", failing(OSError(error, os.strerror(error))))
    match = f"kept must be on a file system with locks, .*{os.strerror(error)}: keep the edit on a"
    with pytest.raises(OSError, match=match) as raised:
        opened()
    assert raised.value.errno == error


def files_under(path):
    return {f: f.read_bytes() for f in path.rglob("*") if f.is_file()}


@pytest.mark.parametrize("becomes", ["nothing", "a copy", "another edit", "another lock"])
def test_directory_that_is_another_one_is_not_written(opened, kept, becomes):
    editor = opened()
    editor.edit(fact(0))
    moved = kept.rename(kept.parent / "moved")
    if becomes == "a copy":
        shutil.copytree(moved, kept)
    elif becomes == "another edit":
        opened()
    elif becomes == "another lock":
        moved.rename(kept)
        moved.symlink_to(kept)
        (kept / "lock").unlink()
        opened(hparams=None).close()
    content = files_under(kept.parent)
    refuses_changes(editor, "kept must be what it was when this .* open the directory again where")
    assert files_under(kept.parent) == content
    editor.save(kept.parent / "rescued")
    assert lines_of(kept.parent / "rescued") == lines_of(moved)
    editor.close()
    opened(moved, None).edit(fact(1))


def test_directory_that_goes_during_an_edit_is_not_written(opened, kept, monkeypatch):
    editor = opened()
    editor.edit(fact(0))
    before = now(editor)
    learn = editor._learner.learn

    def learn_while_it_goes(*args):
        kept.rename(kept.parent / "moved")
        shutil.copytree(kept.parent / "moved", kept)
        return learn(*args)

    monkeypatch.setattr(editor._learner, "learn", learn_while_it_goes)
    with pytest.raises(ValueError, match="has been moved, replaced or deleted since"):
        editor.edit(fact(1))
    monkeypatch.undo()
    assert now(editor) == before
    assert len(read_history(kept)) == len(read_history(kept.parent / "moved")) == 2


def test_lost_editor_lets_others_have_its_directory(opened, kept, tokenizer, quick):
    BaFTEditor.open(make_model(), tokenizer, kept, quick)
    gc.collect()
    opened(hparams=None)


def test_fork_of_the_owner_does_not_write(opened, monkeypatch):
    editor = opened()
    monkeypatch.setattr(lock_module.os, "getpid", lambda: 1)
    with pytest.raises(ValueError, match="must be open in this process"):
        editor.edit(fact(0))
    editor.close()
    monkeypatch.undo()
    editor.edit(fact(0))


# ---- faults


class Fault:
    """Counts what goes to the disk, and does something before one of these steps, or each."""

    def __init__(self, monkeypatch, at, what):
        self.count, self.at, self.what, self.is_doing = 0, at, what, False
        for name in ("replace", "fsync", "open", "link", "unlink", "ftruncate"):
            monkeypatch.setattr(os, name, partial(self._step, getattr(os, name)))

    def _step(self, function, *args, **kwargs):
        if not self.is_doing:
            self.count += 1
            if self.at in (None, self.count - 1):
                self.is_doing = True
                self.what()
                self.is_doing = False
        return function(*args, **kwargs)


def attempt(use):
    """Returns what goes wrong, if anything."""
    try:
        use()
    except (OSError, KeyboardInterrupt) as failure:
        return failure


def failing(error):
    """A function that fails."""

    def fail(*args):
        raise error

    return fail


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EROFS, "Read-only file system"),
        KeyboardInterrupt(),
    ],
    ids=["full", "read-only", "interrupted"],
)
def test_failed_commit_changes_nothing(opened, kept, monkeypatch, error):
    editor = opened(checkpoint_every=2)
    editor.edit(fact(0))
    before, size = now(editor), len(of(editor))
    for at in range(100):
        with monkeypatch.context() as patch:
            fault = Fault(patch, at, failing(error))
            failure = attempt(lambda: editor.edit(fact(1)))
        if fault.count <= at:
            break
        if len(of(editor)) > size:  # it was complete, and the step only to tidy up
            assert failure is (error if isinstance(error, KeyboardInterrupt) else None)
            assert now(editor) == read_history(kept)[-1].state_hash
            editor.rollback(to=1)
            size = len(of(editor))
        elif failure is not error:
            assert f"{kept} could not take journal entry {size}: {error.strerror}" in str(failure)
            assert "the change was undone: free space or make it writable" in str(failure)
            assert failure.errno == error.errno
        assert now(editor) == before
        assert len(of(editor)) == size == len(read_history(kept))
    assert at > 8
    with opened(kept.parent / "twin") as twin:
        twin.edit(fact(0))
        twin.edit(fact(1))
        assert now(twin) == now(editor)
    editor.close()
    assert now(opened(hparams=None)) == now(twin)


def test_journal_that_cannot_be_written_follows_later(opened, kept, monkeypatch, caplog):
    editor = opened()
    editor.edit(fact(0))
    with monkeypatch.context() as patch:
        full = OSError(errno.ENOSPC, "No space left on device")
        patch.setattr(directory_module, "check_own", failing(full))
        editor.edit(fact(1))  # it is complete: the state file has its entry
        editor.undo()
    assert "journal.jsonl could not be brought up to date" in caplog.text
    assert len((kept / "journal.jsonl").read_text().splitlines()) == 2
    twin = shutil.copytree(kept, kept.parent / "twin")
    for path, use in ((kept, lambda: editor.edit(fact(2))), (twin, lambda: opened(twin, None))):
        assert [e.kind for e in read_history(path)] == ["start", "edit", "edit", "undo"]
        use()
        assert (path / "journal.jsonl").read_text().splitlines() == lines_of(path)
    assert now(editor) == read_history(kept)[4].state_hash


def copied_at_each_step(path, monkeypatch, use):
    """Returns copies of a directory as it is before each step to the disk, and in the end.

    Where a step changed nothing that is seen, there is one copy.
    """
    copies, contents = [], []

    def copy():
        content = files_under(path) if path.exists() else None
        if content is not None and content not in contents[-1:]:
            contents.append(content)
            to = path.parent / f"copy {len(list(path.parent.iterdir()))}"
            copies.append(shutil.copytree(path, to))

    with monkeypatch.context() as patch:
        Fault(patch, None, copy)
        use()
    copy()
    return copies


def test_crash_while_a_directory_is_begun_or_saved_is_recovered(
    opened, kept, tokenizer, monkeypatch
):
    for path in copied_at_each_step(kept, monkeypatch, lambda: opened().close()):
        opened(path).edit(fact(0))
    with opened(hparams=None) as editor:
        editor.edit(fact(0))
    twin = BaFTEditor.load(make_model(), tokenizer, kept)
    saved, before, found = kept.parent / "saved", now(twin), []
    twin.save(saved)
    twin.edit(fact(2))
    for path in copied_at_each_step(saved, monkeypatch, lambda: twin.save(saved)):
        found.append(now(BaFTEditor.load(make_model(), tokenizer, path)))
        assert now(opened(path, None)) == found[-1]
    assert found == sorted(found, key=[before, now(twin)].index)
    assert found[-1] == now(twin)


def test_crash_between_any_two_steps_is_recovered(opened, kept, monkeypatch):
    editor = opened(checkpoint_every=2)
    editor.edit(fact(0))
    before = now(editor)
    copies = copied_at_each_step(kept, monkeypatch, lambda: editor.edit(fact(1)))
    after, found = now(editor), []
    for path in copies:
        with opened(path, None) as again:
            found.append(now(again))
            assert found[-1] == of(again).entries[-1].state_hash
            assert not [f for f in path.rglob(".*") if f.is_file()]
            if found[-1] == before:
                again.edit(fact(1))
            assert now(again) == after
    assert found == sorted(found, key=[before, after].index)
    assert set(found) == {before, after}


def run_script(name, *arguments):
    """Run a script, in a process of its own; return its status and what it prints."""
    sys.argv = [name, *arguments]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        status = runpy.run_path(str(ROOT / "scripts" / name))["main"]()
    return status, printed.getvalue()


def test_kills_lose_nothing():
    with new_processes() as pool:
        run = pool.submit(run_script, "kill_test.py", "--kills", "3", "--edits", "8")
        status, printed = run.result()
    assert status == 0
    assert "nothing was lost, and the final states are bit-equal" in printed


# ---- recovery and damage


@pytest.fixture
def three(opened, kept):
    """The directory of three edits, with checkpoints after each two entries."""
    with opened(checkpoint_every=2) as editor:
        for i in range(3):
            editor.edit(fact(i))
    return kept


@pytest.mark.parametrize(
    ("cut", "damage"), [(0, ""), (1, "{}"), (50, "[" * 10_000)], ids=["empty", "other", "deep"]
)
def test_what_a_crash_cut_is_completed(opened, three, cut, damage):
    journal, config = (three / name for name in ("journal.jsonl", "baft_config.json"))
    text, copy = journal.read_text(), config.read_text()
    lines = text.splitlines(keepends=True)
    journal.write_text("".join(lines[:3]) + lines[3][:cut])
    config.write_text(damage)
    assert len(read_history(three)) == 4
    opened(hparams=None)
    assert (journal.read_text(), config.read_text()) == (text, copy)


@pytest.mark.parametrize("damage", ["cut", "flipped", "lost", "older"])
def test_damaged_state_goes_on_from_a_checkpoint(opened, three, damage):
    expected = read_history(three)[3].state_hash
    file = three / "baft.safetensors"
    data = file.read_bytes()
    hint = r"goes on from .*00000002.safetensors, the state after entry 2, and rollback\(to=...\)"
    uses = [lambda: opened(hparams=None), lambda: attach(make_model(), three)]
    if damage == "older":
        shutil.copy(three / "checkpoints/00000002.safetensors", file)
        hint, uses = "must end with entry 2, as baft.safetensors does, and ha", uses[:1]
    elif damage == "lost":
        file.unlink()
    else:
        file.write_bytes(data[:-9] if damage == "cut" else data[:-9] + b"\0\1\2\3\4\5\6\7\0")
    for use in uses:
        with pytest.raises(ValueError, match=hint):
            use()
    assert len(read_history(three)) == 4
    with opened(hparams=None, repair=True) as editor:
        assert now(editor) == read_history(three)[2].state_hash
        assert read_history(three)[4].to == 2
        editor.rollback(to=3)  # nothing is lost
        assert now(editor) == expected
    opened(hparams=None)


def test_checkpoint_of_an_edit_that_was_never_completed_is_passed_over(opened, three, tmp_path):
    with opened(tmp_path / "other", checkpoint_every=2) as other:
        other.edit(fact(5))
        other.edit(fact(6))
    shutil.copy(tmp_path / "other/checkpoints/00000002.safetensors", three / "checkpoints")
    expected = read_history(three)[2].state_hash
    with opened(hparams=None) as editor:
        editor.rollback(to=2)
        assert now(editor) == expected


@pytest.mark.parametrize("damage", ["checkpoints", "saved"])
def test_what_no_checkpoint_has_is_learned_again_from_a_new_edit(opened, three, tmp_path, damage):
    hashes, place = [entry.state_hash for entry in read_history(three)], three
    if damage == "checkpoints":
        shutil.rmtree(three / "checkpoints")
    else:
        with opened(hparams=None) as editor:
            place = editor.save(tmp_path / "saved") or tmp_path / "saved"
    with opened(place, None) as editor:
        editor.undo()
        assert now(editor) == hashes[2]
        editor.forget(fact(1)["prompt"])
        editor.rollback(to=0)
        assert now(editor) == hashes[0]


def test_what_came_before_a_snapshot_is_not_known(opened, three):
    (three / "journal.jsonl").unlink()
    with opened(hparams=None, repair=True) as editor:
        assert read_history(three)[0].content["snapshot_of"].endswith("; journal.jsonl was lost")
        editor.edit(fact(7))
    shutil.rmtree(three / "checkpoints")
    with opened(hparams=None) as editor:
        with pytest.raises(ValueError, match="no intact checkpoint of entry 0 or before it; the "):
            editor.undo()
        with pytest.raises(ValueError, match=r"'Fact.*; edits in the snapshot that it begins with"):
            editor.forget(fact(0)["prompt"])


def test_readers_tell_of_an_older_state(opened, three, caplog):
    def warned():
        caplog.clear()
        attach(make_model(), three)
        return "is the state after entry 3, and the journal goes on to entry 4" in caplog.text

    old = (three / "baft.safetensors").read_bytes()
    assert not warned()
    with opened(hparams=None) as editor:
        editor.edit(fact(4))
    assert not warned()
    (three / "baft.safetensors").write_bytes(old)
    assert warned()


def test_nothing_intact_is_said(opened, three):
    for file in [three / "baft.safetensors", *(three / "checkpoints").iterdir()]:
        file.write_bytes(b"")
    with pytest.raises(ValueError, match="there is no intact checkpoint: restore the directory"):
        opened(hparams=None)
    with pytest.raises(ValueError, match=r"cannot be repaired: neither baft.safetensors nor"):
        opened(hparams=None, repair=True)


@pytest.mark.parametrize(
    ("fact_number", "message"),
    [
        (0, r"journal.jsonl is damaged at line 3 .*load\(\) reads the state alone"),
        (2, "must tell one history, and do not"),  # the state has the last line, too
    ],
)
def test_damaged_journal_leaves_the_state_to_load_and_save(
    opened, three, tokenizer, tmp_path, fact_number, message
):
    file = three / "journal.jsonl"
    file.write_text(file.read_text().replace(f"number {fact_number}", "number 7"))
    for use in (lambda: opened(hparams=None), lambda: read_history(three)):
        with pytest.raises(ValueError, match=message):
            use()
    editor = BaFTEditor.load(make_model(), tokenizer, three)
    editor.save(tmp_path / "new")
    assert now(opened(tmp_path / "new", None)) == now(editor)


def interleaved(path, opened):
    """Two writers of one directory, as without a lock: three commits each."""
    opened(path).close()
    shutil.copytree(path, path.parent / "other")
    for directory in (path, path.parent / "other"):
        with opened(directory, None) as editor:
            for i in range(3):
                editor.edit(fact(i))
    own, other = (directory / "journal.jsonl" for directory in (path, path.parent / "other"))
    start, *lines = own.read_text().splitlines(keepends=True)
    pairs = zip(lines, other.read_text().splitlines(keepends=True)[1:], strict=True)
    own.write_text(start + "".join(line for pair in pairs for line in pair))
    shutil.copy(path.parent / "other/baft.safetensors", path)


def test_split_journal_is_repaired(opened, kept, tokenizer):
    interleaved(kept, opened)
    expected = read_history(kept.parent / "other")[-1]
    split = (kept / "journal.jsonl").read_bytes()
    with pytest.raises(ValueError, match="repair=True"):
        opened(hparams=None)
    with opened(hparams=None, repair=True) as editor:
        assert now(editor) == expected.state_hash
        assert (kept / "before-repair-1/journal.jsonl").read_bytes() == split
        start = read_history(kept)[0]
        assert start.content["snapshot_of"] == (
            f"{expected.reference}; journal.jsonl, now in before-repair-1, could not be read, or "
            "did not lead to it"
        )
        editor.edit(fact(8))
        editor.rollback(to=0)
        assert now(editor) == expected.state_hash
    opened(hparams=None)


@pytest.mark.usefixtures("limited")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["baft.safetensors", "journal.jsonl"])
def test_what_is_no_file_is_refused_until_it_is_repaired(opened, three, kind, name, tokenizer):
    expected = read_history(three)
    make_special(kind, three / name)
    uses = [lambda: opened(hparams=None)]
    if name == "baft.safetensors":
        uses.append(lambda: attach(make_model(), three))
    else:
        assert state_hash(BaFTEditor.load(make_model(), tokenizer, three)._learner.state())
    for use in uses:
        with pytest.raises((ValueError, OSError), match=name):
            use()
    with opened(hparams=None, repair=True) as editor:
        at = 2 if name == "baft.safetensors" else 3
        assert now(editor) == expected[at].state_hash
        editor.edit(fact(8))
    kept_aside = three / "before-repair-1" / name
    assert os.path.lexists(kept_aside)
    assert not kept_aside.is_dir() or (kept_aside / "something").read_text() == "of value"
    with opened(hparams=None) as editor:
        assert len(of(editor)) == (3 if name == "journal.jsonl" else 6)


def test_journal_that_is_a_link_is_not_written_through(opened, three, caplog):
    elsewhere = (three / "journal.jsonl").rename(three.parent / "elsewhere")
    (three / "journal.jsonl").symlink_to(elsewhere)
    before = elsewhere.read_bytes()
    match = "journal.jsonl must be a regular file; it is a symbolic link, through which nothing is"
    with pytest.raises(ValueError, match=r"journal.jsonl must be a regular file, not a link to o"):
        opened(hparams=None)
    shutil.copy(elsewhere, three / "a copy")
    (three / "a copy").replace(three / "journal.jsonl")
    with opened(hparams=None) as editor:
        (three / "journal.jsonl").unlink()
        (three / "journal.jsonl").symlink_to(elsewhere)
        editor.edit(fact(8))  # the state has it
    assert match in caplog.text
    assert elsewhere.read_bytes() == before
    assert len(read_history(three)) == 5


@pytest.mark.parametrize("lost", ["journal", "journal and state", "damaged both"])
def test_newest_whole_state_is_gone_on_from(opened, three, lost):
    expected = read_history(three)
    (three / "checkpoints/00000000.safetensors").write_bytes(b"damaged")
    if lost == "damaged both":
        for name in ("journal.jsonl", "baft.safetensors"):
            (three / name).write_bytes(b"\0" * 1000)
    else:
        for name in ("journal.jsonl", "baft.safetensors")[: 2 if "and" in lost else 1]:
            (three / name).unlink()
    checkpoint = (three / "checkpoints/00000002.safetensors").read_bytes()
    with pytest.raises(ValueError, match=r"repair=True"):
        opened()
    with opened(hparams=None, repair=True) as editor:
        assert now(editor) == expected[3 if lost == "journal" else 2].state_hash
        editor.edit(fact(8))
    aside = three / "before-repair-1"
    assert (aside / "checkpoints/00000000.safetensors").read_bytes() == b"damaged"
    assert (aside / "checkpoints/00000002.safetensors").read_bytes() == checkpoint
    assert (aside / "baft.safetensors").exists() == (lost != "journal and state")
    new = sorted(f.name for f in (three / "checkpoints").iterdir())
    assert new == ["00000000.safetensors", "00000001.safetensors"]  # the first environment known
    with opened(hparams=None) as editor:
        editor.rollback(to=0)
        assert now(editor) == expected[3 if lost == "journal" else 2].state_hash


class Past(datetime):
    """A clock that was set back."""

    @classmethod
    def now(cls, tz=None):
        return datetime(2001, 1, 1, tzinfo=tz)


def misplace_config(path):
    """Puts a folder in the place of the configuration, so that the directory needs a repair."""
    (path / "baft_config.json").unlink()
    (path / "baft_config.json").mkdir()


def test_clock_that_was_set_back_does_not_roll_back(opened, three, monkeypatch):
    monkeypatch.setattr(journal_module, "datetime", Past)
    with opened(hparams=None) as editor:
        editor.edit(fact(3))
        last = now(editor)
    expected = read_history(three)
    assert expected[4].time < expected[2].time
    misplace_config(three)
    with opened(hparams=None, repair=True) as editor:
        assert now(editor) == last
        assert of(editor).entries[:-1] == expected
        assert of(editor).entries[-1].to == 4


@pytest.mark.parametrize("num_lines", [0, 1])
def test_repair_completes_the_journal_by_the_state(opened, kept, num_lines):
    opened().close()
    with opened(hparams=None) as editor:
        for i in range(num_lines):
            editor.edit(fact(i))
    expected = read_history(kept)
    cut = "".join(f"{entry.line}\n" for entry in expected[:num_lines]) + expected[-1].line[:50]
    (kept / "journal.jsonl").write_text(cut)
    misplace_config(kept)
    with opened(hparams=None, repair=True) as editor:
        assert of(editor).entries[:-1] == expected
        assert now(editor) == expected[-1].state_hash
    assert (kept / "journal.jsonl").read_text().splitlines() == lines_of(kept)
    assert (kept / "before-repair-1/journal.jsonl").read_text() == cut


@pytest.mark.parametrize("name", ["baft.safetensors", "journal.jsonl"])
def test_file_that_cannot_be_opened_now_is_no_damage(opened, three, monkeypatch, name):
    def refused(file, *args):
        if Path(file).name == name:
            raise PermissionError(errno.EACCES, "Permission denied", str(file))
        return open(file, *args)

    for is_damaged in (False, True):
        if is_damaged:
            misplace_config(three)
        with monkeypatch.context() as patch:
            patch.setattr(paths, "open", refused, raising=False)
            for use in (lambda: opened(hparams=None, repair=True), lambda: read_history(three)):
                with pytest.raises(PermissionError, match=name):
                    use()
        assert not list(three.glob("before-repair-*"))


def test_crash_during_a_repair_is_repaired(opened, kept, monkeypatch):
    interleaved(kept, opened)
    (kept / "journal.jsonl").write_text("{}\n" * 3)
    expected = read_history(kept.parent / "other")[-1].state_hash
    repair = lambda: opened(hparams=None, repair=True).close()  # noqa: E731
    for path in copied_at_each_step(kept, monkeypatch, repair):
        with opened(path, None, repair=True) as editor:
            assert now(editor) == expected
            editor.edit(fact(8))
        aside = [f.read_text() for f in path.glob("before-repair-*/journal.jsonl")]
        assert "{}\n" * 3 in aside


# ---- the command line


def test_edits_of_the_command_line_are_kept(tmp_path, saved, capsys, refused):
    file = tmp_path / "mine.yaml"
    file.write_text("{model_name: m, layers: [1, 3], rank: 4, num_steps: 1, device: cpu}")
    options = ["--model", saved, "--device", "cpu", "--target", "Rome", "--allow-unlearned"]
    kept, other = str(tmp_path / "kept"), str(tmp_path / "other")

    def edit(prompt, *more):
        assert main(["edit", "--prompt", prompt, *options, *more]) == 0

    edit("The capital of France is", "--hparams", str(file), "--save", kept)
    edit("The capital of Spain is", "--save", kept)
    edit("The capital of Malta is", "--from", kept, "--save", other)
    capsys.readouterr()
    assert main(["history", kept]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "edit     The capital of Spain is -> Rome [1 steps, loss " in lines[2]
    assert main(["history", kept, "--json"]) == 0
    entries = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [e["id"] for e in entries] == [0, 1, 2]
    assert lines_of(other)[:3] == lines_of(kept)
    assert read_history(other)[3].requests[0]["prompt"] == "The capital of Malta is"
    edit("The capital of Peru is", "--from", kept, "--save", str(tmp_path / "third"))
    for target in ([str(tmp_path / "third"), "--from", other], [other, "--from", kept]):
        command = ["edit", "--prompt", "a", *options, "--save", *target]
        refused(command, "holds another edit with a history of 4 entries")
    edit("The capital of Malta is", "--from", kept, "--save", kept)
    assert len(read_history(kept)) == 4


@pytest.mark.slow
def test_many_edits_cost_no_more(tmp_path):
    data = tmp_path / "data.json"
    data.write_text(json.dumps([fact(i) for i in range(30)]))
    command = [sys.executable, str(ROOT / "scripts/soak.py"), "--model", "bundled", "--data", data]
    command += ["--edits", "100", "--out", str(tmp_path / "out"), "--layers", "1", "--steps", "1"]
    own = {**os.environ, "PYTHONPATH": str(ROOT)}  # this package, whatever is installed
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=own)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count(": yes") == 6
    assert len((tmp_path / "out/soak.jsonl").read_text().splitlines()) == 1


def test_new_directory_needs_hparams(opened, kept, monkeypatch):
    rule = r"hparams must be given to begin an edit in .*, for nothing was begun there; got None"
    with pytest.raises(ValueError, match=rule):
        opened(hparams=None)
    assert not kept.exists()
    monkeypatch.setattr("baft_easyedit.editor.holds_edit", lambda _: True)  # as just before
    with pytest.raises(ValueError, match=rule):
        opened(hparams=None)


def test_edits_after_an_environment_changed_can_be_undone_where_earlier_ones_come_out_otherwise(
    model, tokenizer, quick, request_dict, tmp_path, monkeypatch
):
    path = tmp_path / "kept"
    other = {"prompt": "Water boils at", "target_new": "Rome"}
    with BaFTEditor.open(model, tokenizer, path, quick) as editor:
        editor.edit(request_dict)
        before = editor.model_edit.snapshot()
        editor.model_edit.detach()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    with BaFTEditor.open(model, tokenizer, path) as editor:
        editor.edit(other)
        editor.edit(other)
        editor.model_edit.detach()
    monkeypatch.setattr(Learner, "learn", None)
    with BaFTEditor.open(model, tokenizer, path) as editor:
        editor.rollback(to=2)  # entry 2 is of the new environment
        after = editor.model_edit.snapshot()
        assert all(torch.equal(before[name], after[name]) for name in before)
        editor.model_edit.detach()
