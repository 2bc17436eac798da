"""One lock for each model: a change of its edit excludes other changes, and all forwards.

It is a readers-writer lock, with forwards as readers: they run side by side, as without an edit. A
change waits for the running forwards. Forwards that begin meanwhile wait for the change, and then
come before the next change. Needs torch only.
"""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, cast

from torch import nn

from baft_easyedit.model.inspect import decoder_layers

_NAME = "_baft_lock"
"""Attribute of the decoder stack, which a model and its wrappers (PEFT) have in common."""

_LOOK_EVERY_S = 0.2
"""Seconds between two checks of the threads that are waited for."""


def lock_of(model: nn.Module) -> "ModelLock":
    """Return the lock of a model.

    Raises:
        ValueError: If the model has no decoder stack.
    """
    return cast(ModelLock, vars(decoder_layers(model)).setdefault(_NAME, ModelLock()))


def of_this_thread(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Return a hook that acts in the present thread only, as others may run forwards meanwhile."""
    thread = threading.get_ident()
    return lambda *args: hook(*args) if threading.get_ident() == thread else None


class ModelLock:
    """Records which thread changes the edit of a model, and which threads run forwards.

    An interrupt may keep a thread from releasing the lock. So a waiting thread looks, now and then,
    at the call stacks of the threads that it waits for: do they still run a forward or a change?
    """

    def __init__(self) -> None:
        self._news = threading.Condition()
        self._owner: int | None = None  # the thread that changes the edit
        self._forwards: set[int] = set()  # threads in a forward
        self._waiting: set[int] = set()  # threads that begin one
        self._next: set[int] = set()  # those of them that come before another change

    def __reduce__(self) -> Any:
        return ModelLock, ()

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Keep changes and forwards of other threads out of this context.

        Raises:
            RuntimeError: If this thread is in a forward of the model.
        """
        thread = threading.get_ident()
        if self._owner == thread:
            yield
            return
        if thread in self._forwards and _is_in(sys._getframe(), _is_forward):
            raise RuntimeError(
                "an edit must not change inside a forward of its model, such as in a hook: change "
                "it when the forward has returned"
            )
        try:
            with self._news:
                self._forwards.discard(thread)  # left by an interrupted forward
                self._wait_for(lambda: self._owner is None and not self._next)
                self._owner = thread
                self._wait_for(lambda: not self._forwards)
            yield
        finally:
            with self._news:
                if self._owner == thread:
                    self._owner, self._next = None, set(self._waiting)
                    self._news.notify_all()

    def begin_forward(self) -> None:
        """Wait for a change by another thread; then keep changes out until `end_forward`."""
        thread = threading.get_ident()
        if self._owner == thread:
            return
        with self._news:
            self._forwards.discard(thread)  # left by an interrupted forward
            self._waiting.add(thread)
            try:
                self._wait_for(lambda: self._owner is None)
                self._forwards.add(thread)
            finally:
                self._waiting.discard(thread)
                self._next.discard(thread)
                self._news.notify_all()

    def end_forward(self) -> None:
        """End this thread's forward, so that changes may begin; no effect if it began none."""
        with self._news:
            self._forwards.discard(threading.get_ident())
            self._news.notify_all()

    def _wait_for(self, is_so: Callable[[], bool]) -> None:
        """Wait for a condition; forget threads that an interrupt kept from signing off."""
        while not self._news.wait_for(is_so, _LOOK_EVERY_S):
            self._forwards = {t for t in self._forwards if not _has_left(t, _is_forward)}
            self._next = {t for t in self._next & self._waiting if not _has_left(t, _is_ours)}
            if self._owner is not None and _has_left(self._owner, _is_ours):
                self._owner = None


def _is_in(frame: FrameType | None, is_it: Callable[[FrameType], bool]) -> bool:
    """Tell whether a frame or one of its callers satisfies `is_it`."""
    while frame is not None and not is_it(frame):
        frame = frame.f_back
    return frame is not None


def _has_left(thread: int, is_it: Callable[[FrameType], bool]) -> bool:
    """Tell whether a thread is surely in no call that satisfies `is_it`.

    The stack of a thread that runs on during the look is no evidence (a generator that just yielded
    has no caller), so the thread must be at the same instruction before and after.
    """
    frame, at = _present(thread)
    return not _is_in(frame, is_it) and _present(thread) == (frame, at)


def _present(thread: int) -> tuple[FrameType | None, int | None]:
    """Return the frame and instruction that a thread runs; None if the thread has ended."""
    frame = sys._current_frames().get(thread)
    return frame, None if frame is None else frame.f_lasti


def _is_forward(frame: FrameType) -> bool:
    return frame.f_code is nn.Module._call_impl.__code__


def _is_ours(frame: FrameType) -> bool:
    return frame.f_globals.get("__name__", "").startswith("baft_easyedit.")
