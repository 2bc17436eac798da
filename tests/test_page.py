"""The page `baft-easyedit ui`: what it does without Gradio, and the whole of it in a browser."""

import re
import shutil
import socket
import sys
from types import SimpleNamespace

import pytest

from baft_easyedit.cli import main
from baft_easyedit.editor import BaFTEditor
from baft_easyedit.page.desk import Desk, gate_weights
from baft_easyedit.storage.reading import read_history
from tests.conftest import make_model, make_tokenizer

FRANCE = ("The capital of France is", "Rome", "France", "Water boils\n\nIce is cold\n")
WATER = ("Water freezes into", "sand")
TEMPLATE = "<s>{% for m in messages %}[user]{{ m.content }}[is]{% endfor %}"
SUBJECT = "Subject, a part of the prompt (optional)"
CHROMIUM = shutil.which("chromium")
SWITCHES = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
)


@pytest.fixture
def desk(tmp_path, hparams):
    pytest.importorskip("matplotlib")
    with BaFTEditor.open(make_model(), make_tokenizer(), tmp_path / "kept", hparams) as editor:
        yield Desk(editor, tmp_path / "kept")


def test_an_edit_is_learned_listed_and_taken_back(desk):
    base, edited, gates = desk.ask(FRANCE[0], max_new_tokens=5)
    assert (base, gates) == (edited, None)
    assert desk.learn(*FRANCE).startswith("Learned: ")
    (request,) = read_history(desk.directory)[-1].requests
    assert request["loc_prompt"] == ["Water boils", "Ice is cold"]
    assert desk.ask(FRANCE[0], max_new_tokens=5)[:2] == (base, "Rome")
    assert desk.rows() == [[1, "edit", *FRANCE[:2], "yes"], [0, "start", "", "", "yes"]]
    assert desk.undo() == "Now the state is that after entry 0."
    assert desk.ask(FRANCE[0], max_new_tokens=5) == (base, base, None)
    assert desk.rows()[:2] == [[2, "undo to 0", "", "", ""], [1, "edit", *FRANCE[:2], ""]]
    assert desk.rollback(1) == "Now the state is that after entry 1."
    assert desk.ask(FRANCE[0], max_new_tokens=5)[1] == "Rome"


def test_one_fact_is_forgotten_and_the_later_ones_stay(desk):
    desk.learn(*FRANCE)
    desk.learn(*WATER)
    steps = []
    told = desk.forget(FRANCE[0], lambda *at: steps.append(at))
    assert steps == [(0, 1), (1, 1)]
    assert told.startswith("Forgotten; later edits learned again: 1, not learned: 0.")
    assert told.endswith("go to entry 2.")
    rows = [row[1:] for row in desk.rows()]
    assert rows[:2] == [["edit", *WATER, "yes"], ["forget", FRANCE[0], "", ""]]
    assert desk.ask(WATER[0], max_new_tokens=5)[1] == "sand"


def test_of_the_edits_of_a_prompt_the_latest_is_in_force(desk):
    for target in ("Rome", "Oslo"):
        desk.learn(FRANCE[0], target)
    assert [row[3:] for row in desk.rows()] == [["Oslo", "yes"], ["Rome", ""], ["", "yes"]]
    desk.undo()
    assert [row[3:] for row in desk.rows()[1:3]] == [["Oslo", ""], ["Rome", "yes"]]


def test_progress_of_a_batch_counts_calls(desk):
    keys, steps = ("prompt", "target_new"), []
    desk.editor.edit([dict(zip(keys, texts, strict=False)) for texts in (FRANCE, WATER)])
    desk.learn("Ice is", "hot")
    for prompt in (FRANCE[0], WATER[0]):
        desk.forget(prompt, lambda done, total: steps.append((done, total)))
    assert steps == [(0, 2), (1, 2), (2, 2), (0, 1), (1, 1)]


def test_what_was_not_learned_is_told(desk):
    desk.editor.hparams.num_steps = 1
    assert re.match(r"Made, but not learned .*: 1 steps", desk.learn(*FRANCE))


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda desk: desk.ask(" \n"), "prompt must not be empty: write one"),
        (lambda desk: desk.ask("a" * 250), "context of 256 tokens; got 251 and 32: shorten one"),
        (lambda desk: desk.learn("a" * 300, "b"), "context of 256 tokens"),
        (lambda desk: desk.learn(*FRANCE[:2], "Spain"), "subject must be a part of the prompt"),
        (lambda desk: desk.undo(), "there is no edit to undo"),
        (lambda desk: desk.rollback(None), r"to must be in \[0, 0\], the journal's ids; got -1"),
        (lambda desk: desk.forget("Ice is", print), "prompt must be that of an edit"),
    ],
)
def test_what_cannot_be_done_is_told_and_changes_nothing(desk, act, message):
    with pytest.raises(ValueError, match=message):
        act(desk)
    assert [entry.kind for entry in read_history(desk.directory)] == ["start"]
    assert not desk.editor.is_attached


def test_a_prompt_is_put_into_the_chat_template_if_asked(desk, monkeypatch):
    monkeypatch.setattr(desk.editor.tokenizer, "chat_template", TEMPLATE)
    desk.learn(*WATER)
    plain, chatted = (desk.ask(WATER[0], chat, 5)[1] for chat in (None, True))
    assert desk.ask(WATER[0], False, 5)[1] == plain == "sand" != chatted
    assert desk.ask(f"[user]{WATER[0]}[is]", False, 5)[1] == chatted


def test_gates_are_drawn_where_the_edit_acts(desk):
    desk.learn(*WATER)
    ids = desk.editor.tokenizer("abcdefghij")["input_ids"]
    weights = gate_weights(desk.editor, ids, 6)
    assert weights.shape == (2, 11)
    acts = ~weights.isnan()
    assert acts.tolist() == [[False] * 3 + [True] * 8] * 2
    assert ((weights[acts] >= 0) & (weights[acts] <= 1)).all()
    with desk.editor.model_edit.disabled():
        assert gate_weights(desk.editor, ids, 6).shape == (0, 11)


@pytest.mark.parametrize("prompt", ["$x^{$ costs \\frac", "<b>עברית</b> 中文 \U0001f600", "\0\n\t"])
def test_any_text_is_drawn(desk, prompt, tmp_path):
    desk.learn(*WATER)
    *_, gates = desk.ask(prompt, max_new_tokens=30)
    gates.savefig(tmp_path / "it.png", dpi=20)
    axes = gates.axes[0]
    assert len(axes.get_xticks()) <= 40
    assert [label.get_text() for label in axes.get_yticklabels()] == ["1", "3"]


def test_without_gradio_the_command_names_the_extra(monkeypatch, refused):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "baft_easyedit.page.blocks", raising=False)
    refused(["ui"], "ui needs the extra 'ui'")


def test_the_command_ends_with_its_scratch_directory(saved, tmp_path, monkeypatch, capsys):
    desks = []

    def launch(desk, host, port):
        desks.append(desk)
        assert desk.learn(*WATER)
        return SimpleNamespace(local_url="http://here", block_thread=lambda: None)

    monkeypatch.setitem(sys.modules, "baft_easyedit.page.blocks", SimpleNamespace(launch=launch))
    (tmp_path / "mine.yaml").write_text(f"model_name: {saved}\nlayers: [1, 3]\nrank: 4\n")
    assert main(["ui", "--hparams", str(tmp_path / "mine.yaml"), "--device", "cpu"]) == 0
    assert "a page at http://here of" in capsys.readouterr().err
    (desk,) = desks
    assert desk.lock.locked()
    assert not desk.directory.exists()


def test_an_address_that_is_taken_is_refused_before_a_model_is_loaded(refused):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        command = ["ui", "--model", "nowhere", "--port", taken.getsockname()[1]]
        refused(command, "must be an address of this machine that is free")


def test_the_page_has_what_the_desk_does(desk):
    pytest.importorskip("gradio")
    from baft_easyedit.page.blocks import make_page

    parts = make_page(desk).config["components"]
    labels = [part["props"].get("label") or part["props"].get("value") for part in parts]
    for name in ("Prompt", "Ask", "Learn", "Undo the latest", "Base model", "Edited model"):
        assert name in labels


@pytest.fixture
def called(monkeypatch):
    """The addresses that this process connects to, or looks up."""
    found = []
    for owner, name, place in ((socket.socket, "connect", 1), (socket, "getaddrinfo", 0)):
        real = getattr(owner, name)

        def noted(*given, real=real, place=place, **more):
            found.append(given[place])
            return real(*given, **more)

        monkeypatch.setattr(owner, name, noted)
    return found


@pytest.fixture
def page(desk, tmp_path, called):
    """The page in a browser; neither side of it calls anything but this machine."""
    pytest.importorskip("gradio")
    sync_api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no chromium")
    from baft_easyedit.page.blocks import launch

    blocks, asked = launch(desk, "127.0.0.1", None), []
    try:
        with sync_api.sync_playwright() as playwright:
            context = playwright.chromium.launch_persistent_context(
                tmp_path / "browser", executable_path=CHROMIUM, args=SWITCHES
            )
            context.on("request", lambda request: asked.append(request.url))
            page = context.new_page()
            page.goto(blocks.local_url)
            yield page
            context.close()
    finally:
        blocks.close(verbose=False)
    own = (blocks.local_url, "data:", "blob:")
    assert [url for url in asked if not url.startswith(own)] == []
    hosts = {address[0] if isinstance(address, tuple) else address for address in called}
    assert hosts <= {"127.0.0.1", "localhost"}


def filled(page, label, text):
    page.get_by_label(label, exact=True).fill(text)


def shows(page, label, text):
    """Wait until a field holds a text."""
    from playwright.sync_api import expect

    expect(page.get_by_label(label, exact=True)).to_have_value(text, timeout=60_000)


@pytest.mark.slow
def test_an_edit_is_made_seen_and_taken_back_in_a_browser(page, desk):
    base = desk.ask(FRANCE[0])[0]
    press = lambda name: page.get_by_role("button", name=name).click()  # noqa: E731
    press("Undo the latest")
    page.get_by_text("there is no edit to undo").wait_for()
    filled(page, "Prompt", FRANCE[0])
    filled(page, "New answer to the prompt", "<b>Rome</b>")
    filled(page, SUBJECT, "<i>Spain</i>")
    press("Learn")
    page.get_by_text("subject must be a part of the prompt; '<i>Spain</i>'").wait_for()
    filled(page, SUBJECT, "France")
    press("Learn")
    page.get_by_role("gridcell", name="<b>Rome</b>").wait_for()
    edited = desk.ask(FRANCE[0])[1]
    assert edited.startswith("<b>Rome</b>")
    shows(page, "Edited model", edited)
    shows(page, "Base model", base)
    page.locator("img[src^='data:image']").wait_for()
    other = page.context.new_page()
    other.goto(page.url)
    other.get_by_role("gridcell", name="<b>Rome</b>").wait_for()
    press("Undo the latest")
    shows(page, "What came of it", "Now the state is that after entry 0.")
    shows(page, "Edited model", base)
    page.get_by_role("gridcell", name="undo to 0").wait_for()
    page.get_by_role("gridcell", name=FRANCE[0]).click()
    shows(page, "Prompt of an edit", FRANCE[0])
    press("Go to the state after it")
    shows(page, "What came of it", "Now the state is that after entry 1.")
    press("Forget it")
    told = "Forgotten; later edits learned again: 0, not learned: 0. To bring it back, go to entry"
    shows(page, "What came of it", f"{told} 3.")
    assert not desk.editor.is_attached
