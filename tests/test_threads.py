"""Threads that edit, undo, run and generate with one model at the same time."""

import copy
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from baft_easyedit import BaFTEditor, attached_edit
from baft_easyedit.model.locks import ModelLock, _has_left, _is_ours, lock_of
from tests.conftest import IDS, logits, make_model, random_edit

REQUESTS = [
    {"prompt": f"The capital of {country} is", "target_new": city, "loc_prompt": "Ice is cold"}
    for country, city in (("Fiji", "Rome"), ("Iran", "Oslo"), ("Cuba", "Bern"))
]


@pytest.fixture
def short(hparams):
    return replace(hparams, num_steps=3, early_stop_loss=0.0)


class Threads:
    """Runs functions again and again until time is up; raises what any of them raised."""

    def __init__(self, duration_s):
        self.end = time.monotonic() + duration_s
        self.errors = []
        self.counts = {}

    def run(self, *functions):
        threads = [threading.Thread(target=self._repeat, args=(f,)) for f in functions]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=self.end - time.monotonic() + 120)
        assert not any(thread.is_alive() for thread in threads), "a thread waits for ever"
        if self.errors:
            raise self.errors[0]

    def _repeat(self, function):
        try:
            while time.monotonic() < self.end and not self.errors:
                function()
                self.counts[function.__name__] = self.counts.get(function.__name__, 0) + 1
        except BaseException as error:  # noqa: BLE001
            self.errors.append(error)


def stress(tokenizer, hparams, duration_s):
    """Let threads do all that can be done; return how often each was done.

    Two editors learn into one edit. Each request is learned from the unedited model, so that the
    logits of all states are known before.
    """
    model = make_model()
    editors = [BaFTEditor(model, tokenizer, hparams)]
    editors.append(BaFTEditor(model, tokenizer, hparams, edit=editors[0].model_edit))
    ids = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 257}
    states = [logits(model)]
    for request in REQUESTS:
        editors[0].edit(request)
        states.append(logits(model))
        editors[0].undo()
    assert all(not torch.equal(a, b) for a in states for b in states if a is not b)
    writing = threading.Lock()  # an edit is learned from the unedited model only
    draw = random.Random(0)

    def run():
        found = logits(model)
        assert any(torch.equal(found, state) for state in states), "logits of no state"

    def run_with_gradients():
        found = model(IDS).logits.detach()
        assert any(torch.allclose(found, state, atol=1e-3) for state in states)

    def run_without_the_edit():
        # While edits are learned apart, `attached_edit` would return their copies.
        with editors[0].model_edit.disabled():
            found = logits(model)
        assert torch.equal(found, states[0])

    def generate():
        assert model.generate(**ids, **options).shape == (2, IDS.shape[1] + 4)

    def edit():
        editor, request = draw.choice(editors), draw.choice(REQUESTS)
        with writing:
            editor.edit(request)
            time.sleep(0.002)
            editor.undo()

    def learn_apart():
        assert len(editors[0].learn_apart(REQUESTS[:2])) == 2

    threads = Threads(duration_s)
    threads.run(run, run, run_with_gradients, run_without_the_edit, generate, edit, learn_apart)
    assert torch.equal(logits(model), states[0])
    return threads.counts


def test_threads_see_the_model_before_or_after_an_edit(tokenizer, short):
    counts = stress(tokenizer, short, duration_s=2)
    assert all(counts.get(name, 0) > 0 for name in ("run", "generate", "edit", "learn_apart"))


@pytest.mark.slow
def test_threads_for_a_long_time(tokenizer, short, request):
    duration_s = float(request.config.getoption("--stress-seconds"))
    assert min(stress(tokenizer, short, duration_s).values()) > 10


def test_two_edits_at_once_are_one_after_another(tokenizer, short):
    short = replace(short, num_steps=20)
    model = make_model()
    editors = [BaFTEditor(model, tokenizer, short)]
    editors.append(BaFTEditor(model, tokenizer, short, edit=editors[0].model_edit))
    with ThreadPoolExecutor(2) as pool:
        edits = [pool.submit(e.edit, r) for e, r in zip(editors, REQUESTS, strict=False)]
        for edit in edits:
            edit.result(timeout=120)
    found = logits(model)
    expected = []
    for requests in (REQUESTS[:2], REQUESTS[1::-1]):
        model = make_model()
        editor = BaFTEditor(model, tokenizer, short)
        for request in requests:
            editor.edit(request)
        expected.append(logits(model))
    assert any(torch.equal(found, state) for state in expected)


def test_a_forward_that_began_without_an_edit_ends_without_it(model, tokenizer, short):
    before = logits(model)
    is_inside, may_go_on = threading.Event(), threading.Event()

    def wait(module, args):
        if threading.current_thread() is not threading.main_thread():
            is_inside.set()
            assert may_go_on.wait(60)

    model.model.layers[1].register_forward_pre_hook(wait)
    editor = BaFTEditor(model, tokenizer, short)
    with ThreadPoolExecutor(1) as pool:
        forward = pool.submit(logits, model)
        assert is_inside.wait(60)
        # Layers are stubbed, and one is passed over, in the thread that learns only.
        step = torch.optim.AdamW.step

        def let_go(optimizer, *args, **kwargs):
            may_go_on.set()
            return step(optimizer, *args, **kwargs)

        torch.optim.AdamW.step = let_go
        try:
            editor.edit(REQUESTS[0])
        finally:
            torch.optim.AdamW.step = step
            may_go_on.set()
        assert torch.equal(forward.result(timeout=60), before)
    assert not torch.equal(logits(model), before)


def test_an_edit_waits_for_forwards_and_forwards_for_it():
    lock, order = ModelLock(), []
    is_running, may_end = threading.Event(), threading.Event()

    def forward():
        call(lambda: (is_running.set(), may_end.wait(30), order.append("first forward")))

    def call(function):
        module = torch.nn.Identity()  # whoever waits looks for a module that is called
        module.register_forward_hook(lambda *_: function())
        lock.begin_forward()
        module(1)
        lock.end_forward()

    def change():
        with lock.changing():
            order.append("change")
            time.sleep(0.05)

    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(forward)
        assert is_running.wait(30)
        changes = pool.submit(_as_ours(change))
        while lock._owner is None:
            time.sleep(0.001)
        second = pool.submit(call, lambda: order.append("second forward"))
        time.sleep(0.3)
        assert order == []
        may_end.set()
        for future in (first, changes, second):
            future.result(timeout=30)
    assert order == ["first forward", "change", "second forward"]


def _as_ours(function):
    """As if it were called by the package, which is where a lock is held."""
    namespace = {"__name__": "baft_easyedit.tests", "function": function}
    exec("def call(): return function()", namespace)
    return namespace["call"]


def test_threads_that_were_interrupted_are_not_waited_for():
    lock = ModelLock()

    def interrupted():
        lock.begin_forward()  # and it never says that it ended
        lock._owner = threading.get_ident()

    with ThreadPoolExecutor(1) as pool:
        pool.submit(interrupted).result()
        with lock.changing():
            assert lock._owner == threading.get_ident()
    assert lock._owner is None


def test_threads_that_run_are_not_taken_for_gone():
    """A generator that yields has no caller, while whoever looks has a frame of it."""
    namespace = {"__name__": "baft_easyedit.tests"}
    exec("def run(function): function()", namespace)
    end = time.monotonic() + 1

    def numbers():
        while time.monotonic() < end:
            yield from (i for i in range(50))

    with ThreadPoolExecutor(1) as pool:
        is_in, may_end = threading.Event(), threading.Event()
        thread = []

        def run():
            thread.append(threading.get_ident())
            is_in.set()
            sum(numbers())
            may_end.wait(30)

        running = pool.submit(namespace["run"], run)
        assert is_in.wait(30)
        while time.monotonic() < end:
            assert not _has_left(thread[0], _is_ours)
        may_end.set()
        running.result(timeout=30)
        while not _has_left(thread[0], _is_ours):  # it waits for work
            time.sleep(0.01)


def test_contexts_hold_for_their_thread_only(model):
    edit = random_edit()
    edit.attach(model)
    edited = logits(model)
    with ThreadPoolExecutor(1) as pool, edit.disabled(), edit.recording() as record:
        assert torch.equal(pool.submit(logits, model).result(timeout=30), edited)
        assert not record.weights
        assert not torch.equal(logits(model), edited)


def test_nothing_is_kept_of_threads_that_ended(model):
    edit = random_edit()
    edit.attach(model)
    for _ in range(3):
        with ThreadPoolExecutor(1) as pool:
            pool.submit(logits, model).result()
    lock = lock_of(model)
    assert not lock._forwards
    assert not lock._waiting


def test_a_change_inside_a_forward_is_refused(model, tokenizer, short):
    edit = random_edit(layers=short.layers, rank=short.rank)
    edit.attach(model)
    editor = BaFTEditor(model, tokenizer, short)
    expected = logits(model)
    for change in (lambda: editor.edit(REQUESTS[0]), edit.detach):
        hook = model.model.embed_tokens.register_forward_pre_hook(lambda *_, c=change: c())
        with pytest.raises(RuntimeError, match="an edit must not change inside a forward of its"):
            logits(model)
        hook.remove()
        assert torch.equal(logits(model), expected)
    edit.detach()


def test_copies_have_locks_of_their_own(model):
    edit = random_edit()
    edit.attach(model)
    twin = copy.deepcopy(model)
    assert lock_of(twin) is not lock_of(model)
    assert attached_edit(twin)._lock is lock_of(twin)
