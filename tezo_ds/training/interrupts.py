"""Signal handling, so that a run that is stopped leaves whole files."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(BaseException):
    """Arrival of SIGINT or SIGTERM, as an exception.

    Attributes:
        left: text on what there is of the work, for the command line to print.
    """

    left = "results so far are in the run folder, and the same command goes on from there"


@contextmanager
def turned_into_exceptions(
    halfway: Callable[[], bool] = lambda: False,
    on_term: Callable[[], None] | None = None,
    ending: Callable[[], bool] = lambda: False,
) -> Iterator[Callable[[], None]]:
    """Context manager: turns the first SIGINT or SIGTERM inside into `Interrupted` and ignores further ones:
    launchers and terminals send several, and what is written after the first must be written whole.

    Args:
        halfway: true where an exception would leave something half done.
        on_term: called once at SIGTERM, in place of an exception, for work that ends by itself at a
            good place; a SIGINT may still come after it.
        ending: true once that work ends because others were told to: a signal of its own, which may
            come later, is then ignored like a second one.

    Yields:
        A function to call when no longer halfway, which raises for a signal that came meanwhile.
    """
    before: dict[signal.Signals, Any] = {}
    waiting: list[Interrupted] = []
    terminated = False

    def terminate(number: int, frame: FrameType | None) -> None:
        nonlocal terminated
        if on_term is None:
            interrupt(number, frame)
        elif not terminated:
            terminated = True
            on_term()

    def interrupt(number: int, frame: FrameType | None) -> None:
        if waiting:
            return
        waiting.append(Interrupted(f"stopped by {signal.Signals(number).name}"))
        if not halfway():
            raise waiting[0]

    def raise_waiting() -> None:
        if waiting:
            raise waiting[0]

    before[signal.SIGINT] = signal.signal(signal.SIGINT, interrupt)
    before[signal.SIGTERM] = signal.signal(signal.SIGTERM, terminate)
    try:
        yield raise_waiting
    finally:
        for name, handler in before.items():  # once stopped, deaf: it writes its results and ends
            stopped = waiting or terminated or ending()
            signal.signal(name, signal.SIG_IGN if stopped else handler)


@contextmanager
def deaf() -> Iterator[None]:
    """Context manager: ignores SIGINT and SIGTERM inside, which a launcher sends as soon as one rank has
    ended with an error: the others may then still be writing their results."""
    before = {name: signal.signal(name, signal.SIG_IGN) for name in SIGNALS}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
