"""Taking one edit back and keeping the later ones."""

import shutil
from dataclasses import replace

import pytest

from baft_easyedit import BaFTEditor
from baft_easyedit.cli import main
from baft_easyedit.storage.reading import read_history
from baft_easyedit.training.learner import Learner
from tests.conftest import fact, now


@pytest.fixture
def edited(opened, tmp_path):
    """Opens an edit of a fresh model in a directory of its own, and makes edits."""

    def edit(name, hparams, *edits):
        editor = opened(tmp_path / name, hparams)
        for requests in edits:
            editor.edit(requests)
        return editor

    return edit


def test_what_is_forgotten_was_never_learned(edited, quick, tmp_path):
    editor = edited("kept", quick, fact(0), fact(1), [fact(2), fact(3)], fact(4))
    before = now(editor)
    reports = editor.forget(fact(1)["prompt"])
    assert [report.num_requests for report in reports] == [2, 1]
    assert now(editor) == now(edited("other", quick, fact(0), [fact(2), fact(3)], fact(4)))
    reports = editor.forget(fact(2)["prompt"])
    assert [report.num_requests for report in reports] == [1, 1]
    assert now(editor) == now(edited("more", quick, fact(0), fact(3), fact(4)))
    kinds = [entry.kind for entry in read_history(tmp_path / "kept")]
    assert kinds[5:] == ["rollback", "edit", "edit", "rollback", "edit", "edit"]
    told = read_history(tmp_path / "kept")[5].summary()
    assert told.endswith("to 1 to forget Fact number 1 is")
    editor.rollback(to=4)
    assert now(editor) == before


def test_all_edits_of_a_prompt_are_forgotten(edited, quick):
    editor = edited("kept", quick, fact(0), fact(1), {**fact(0), "target_new": "other"})
    editor.forget(fact(0)["prompt"])
    assert now(editor) == now(edited("other", quick, fact(1)))


def test_later_edits_keep_their_settings(edited, quick):
    slower = replace(quick, lr=1.0e-4)
    editor = edited("kept", quick, fact(0))
    for hparams, i in ((slower, 1), (quick, 2)):
        editor.hparams = hparams
        editor.edit(fact(i))
    editor.forget(fact(0)["prompt"])
    other = edited("other", slower, fact(1))
    other.hparams = quick
    other.edit(fact(2))
    assert now(editor) == now(other)
    assert editor.hparams.lr == quick.lr


@pytest.fixture
def learned(monkeypatch):
    """How many requests each call of the learner was for."""
    learn, calls = Learner.learn, []

    def counts(self, requests, hparams):
        calls.append(len(requests))
        return learn(self, requests, hparams)

    monkeypatch.setattr(Learner, "learn", counts)
    return calls


AGAIN = {**fact(0), "target_new": "other"}
SHORT = [{**fact(i), "prompt": prompt} for i, prompt in enumerate(("Ab", "Ac", "Ad"))]


@pytest.mark.parametrize(
    ("edits", "gone", "num_learned"),
    [
        ([[fact(0)], [fact(1)], [fact(2), fact(3)], [fact(4)]], fact(1), []),
        ([[fact(0)], [fact(1)], [fact(2), fact(3)], [fact(4)]], fact(2), [1]),
        ([[fact(0)], [fact(1)]], fact(0), []),  # the first has the statistics
        ([[fact(0)], [fact(1)]], fact(1), []),
        ([[fact(0)], [fact(1)], [AGAIN], [fact(2)]], fact(1), [1]),  # the first, which went
        ([[fact(0)], [fact(1)], [AGAIN], [fact(2)]], AGAIN, []),
        ([[SHORT[0]], [SHORT[1]], [SHORT[2]]], SHORT[0], [1, 1]),  # they share the first state
    ],
)
def test_edits_with_bases_of_their_own_stay_as_they_are(
    edits, gone, num_learned, edited, opened, quick, learned, tmp_path
):
    hparams = replace(quick, min_similarity=0.6, use_subject=False)
    prompt = gone["prompt"]
    rest = [[request for request in call if request["prompt"] != prompt] for call in edits]
    edited("kept", hparams, *edits).close()
    editor = opened(tmp_path / "kept", None)
    learned.clear()
    editor.forget(prompt)
    assert learned == num_learned
    assert now(editor) == now(edited("other", hparams, *filter(None, rest)))


def test_a_state_whose_edits_are_there_still_is_restored_without_learning(
    edited, opened, quick, learned, tmp_path
):
    edits = [[fact(0), fact(1)], [fact(2)], [fact(3)]]
    edited("kept", replace(quick, min_similarity=0.6), *edits).close()
    hashes = [entry.state_hash for entry in read_history(tmp_path / "kept")]
    editor = opened(tmp_path / "kept", None)
    learned.clear()
    for to in (2, 1, 0):
        editor.rollback(to=to)
        assert now(editor) == hashes[to]
    assert learned == []


TRIMMED = "{% for m in messages %}<{{ m['content'] | trim }}>{% endfor %}"
ALIKE = {**fact(1), "prompt": fact(1)["prompt"] + " ", "target_new": "no 7"}


@pytest.mark.parametrize(
    ("edits", "gone"),
    [
        ([("plain", fact(0)), ("chat", fact(1)), ("chat", fact(2))], 0),  # other statistics
        ([("chat", fact(0)), ("plain", fact(1)), ("plain", fact(2))], 0),
        ([("plain", fact(0)), ("chat", fact(1)), ("chat", fact(2)), ("plain", fact(3))], 1),
        # A prompt has two edits, and two prompts have one.
        (
            [("plain", fact(0))]
            + [("chat", request) for request in (fact(0), fact(2), fact(1), ALIKE)],
            2,
        ),
    ],
)
def test_what_is_forgotten_was_never_learned_in_a_template_or_out_of_it(
    edits, gone, tokenizer, edited, opened, quick, tmp_path
):
    tokenizer.chat_template = TRIMMED
    forms = {"plain": replace(quick, min_similarity=0.6, use_subject=False)}
    forms["chat"] = replace(forms["plain"], use_chat_template=True)

    def made(name, edits):
        editor = edited(name, forms[edits[0][0]])
        for form, request in edits:
            editor.hparams = forms[form]
            editor.edit(request)
        return editor

    editor = made("kept", edits)
    editor.forget(fact(gone)["prompt"])
    rest = [one for one in edits if one[1]["prompt"] != fact(gone)["prompt"]]
    assert now(editor) == now(made("other", rest))
    states = {entry.id: entry.state_hash for entry in read_history(tmp_path / "kept")}
    last = len(states) - 1
    editor.edit({**rest[-1][1], "target_new": "no 8"})
    editor.close()
    again = opened(tmp_path / "kept", None)
    again.rollback(to=last)
    assert now(again) == states[last]


def test_edits_of_a_snapshot_are_not_taken_for_later_ones(
    tokenizer, edited, opened, quick, tmp_path
):
    tokenizer.chat_template = TRIMMED
    hparams = replace(quick, min_similarity=0.6, use_subject=False, use_chat_template=True)
    edited("kept", hparams, fact(9)).close()
    (tmp_path / "kept/journal.jsonl").unlink()
    opened(tmp_path / "kept", None, repair=True).close()
    shutil.copytree(tmp_path / "kept", tmp_path / "other")
    editor, other = opened(tmp_path / "kept", None), opened(tmp_path / "other", None)
    for request in (fact(2), fact(1), ALIKE):
        editor.edit(request)
        if request != fact(2):
            other.edit(request)
    editor.forget(fact(2)["prompt"])
    assert now(editor) == now(other)


def test_an_entry_that_cannot_be_read_now_is_in_nobodys_way(
    tokenizer, edited, opened, quick, tmp_path
):
    tokenizer.chat_template = TRIMMED
    plain = replace(quick, min_similarity=0.6, use_subject=False)
    editor = edited("kept", replace(plain, use_chat_template=True), fact(0))
    editor.hparams = plain
    editor.edit(fact(1))
    before = now(editor)
    editor.edit(fact(2))
    editor.close()
    tokenizer.chat_template = None
    editor = opened(tmp_path / "kept", plain)
    editor.forget(fact(2)["prompt"])
    assert now(editor) == before


def test_if_an_edit_fails_all_is_as_it_was(edited, quick, monkeypatch):
    editor = edited("kept", quick, fact(0), fact(1), fact(2))
    before, learn, calls = now(editor), Learner.learn, []

    def fails_once(self, *arguments):
        calls.append(1)
        if len(calls) == 2:
            raise FloatingPointError("loss")
        return learn(self, *arguments)

    monkeypatch.setattr(Learner, "learn", fails_once)
    with pytest.raises(FloatingPointError, match="loss"):
        editor.forget(fact(0)["prompt"])
    assert now(editor) == before
    assert editor.edit(fact(3)).num_requests == 1


@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_kill_leaves_what_was_before(at, edited, opened, quick, tmp_path, monkeypatch):
    """Until the commit of all, the directory is not written to at all."""
    editor = edited("kept", quick, fact(0), fact(1), fact(2))
    before, learn, calls = now(editor), Learner.learn, []
    files = {f: f.read_bytes() for f in (tmp_path / "kept").rglob("*") if f.is_file()}

    def looks(self, *arguments):
        calls.append({f: f.read_bytes() for f in files})
        return learn(self, *arguments)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Learner, "learn", looks)
    monkeypatch.setattr("baft_easyedit.storage.directory.KeptDirectory._replace_state", full)
    with pytest.raises(OSError, match="the change was undone: free space"):
        editor.forget(fact(at)["prompt"])
    assert calls == [files] * (2 - at)
    assert now(editor) == before
    monkeypatch.undo()
    editor.forget(fact(at)["prompt"])
    editor.close()
    assert now(opened(hparams=None)) == now(editor)


def test_what_a_snapshot_still_does_is_not_forgotten(edited, opened, quick, tmp_path):
    hparams = replace(quick, min_similarity=0.6, num_steps=40, lr=3.0e-2)
    edited("kept", hparams, fact(0)).close()
    (tmp_path / "kept/journal.jsonl").unlink()
    editor = opened(tmp_path / "kept", None, repair=True)
    editor.edit({**fact(0), "prompt": f"{fact(0)['prompt']} still"})
    editor.edit(fact(0))
    editor.forget(f"{fact(0)['prompt']} still")
    before = now(editor)
    with pytest.raises(
        ValueError, match=r"Fact.* is still edited by the snapshot that the journal"
    ):
        editor.forget(fact(0)["prompt"])
    assert now(editor) == before


def test_what_cannot_be_forgotten_is_refused(edited, quick, model, tokenizer):
    editor = edited("kept", quick, fact(0))
    before = now(editor)
    with pytest.raises(ValueError, match=r"prompt must be that of an edit in .*kept; got 'x'"):
        editor.forget("x")
    editor.install(editor.learn_apart([fact(1)])[0], fact(1))
    with pytest.raises(ValueError, match=r"entry 2 of .* must be an edit .* it is an install"):
        editor.forget(fact(0)["prompt"])
    editor.undo()
    assert now(editor) == before
    with pytest.raises(ValueError, match="forget needs the journal of a directory, and none is"):
        BaFTEditor(model, tokenizer, quick).forget("x")


def test_command_says_what_was_learned_again(edited, quick, tmp_path, saved, capsys):
    edited("kept", replace(quick, num_steps=30, lr=3.0e-2), fact(0), fact(1)).close()
    forget = ["forget", str(tmp_path / "kept"), "--model", saved, "--device", "cpu"]
    assert main([*forget, "--prompt", fact(0)["prompt"]]) == 0
    told = capsys.readouterr().out
    assert "later edits learned again: 1; requests of them not learned: 0" in told
    back = f"rollback {tmp_path / 'kept'} --to 2 --model {saved}"
    assert f"`baft-easyedit {back}` brings it back" in told
    assert main([*back.split(), "--device", "cpu"]) == 0
