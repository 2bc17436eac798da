"""Any order of changes, failures and reopenings: model, directory and journal tell one state."""

from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple, Optional
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from baft_easyedit import BaFTEditor, BaFTHyperParams
from baft_easyedit.storage.reading import read_history
from tests.conftest import logits, make_model, make_tokenizer

TOKENIZER = make_tokenizer()
HPARAMS = BaFTHyperParams(
    model_name="tiny", layers=[1, 3], device="cpu", rank=2, lr=3e-2, num_steps=2
)
OPTIONS = {"checkpoint_every": 3, "undo_depth": 3}  # few: most states come from the disk
REQUESTS = st.sampled_from(
    [{"prompt": f"Fact {i} is", "target_new": target} for i in range(6) for target in ("a", "bb")]
)
NOT_LEARNED = REQUESTS.map(lambda request: request | {"target_new": "zz"})  # it takes a step
UNUSABLE = st.sampled_from(
    [
        {"prompt": "", "target_new": "x"},
        [{"prompt": "A is", "target_new": "x"}, {"prompt": "A is", "target_new": "y"}],
    ]
)


class State(NamedTuple):
    """What a change led to."""

    logits: torch.Tensor
    hash: str
    parent: Optional["State"]


class KeptEdit(RuleBasedStateMachine):
    """An edit that a directory keeps; `states` has the expected one of each journal entry."""

    @initialize()
    def begin(self):
        self.folder, self.names = TemporaryDirectory(), map(str, count())
        self.kept = self.new_path()
        self.open(HPARAMS)
        self.states = [self.seen(parent=None)]

    def new_path(self):
        return Path(self.folder.name) / next(self.names)

    def open(self, hparams=None):
        self.editor = BaFTEditor.open(make_model(), TOKENIZER, self.kept, hparams, **OPTIONS)

    def seen(self, parent):
        return State(logits(self.editor.model), read_history(self.kept)[-1].state_hash, parent)

    def has_changed(self):
        self.states.append(self.seen(parent=self.states[-1]))

    def has_returned_to(self, state):
        self.states.append(state)

    @invariant()
    def model_and_journal_tell_the_expected_state(self):
        entries = read_history(self.kept)
        assert len(entries) == len(self.states)
        assert entries[-1].state_hash == self.states[-1].hash
        assert torch.equal(logits(self.editor.model), self.states[-1].logits)

    @rule(request=REQUESTS)
    def edit(self, request):
        self.editor.edit(request)
        self.has_changed()

    @rule(request=REQUESTS)
    def install(self, request):
        (learned,) = self.editor.learn_apart([request])
        self.model_and_journal_tell_the_expected_state()
        self.editor.install(learned, request)
        self.has_changed()

    @rule(requests=UNUSABLE)
    def refused_edit(self, requests):
        with pytest.raises(ValueError, match="prompt"):
            self.editor.edit(requests)

    @rule(request=NOT_LEARNED, error=st.sampled_from([FloatingPointError, KeyboardInterrupt]))
    def failing_edit(self, request, error):
        step = mock.patch.object(torch.optim.AdamW, "step", side_effect=error)
        with step, pytest.raises(error):
            self.editor.edit(request)

    @precondition(lambda self: self.states[-1].parent)
    @rule()
    def undo(self):
        self.editor.undo()
        self.has_returned_to(self.states[-1].parent)

    @rule(data=st.data())
    def rollback(self, data):
        to = data.draw(st.integers(0, len(self.states) - 1))
        self.editor.rollback(to)
        self.has_returned_to(self.states[to])

    @rule()
    def save_and_load(self):
        saved = self.new_path()
        self.editor.save(saved)
        again = BaFTEditor.load(make_model(), TOKENIZER, saved)
        assert read_history(saved) == read_history(self.kept)
        assert torch.equal(logits(again.model), self.states[-1].logits)

    @rule()
    def reopen(self):
        self.editor.close()
        self.open()

    def teardown(self):
        self.editor.close()
        self.folder.cleanup()


@pytest.fixture(autouse=True)
def _quiet(caplog):
    """Few steps learn little, and every edit would say so."""
    caplog.set_level("ERROR", logger="baft_easyedit")


def check(max_examples, stateful_step_count, **options):
    run_state_machine_as_test(
        KeptEdit,
        settings=settings(
            max_examples=max_examples,
            stateful_step_count=stateful_step_count,
            deadline=None,
            database=None,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
            **options,
        ),
    )


def test_states_are_the_expected_ones_after_any_changes():
    check(max_examples=10, stateful_step_count=12, derandomize=True)


@pytest.mark.slow
def test_states_are_the_expected_ones_after_many_changes():
    check(max_examples=100, stateful_step_count=40)
