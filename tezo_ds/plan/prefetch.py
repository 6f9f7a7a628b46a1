"""ZeRO-3's gathers in a forward, and how long weights stay: the rules of DeepSpeed's coordinator, followed
on shapes (deepspeed 0.19.8, runtime/zero/partitioned_param_coordinator.py and partition_parameters.py).

Each module that is entered has its own parameters gathered, unless that has happened, and then what is used
next, a bucket at a time. One parameter is used where its message lies. Several are copied out of theirs when
the first of them is used, and the message stays beside the copies until the last one is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tezo_ds.plan.silence import silence

AWAY, COMING, HERE = range(3)


@dataclass(frozen=True)
class Limits:
    """Limits of a `zero_optimization` block, in elements; the defaults are DeepSpeed's own.

    Attributes:
        bucket: stage3_prefetch_bucket_size.
        live: stage3_max_live_parameters.
        reuse: stage3_max_reuse_distance.
    """

    bucket: int = 50_000_000
    live: int = 1_000_000_000
    reuse: int = 1_000_000_000


DEFAULTS = Limits()


@dataclass(frozen=True)
class Visit:
    """A module's turn in a forward.

    Attributes:
        module: the module.
        entered: whether this is its beginning, and not its end.
    """

    module: nn.Module
    entered: bool

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The module's own parameters."""
        return list(self.module.parameters(recurse=False))


@dataclass(frozen=True)
class Moment:
    """Bytes held at a visit.

    Attributes:
        visit: the visit.
        before: bytes of messages and whole weights when the visit begins.
        most: the most of these bytes while the visit gathers; at a module's end as before.
    """

    visit: Visit
    before: int
    most: int


@dataclass(frozen=True)
class Gathered:
    """Gathers of one forward that has been seen before.

    Attributes:
        messages: bytes of each all-gather, padding included.
        moments: bytes held at each visit.
    """

    messages: tuple[int, ...]
    moments: tuple[Moment, ...]


@lru_cache(maxsize=4)
def visits(module: nn.Module) -> tuple[Visit, ...]:
    """Returns the visits of a forward of a model on the meta device; in the order in which modules are
    registered where its code depends on values, as routing to experts may, or needs what tensors without any
    lack, as grouped products of experts in float32 do.

    Args:
        module: model of `shapes.skeleton`; takes input_ids and use_cache.
    """
    found: list[Visit] = []

    def enter(of: nn.Module, *_: Any) -> None:
        found.append(Visit(of, True))

    def leave(of: nn.Module, *_: Any) -> None:
        found.append(Visit(of, False))

    hooks = [m.register_forward_pre_hook(enter) for m in module.modules()]
    hooks += [m.register_forward_hook(leave) for m in module.modules()]
    try:
        mode = FakeTensorMode(allow_non_fake_inputs=True)  # meta alone has no mask
        with torch.no_grad(), silence(), mode:
            module(input_ids=torch.ones(1, 2, dtype=torch.int64, device="meta"), use_cache=False)
    except RuntimeError:  # torch's own for either
        return tuple(_registered(module))
    finally:
        for hook in hooks:
            hook.remove()
    return tuple(found)


def _registered(module: nn.Module) -> Iterator[Visit]:
    yield Visit(module, True)
    for child in module.children():
        yield from _registered(child)
    yield Visit(module, False)


def gathered(
    module: nn.Module, ranks: int, limits: Limits, without: Collection[nn.Module] = ()
) -> Gathered:
    """Returns the gathers of a forward in which no parameter persists (stage3_param_persistence_threshold 0).

    Args:
        module: a model on the meta device.
        ranks: number of ranks that shards are padded to, two or more.
        limits: the run's limits.
        without: modules that the forward leaves out.
    """
    entered = [visit for visit in visits(module) if visit.module not in without]
    coordinator = _Coordinator(entered, ranks, limits)
    moments = []
    for visit in coordinator.visits:
        before = coordinator.peak = coordinator.held
        (coordinator.enter if visit.entered else coordinator.leave)(visit.parameters)
        moments.append(Moment(visit, before, coordinator.peak))
    return Gathered(tuple(coordinator.messages), tuple(moments))


@dataclass
class _Message:
    """Message of several parameters, which are copied out of it."""

    parameters: list[nn.Parameter]
    nbytes: int
    waiting: set[nn.Parameter]


class _Coordinator:
    """DeepSpeed's coordinator in one forward, on shapes."""

    def __init__(self, visits: Sequence[Visit], ranks: int, limits: Limits) -> None:
        self.visits, self._ranks, self._limits = visits, ranks, limits
        self.messages: list[int] = []
        self.held = self.peak = 0
        entered = [visit.parameters for visit in visits if visit.entered]
        self._queue = deque((p, step) for step, own in enumerate(entered) for p in own)
        self._before = [0]  # elements that the visits before each use
        self._uses: dict[nn.Parameter, list[int]] = {}
        for step, own in enumerate(entered):
            self._before.append(self._before[-1] + sum(p.numel() for p in own))
            for p in own:
                self._uses.setdefault(p, []).append(step)
        self._status = dict.fromkeys(self._uses, AWAY)
        self._fetched_for = dict.fromkeys(self._uses, -1)
        self._message: dict[nn.Parameter, _Message] = {}
        self._bytes: dict[nn.Parameter, int] = {}  # of what is let go of with a parameter
        self._step = self._live = 0

    def enter(self, own: list[nn.Parameter]) -> None:
        """Gathers a module's own parameters, and those that come next."""
        self._gather([p for p in own if self._status[p] == AWAY])
        for p in own:
            self._wait(p)
        fresh = {p for p in own if self._fetched_for[p] < self._step}
        while self._queue and fresh:
            p, step = self._queue.popleft()
            self._fetched_for[p] = step
            fresh.discard(p)
        self._gather(self._ahead())
        self._step += 1

    def leave(self, own: list[nn.Parameter]) -> None:
        """Frees a module's own parameters, unless they are used again soon."""
        for p in own:
            again = (step for step in self._uses[p] if step >= self._step)
            soon = any(
                self._before[step] - self._before[self._step] < self._limits.reuse for step in again
            )
            if self._status[p] == HERE and self._fetched_for[p] <= self._step and not soon:
                self._status[p] = AWAY
                self._live -= p.numel()
                self._hold(-self._bytes.pop(p))

    def _ahead(self) -> list[nn.Parameter]:
        """Returns the parameters to prefetch: a bucket, or one parameter where that is larger."""
        room = min(self._limits.live - self._live, self._limits.bucket)
        found: list[nn.Parameter] = []
        while self._queue and sum(p.numel() for p in found) < room:
            p, step = self._queue.popleft()
            self._fetched_for[p] = max(self._fetched_for[p], step)
            if self._status[p] == AWAY and all(p is not other for other in found):
                found.append(p)
        return found

    def _gather(self, parameters: list[nn.Parameter]) -> None:
        if not parameters:
            return
        nbytes = sum(-(-p.numel() // self._ranks) * self._ranks * p.itemsize for p in parameters)
        self.messages.append(nbytes)
        self._hold(nbytes)
        for p in parameters:
            self._status[p] = COMING
            self._live += p.numel()
        if len(parameters) == 1:
            self._bytes[parameters[0]] = nbytes
            return
        message = _Message(parameters, nbytes, set(parameters))
        self._message.update(dict.fromkeys(parameters, message))

    def _wait(self, parameter: nn.Parameter) -> None:
        message = self._message.pop(parameter, None)
        if message is None:
            self._status[parameter] = HERE
            return
        for p in message.parameters:
            if self._status[p] == COMING:
                self._status[p] = HERE
                self._bytes[p] = p.nbytes
                self._hold(p.nbytes)
        message.waiting.discard(parameter)
        if not message.waiting:
            self._hold(-message.nbytes)

    def _hold(self, nbytes: int) -> None:
        self.held += nbytes
        self.peak = max(self.peak, self.held)
