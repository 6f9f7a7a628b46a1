"""A time limit for a call of a user's function, which may never return."""

from __future__ import annotations

import ctypes
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeVar

T = TypeVar("T")
AGAIN = 1.0  # seconds until a call that caught what was raised in it is interrupted once more


class Overdue(BaseException):
    """A call that took longer than it may; no `Exception`, which a user's function may catch."""


def limited(call: Callable[[], T], seconds: float | None) -> T:
    """Returns what a call returns; raises Overdue inside it after so many seconds; None: no limit.

    In the main thread the call is interrupted by SIGALRM: so waits for a network, a lock or a process and
    regular expressions end too. A thread sends the signal once more, as a function that uses `signal.alarm`
    itself turns the timer off. In another thread, which has no signals, the call ends before its next Python
    instruction. Neither ends a call of C code that does not look for signals, such as one large product of
    matrices.
    """
    if seconds is None:
        return call()
    start, running, done = time.monotonic(), list[bool](), threading.Event()
    alarmed = threading.current_thread() is threading.main_thread()
    before: Any = signal.getsignal(signal.SIGALRM) if alarmed else None
    timer = signal.getitimer(signal.ITIMER_REAL) if alarmed else (0.0, 0.0)

    def on_alarm(number: int, frame: FrameType | None) -> None:
        if running and time.monotonic() >= start + seconds:
            raise Overdue
        if callable(before):  # an alarm of someone else's
            before(number, frame)

    me = threading.get_ident()
    watch = threading.Thread(target=_watch, args=(running, done, me, seconds, alarmed), daemon=True)
    if alarmed:
        signal.signal(signal.SIGALRM, on_alarm)
    watch.start()
    try:
        try:
            # Not before what ends it all again: on a machine that stalls the time may be over by now.
            running.append(True)
            if alarmed:
                signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN)
            return call()
        finally:
            running.clear()
    finally:
        running.clear()  # raised in the line above
        done.set()
        watch.join()
        if alarmed:
            left = max(timer[0] - (time.monotonic() - start), 1e-6) if timer[0] else 0.0
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, signal.SIG_DFL if before is None else before)
            signal.setitimer(signal.ITIMER_REAL, left, timer[1])
        else:
            _raise_in(me, None)  # one that was not delivered yet


def _watch(
    running: list[bool], done: threading.Event, thread: int, seconds: float, alarmed: bool
) -> None:
    while not done.wait(seconds):
        if not running:
            continue
        if alarmed:
            signal.pthread_kill(thread, signal.SIGALRM)
        else:
            _raise_in(thread, Overdue)
        seconds = AGAIN


def _raise_in(thread: int, error: type[BaseException] | None) -> None:
    given = None if error is None else ctypes.py_object(error)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), given)
