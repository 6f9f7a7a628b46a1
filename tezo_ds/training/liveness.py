"""Liveness of ranks: a rank that hangs is named by the ranks that wait for it.

A thread on each rank notes every few seconds in torch.distributed's store, which rank 0 or its launcher
keeps, where the rank is. When a collective fails, the notes tell who ended, fell silent or is behind.
A step pays nothing for it.
"""

from __future__ import annotations

import json
import os
import queue
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from types import TracebackType
from typing import Any, Literal, NamedTuple

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from tezo_ds.errors import ShardingError
from tezo_ds.sharding import Sharding

BEATS = 3  # between two looks at the notes: a rank that lives has written in that time
GO_ON = "then start the same command to go on"
_BLAME = "tezo/blame"
# gloo's errors are plain RuntimeErrors. They begin with a path of its sources, but for the one of a
# connection that it closed itself when another collective ran out of time.
_OF_GLOO = ("gloo", "Application timeout caused pair closure")

Why = Literal["ended", "silent", "behind"]


class Note(NamedTuple):
    """A rank's last note of where it is.

    Attributes:
        beat: how often the rank wrote.
        place: how many places the rank has come to; all ranks come to the same ones in the same order.
        what: the last of these places, in words.
        since, wrote: Unix times at which the rank came there and at which it wrote.
        ended: the error that the rank ended with; empty while it runs.
    """

    beat: int
    place: int
    what: str
    since: float
    wrote: float
    ended: str = ""


def awaited(before: Sequence[Note], now: Sequence[Note]) -> tuple[list[int], Why | None]:
    """Returns the ranks that the others wait for, and why; none where all live and are in the same place.

    Args:
        before: note of each rank, taken `BEATS` beats before `now`, so that no clocks are compared.
        now: note of each rank.
    """
    furthest = max(note.place for note in now)
    checks: dict[Why, list[int]] = {
        "ended": [rank for rank, note in enumerate(now) if note.ended],
        "silent": [rank for rank, note in enumerate(now) if note.beat == before[rank].beat],
        "behind": [rank for rank, note in enumerate(now) if note.place < furthest],
    }
    for why, ranks in checks.items():
        if ranks:
            return ranks, why
    return [], None


class Liveness:
    """Context manager: an error of a collective inside comes out as a `ShardingError` that names a rank.

    Every rank makes one and enters it at the same time. The time-out of all process groups there are is set,
    as groups that libraries made have one of their own.

    Where a backend raises nothing (NCCL ends the process by itself), the line is printed as a warning
    shortly before the time-out is over. No process is ended here.

    Args:
        sharding: the run's sharding.
        timeout: seconds that a collective waits for the slowest rank.
    """

    def __init__(self, sharding: Sharding, timeout: float) -> None:
        self._place = 0, "the start", time.time()  # of the main thread
        self._beats, self._ended = 0, ""  # of the other
        self._thread: threading.Thread | None = None
        if sharding.everyone == 1:
            return
        _set_timeouts(timedelta(seconds=timeout))
        self._rank, self._beat = dist.get_rank(), min(5.0, timeout / 10)
        self._patience = timeout - 2 * BEATS * self._beat  # before a warning
        self._raises = sharding.device.type == "cpu"
        shared: Any = c10d._get_default_store()
        self._store: dist.Store = shared.clone()  # a connection of the thread's own
        self._keys = [f"tezo/note/{rank}" for rank in range(sharding.everyone)]
        self._blame: tuple[list[int], str] | None = None
        self._warned = 0  # the last place that a warning was about
        self._requests: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._write()
        self._who: list[tuple[str, int]] = sharding.gather((socket.gethostname(), os.getpid()))
        self._thread = threading.Thread(target=self._run, name="tezo-liveness", daemon=True)

    def __enter__(self) -> Liveness:
        if self._thread is not None:
            self._thread.start()
        return self

    def at(self, what: str) -> None:
        """Notes that this rank has come to a place; all ranks come to the same ones."""
        self._place = self._place[0] + 1, what, time.time()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:  # fmt: skip
        """Raises ShardingError in place of an error of a collective; notes any other error."""
        if self._thread is None:
            return
        try:
            if error is not None and of_collective(error):
                raise self.explain(error) from error
            if error is not None:
                self._ended = f"{type(error).__name__}: {_reason(error)}"[:200]
                self._requests.put(self._tend)
        finally:
            self._requests.put(None)
            self._thread.join(self._beat)

    def explain(self, error: BaseException) -> ShardingError:
        """Returns the error to show for one that a collective raised: names the rank that was waited for.
        Takes a few seconds, in which a rank that lives writes another note."""
        answers: queue.SimpleQueue[tuple[list[int], str]] = queue.SimpleQueue()
        self._requests.put(lambda: answers.put(self._agreed(_reason(error))))
        try:
            lost, line = answers.get(timeout=(BEATS + 1) * self._beat + 3)
        except queue.Empty:  # the thread waits for a store that is stopped
            lost, line = self._blame or self._without_store()
        if self._rank == 0:  # it may keep the store: the others hear before that goes
            time.sleep(2 * self._beat)
        explained = ShardingError(line)
        explained.speaks = self._speaks(lost)
        return explained

    def _run(self) -> None:
        """Runs the thread, which alone uses the store, as that may answer late or never."""
        while True:
            try:
                request = self._requests.get(timeout=self._beat)
                if request is None:
                    return
                request()
            except queue.Empty:
                self._tend()

    def _tend(self) -> None:
        try:
            self._write()
            if self._blame is None and self._store.check([_BLAME]):
                self._blame = json.loads(self._store.get(_BLAME))
            self._warn()
        except RuntimeError:
            pass  # the store is gone: what that means shows when a collective fails

    def _write(self) -> None:
        self._beats += 1
        note = Note(self._beats, *self._place, time.time(), self._ended)
        self._store.set(self._keys[self._rank], json.dumps(note))

    def _read(self) -> list[Note]:
        return [Note(*json.loads(text)) for text in self._store.multi_get(self._keys)]

    def _look(self) -> tuple[list[int], str]:
        """Returns the ranks that the others wait for, and a line that says so."""
        before = self._read()
        for _ in range(BEATS):
            time.sleep(self._beat)
            self._write()
        now = self._read()
        ranks, why = awaited(before, now)
        return ranks, "" if why is None else self._line(ranks, why, now)

    def _agreed(self, error: str) -> tuple[list[int], str]:
        """Returns what the first rank that looked has found: ranks that end after it would be silent, too."""
        try:
            if self._blame is None and not self._store.check([_BLAME]):
                ranks, line = self._look()
                line = line or (
                    f"{error} at {self._place[1]}, where all ranks are and live; look at the network "
                    f"between them, or raise --timeout, {GO_ON}"
                )
                self._store.compare_set(_BLAME, "", json.dumps((ranks, line)))
            if self._blame is None:
                self._blame = json.loads(self._store.get(_BLAME))
        except RuntimeError:
            return self._without_store()
        return self._blame

    def _without_store(self) -> tuple[list[int], str]:
        keeper = f"{self._named(0)}, which keeps the notes of all ranks if its launcher does not,"
        line = f"{keeper} gives no answer at {self._place[1]}; look at the process and its host, {GO_ON}"
        return [0], line

    def _warn(self) -> None:
        """Prints, where a backend raises no error, what the error would have said, before the time-out."""
        place, _, since = self._place
        if self._raises or self._warned == place or time.time() - since < self._patience:
            return
        self._warned = place
        lost, line = self._look()
        if lost and self._place[0] == place and self._speaks(lost):
            print(f"tezo-ds: warning: {line}", file=sys.stderr, flush=True)

    def _named(self, rank: int) -> str:
        host, pid = self._who[rank]
        return f"rank {rank} (host {host}, pid {pid})"

    def _line(self, ranks: Sequence[int], why: Why, now: Sequence[Note]) -> str:
        first = now[ranks[0]]
        who = self._named(ranks[0]) + (f" and {len(ranks) - 1} more" if len(ranks) > 1 else "")
        if why == "ended":
            return f"{who} ended at {first.what} ({first.ended}); see to that, {GO_ON}"
        others = ""
        if len(ranks) < len(now):
            rest = (note for rank, note in enumerate(now) if rank not in ranks)
            others = f" (others are at {max(rest, key=lambda note: note.place).what})"
        has = "has" if len(ranks) == 1 else "have"
        if why == "silent":
            gone = f"{has} given no sign of life for {_seconds(first.wrote)}, last at {first.what}"
            return f"{who} {gone}{others}; look at its process and host, {GO_ON}"
        stuck = f"{has} not got past {first.what} for {_seconds(first.since)}"
        return f"{who} {stuck}{others}; look at what it waits for, {GO_ON}"

    def _speaks(self, lost: Sequence[int]) -> bool:
        """Returns whether this rank is the first of its host that lives."""
        host, _ = self._who[self._rank]
        here = [rank for rank, (name, _) in enumerate(self._who) if name == host]
        return self._rank == min((rank for rank in here if rank not in lost), default=self._rank)


def _seconds(since: float) -> str:
    return f"{max(time.time() - since, 0):.0f} s"  # another host's clock may be ahead


def _reason(error: BaseException) -> str:
    """Returns an error's first sentence, without the place in gloo's sources."""
    first, *_ = str(error).splitlines() or [""]
    return first.split("] ", 1)[-1].split(". ")[0]


def _set_timeouts(timeout: timedelta) -> None:
    """Sets the time-out of collectives in all groups of this rank; later groups get torch's own default."""
    for group in list(c10d._world.pg_map):
        c10d._set_pg_timeout(timeout, group)


def of_collective(error: BaseException | None) -> bool:
    """Returns whether an error, or what it came from, is torch.distributed's."""
    while error is not None:
        gloo = isinstance(error, RuntimeError) and any(word in str(error) for word in _OF_GLOO)
        if gloo or isinstance(error, dist.DistError):
            return True
        error = error.__cause__ or error.__context__
    return False
