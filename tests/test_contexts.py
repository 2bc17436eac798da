"""The settings of a thread or task: what ends them, and what must not."""

import contextvars
import threading

import pytest

from baft_easyedit.model.contexts import Contexts


@pytest.fixture
def contexts():
    return Contexts()


def entered(contexts, **changed):
    """Enter a context in a generator, as a stream that is read does."""

    def stream():
        with contexts.within(**changed):
            yield

    begun = stream()
    next(begun)
    return begun


def test_a_context_ends_what_began_inside_it_and_says_so(contexts):
    with contexts.within(enabled=False):
        outer, inner = entered(contexts, enabled=True), entered(contexts, prompt_width=3)
        with pytest.raises(RuntimeError, match="must end in the reverse order"):
            next(outer)
        assert (contexts.now.enabled, contexts.now.prompt_width) == (False, None)
        with pytest.raises(RuntimeError, match="must end in the reverse order"):
            next(inner)
        assert (contexts.now.enabled, contexts.now.prompt_width) == (False, None)
    assert contexts.now.enabled


def test_an_error_inside_ends_contexts_silently(contexts):
    outer, begun = entered(contexts, enabled=False), entered(contexts, prompt_width=3)
    with pytest.raises(KeyError):
        outer.throw(KeyError())
    assert contexts.now.enabled
    begun.close()
    assert contexts.now.enabled
    assert contexts.now.prompt_width is None


def test_a_stream_that_another_thread_drops_changes_nothing_there(contexts):
    begun = []
    thread = threading.Thread(target=lambda: begun.append(entered(contexts, prompt_width=3)))
    thread.start()
    thread.join()
    with contexts.within(enabled=False):
        begun.pop().close()
        assert not contexts.now.enabled


def test_what_was_put_back_meanwhile_stays(contexts):
    with contexts.within(enabled=False):
        before = contexts.now
        begun = entered(contexts, enabled=True)
        contexts.now = before  # as after an interrupt
        begun.close()
        assert not contexts.now.enabled


def test_a_task_ends_its_copy_of_a_context(contexts):
    begun = entered(contexts, enabled=False)
    task = contextvars.copy_context()
    task.run(begun.close)
    assert task.run(lambda: contexts.now.enabled)
    assert not contexts.now.enabled


def test_contexts_leave_nothing_behind():
    before = len(contextvars.copy_context())
    for _ in range(10):
        contexts = Contexts()
        with contexts.within(enabled=False), contexts.within(prompt_width=1):
            pass
    assert len(contextvars.copy_context()) == before
