"""Time of a step, part by part, as the stream that computes sees it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from tezo_ds.engine.engine import Engine

PARTS = ("gather", "forward", "perturb", "collectives", "update", "rest")


class Split:
    """A clock that is at one part of a step at any time.

    On the CPU it is the time of the thread that runs the step. On an accelerator it is an event at each
    change, on the stream that computes, so work that overlaps with it on other streams does not count:
    a part is what is exposed of it.
    """

    def __init__(self) -> None:
        self._accelerator = torch.accelerator.is_available()
        self._running: list[str] = []
        self._changes: list[tuple[str, Any]] = []  # a part, and when it began

    def now(self) -> str | None:
        """Returns the part that is running."""
        return self._running[-1] if self._running else None

    def enter(self, part: str) -> None:
        """Begins a part, whose time is counted until `leave`."""
        self._running.append(part)
        self._changes.append((part, self._mark()))

    def leave(self) -> None:
        """Ends a part; time is again that of the part before."""
        self._running.pop()
        self._changes.append((self.now() or "", self._mark()))

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Context manager: time inside is a part's."""
        self.enter(name)
        try:
            yield
        finally:
            self.leave()

    def seconds(self) -> dict[str, float]:
        """Returns seconds of each of PARTS since the last call; all parts have ended."""
        if self._accelerator:
            torch.accelerator.synchronize()
        found = dict.fromkeys(PARTS, 0.0)
        for (part, start), (_, end) in zip(self._changes, self._changes[1:], strict=False):
            if part:
                found[part] += start.elapsed_time(end) / 1e3 if self._accelerator else end - start
        self._changes.clear()
        return found

    def _mark(self) -> Any:
        if not self._accelerator:
            return time.perf_counter()
        event = torch.Event(torch.accelerator.current_accelerator(), enable_timing=True)
        event.record()
        return event

    @contextmanager
    def of(self, engine: Engine) -> Iterator[None]:
        """Context manager: splits the engine's steps inside. A module's weights come and go in hooks around
        its forward, under DeepSpeed and FSDP2 alike: what lies between first and last hook is a gather."""
        with ExitStack() as undo:
            for module in engine.sharding.module.modules():
                for handle in self._bracket(module):
                    undo.callback(handle.remove)
            for owner, name, part in (
                (engine.measuring, "losses", "forward"),
                (engine, "_finish", "update"),
                (engine.sharding, "each_shard", "perturb"),
                (engine.sharding, "all_reduce", "collectives"),
                (engine.sharding, "maxima", "collectives"),
            ):
                setattr(owner, name, self._timed(getattr(owner, name), part))
                undo.callback(delattr, owner, name)
            yield

    def _bracket(self, module: nn.Module) -> Iterator[Any]:
        def begin(*_: object) -> None:
            self.enter("gather")

        def end(*_: object) -> None:
            self.leave()

        yield module.register_forward_pre_hook(begin, prepend=True)
        yield module.register_forward_pre_hook(end)
        yield module.register_forward_hook(begin, prepend=True)
        yield module.register_forward_hook(end)

    def _timed(self, call: Callable[..., Any], part: str) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            written = part == "perturb" and self.now() == "update"  # a method's own write
            with self.part("update" if written else part):
                return call(*args)

        return timed
