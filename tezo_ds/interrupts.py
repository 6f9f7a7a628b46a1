"""Signals, so that a run that is stopped leaves whole files."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Interrupted(BaseException):
    """SIGINT or SIGTERM arrived."""


@contextmanager
def turned_into_exceptions() -> Iterator[None]:
    """Turns the first SIGINT or SIGTERM into `Interrupted` and ignores all further ones: launchers
    and terminals send several, and what is written after the first must be written whole."""
    before: dict[signal.Signals, Any] = {}

    def interrupt(number: int, frame: FrameType | None) -> None:
        for name in before:
            signal.signal(name, signal.SIG_IGN)
        raise Interrupted(f"stopped by {signal.Signals(number).name}")

    for name in (signal.SIGINT, signal.SIGTERM):
        before[name] = signal.signal(name, interrupt)
    stopped = False
    try:
        yield
    except Interrupted:
        stopped = True  # stay deaf: the process writes its results and ends
        raise
    finally:
        if not stopped:
            for name, handler in before.items():
                signal.signal(name, handler)
