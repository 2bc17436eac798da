import dataclasses
import json
from dataclasses import fields

import pytest

from baft_easyedit import EditReport
from baft_easyedit.storage.journal import (
    MAX_LINE,
    Entry,
    Journal,
    edit_content,
    parse_lines,
    read_lines,
    to_json,
)
from baft_easyedit.training.loop import StepLosses
from baft_easyedit.training.requests import EditRequest

SETTINGS = {"hparams": {"rank": 4}, "environment": {}}
LOSSES = (StepLosses(3.0, 0.5), StepLosses(1.0, 0.25), StepLosses(0.5, 0.125))
REPORT = edit_content([], EditReport(1, 2, LOSSES, False, 0.1))["report"]
EDIT = {"requests": [{"prompt": "a", "target_new": "b"}], "report": REPORT}


def grown(*changes):
    """A journal of edits (None) and returns (where to)."""
    journal = Journal()
    journal.append(journal.next("start", "h0", SETTINGS))
    for i, to in enumerate(changes, 1):
        kind, content = ("edit", EDIT) if to is None else ("rollback", {"to": to})
        journal.append(journal.next(kind, f"h{i}", content))
    return journal


def test_entries_form_a_tree():
    journal = grown(None, None, 1, None, 2, None)  # 1 - 2 - 6, and 1 - 4
    assert [journal.position_of(i) for i in range(7)] == [0, 1, 2, 1, 4, 2, 6]
    assert journal.position == 6
    assert list(journal.ancestors(6)) == [6, 2, 1, 0]
    assert list(journal.ancestors(4)) == [4, 1, 0]
    assert list(journal.ancestors(5)) == [2, 1, 0]


def test_lines_and_requests_come_back_from_a_file(tmp_path):
    journal, file = grown(None, 0), tmp_path / "journal.jsonl"
    file.write_text("".join(f"{e.line}\n" for e in journal.entries) + '{"id":')
    lines, rest = read_lines(file)
    assert parse_lines(lines, "here").entries == journal.entries
    assert rest == '{"id":'
    assert read_lines(tmp_path / "none") == ([], "")
    full = EditRequest("The capital of France", "Rome\U0001f600", "France", ("Ice", "Tea"))
    for request in (full, EditRequest("a", "b")):
        assert EditRequest.from_dict(json.loads(to_json(request.to_dict()))) == request
    kept = {"prompt", "target_new", "subject", "loc_prompts"}
    assert {f.name for f in fields(EditRequest)} == kept, "keep the new field in to_dict"


def edit_line(**report):
    """The summary of an edit whose report has, or has not, some keys."""
    kept = {key: value for key, value in {**REPORT, **report}.items() if value is not None}
    content = {**EDIT, "report": kept}
    return Journal([grown().entries[0]]).next("edit", "h", content).summary()


def test_summary_tells_what_was_not_learned():
    missed = dataclasses.replace(EditReport(3, 2, LOSSES, False, 0.1), learned=(True, False, True))
    assert edit_line(**edit_content([], missed)["report"]).endswith("0.10 s, 1 of 3 not learned]")
    for learned in ([True] * 3, []):
        assert edit_line(learned=learned).endswith(" 0.10 s]")
    for damaged in ({"learned": 3}, {"losses": {"answer": ["x"]}}, {"time_s": 10**400}):
        assert edit_line(**damaged).endswith("[its report is not one]")


def test_summary_of_an_entry_cannot_upset_a_terminal():
    content = {**EDIT, "requests": [{"prompt": "\x1b[2J\n", "target_new": "é"}] * 3}
    line = Journal([grown().entries[0]]).next("edit", "0123456789abcdef", content).summary()
    assert r"\x1b[2J\n -> é (and 2 more) [2 steps, loss 0.500, 0.10 s]" in line
    assert " 0123456789  edit " in line
    assert grown(None, 0).entries[2].summary().endswith("rollback to 0")


def changed(**content):
    entry = grown(None).entries[1]
    return json.dumps({**json.loads(entry.line), **content})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "here must be JSON, and is not"),
        ("[1]", "here must be a JSON object; got list"),
        ('{"id": 1}', "here must have the key 'kind', and has not"),
        (changed(id=True), "here must have a int as 'id'; got bool"),
        (changed(snapshot_of=3), "here must have a str as 'snapshot_of'; got int"),
        ('{"kind": "\ud800"}', "here must be ASCII below"),
        (changed(kind="delete"), "kind in here must be one of start, settings, .*'delete'"),
        (changed(parent=1), "parent in here must be an entry before 1; got 1"),
        (changed(requests=["a"]), "requests in here must be JSON objects; got 'a'"),
        (changed(requests=[{}]), "a request in here must have the key 'prompt', and has not"),
        (
            changed(requests=[{"prompt": "a", "target_new": 1}]),
            "a request in here must have a str as 'target_new'; got int",
        ),
        ("x" * (MAX_LINE + 1), f"here must be ASCII below {MAX_LINE} bytes"),
    ],
    ids=lambda text: text[:40],
)
def test_line_that_is_no_entry_is_refused(line, message):
    with pytest.raises(ValueError, match=message):
        Entry.from_line(line, "here")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}])
def test_what_is_not_json_is_not_kept(value):
    with pytest.raises(ValueError, match="what is kept must be JSON"):
        to_json({"value": value})


@pytest.mark.parametrize("order", [[1], [0, 2], [0, 0], [0, 1, 1]])
def test_entries_that_do_not_follow_are_refused(order):
    entries = grown(None, None).entries
    with pytest.raises(ValueError, match="must follow the one before it"):
        Journal(entries[i] for i in order)
