"""Meeting of the ranks that a doctor asks, in the launcher's store alone: each needs to reach only the store,
and not the other ranks."""

from __future__ import annotations

import os
import pickle
import queue
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from tezo_ds.errors import ShardingError
from tezo_ds.launched import env_rank, env_world_size

Thing = TypeVar("Thing")
THREAD = "tezo-doctor"
LAST_WORDS = 5.0  # seconds that rank 0, which may keep the store, stays for the others


class Meeting:
    """The ranks of a world, rank 0 of which judges.

    Args:
        store: a store that all ranks reach.
        rank, world_size: rank of this process, and number of ranks.
        wait: seconds to wait for a rank that does not come.

    Attributes:
        present: the ranks that have come, as far as this one was told.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int, wait: float) -> None:
        self._store, self.rank, self.world_size, self.wait = store, rank, world_size, wait
        self.present = list(range(world_size))

    def gather(self, name: str, thing: Thing) -> dict[int, Thing]:
        """Gathers on rank 0 what each rank gave under this name, less those that gave nothing in time; {} on
        the others. Rank 0 trusts the others as `all_gather_object` would: things are pickled."""
        self._set(f"{name}/{self.rank}", thing)
        if self.rank:
            return {}
        given: dict[int, Thing] = {}
        end = time.monotonic() + self.wait
        for rank in self.present:
            try:
                given[rank] = self._get(f"{name}/{rank}", max(end - time.monotonic(), 0.1))
            except RuntimeError:  # also of a store that is gone
                continue
        return given

    def tell(self, name: str, thing: Thing) -> Thing:
        """Broadcasts what rank 0 gave under this name, and returns it on all.

        Raises:
            ShardingError: rank 0 says nothing, for longer than it may wait for others itself.
        """
        if self.rank == 0:
            self._set(name, thing)
            return thing
        try:
            told: Thing = self._get(name, 4 * self.wait + 60)
        except RuntimeError:
            error = ShardingError(
                f"rank {self.rank}: rank 0 says no more; its own output says why, if its host lives"
            )
            error.speaks = True
            raise error from None
        return told

    def leave(self) -> None:
        """Leaves the meeting, rank 0 last."""
        if self.rank:
            self._store.add("left", 1)
            return
        end = time.monotonic() + LAST_WORDS
        while self._store.add("left", 0) < len(self.present) - 1 and time.monotonic() < end:
            time.sleep(0.05)

    def _set(self, key: str, thing: object) -> None:
        value: Any = pickle.dumps(thing)  # bytes, which its stub does not know of
        self._store.set(key, value)

    def _get(self, key: str, seconds: float) -> Any:
        self._store.wait([key], timedelta(seconds=seconds))
        return pickle.loads(self._store.get(key))


def meet(wait: float) -> Meeting:
    """Joins the ranks that a launcher started in a meeting; this process alone where none did.

    Raises:
        ShardingError: the store gives no answer.
    """
    rank, world_size = env_rank(), env_world_size()
    if world_size == 1:
        return Meeting(dist.HashStore(), 0, 1, wait)
    host, port = os.environ.get("MASTER_ADDR", ""), int(os.environ.get("MASTER_PORT", "0"))
    kept_by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        store = dist.TCPStore(
            host, port, world_size, rank == 0 and not kept_by_agent, timedelta(seconds=wait),
            wait_for_workers=False, multi_tenant=True,
        )  # fmt: skip
    except (RuntimeError, ValueError) as error:
        failed = ShardingError(
            f"rank {rank} cannot reach the store at {host}:{port} ({str(error).splitlines()[0][:160]}); "
            "check MASTER_ADDR, MASTER_PORT and the firewall there"
        )
        failed.speaks = True
        raise failed from None
    count = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return Meeting(dist.PrefixStore(f"tezo doctor {count}", store), rank, world_size, wait)


def within(seconds: float, work: Callable[[], Thing]) -> Thing:
    """Runs `work` in a thread, which is left behind where it hangs; returns what `work` gives, or raises.

    Raises:
        TimeoutError: `work` has not come to an end.
    """
    ends: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()
    index = torch.accelerator.current_device_index() if torch.accelerator.is_available() else None

    def run() -> None:
        try:
            if index is not None:
                torch.accelerator.set_device_index(index)
            ends.put((True, work()))
        except BaseException as error:
            ends.put((False, error))

    threading.Thread(target=run, name=THREAD, daemon=True).start()
    try:
        fine, thing = ends.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no end within {seconds:.0f} s") from None
    if not fine:
        raise thing
    result: Thing = thing
    return result


def hung() -> bool:
    """Returns whether some `within` has left a thread behind."""
    return any(thread.name == THREAD for thread in threading.enumerate())
