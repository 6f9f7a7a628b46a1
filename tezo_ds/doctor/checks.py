"""All checks, one after the other. Every rank goes through the same ones and rank 0 judges; what needs
ranks to reach each other comes last, and only if they do."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from tezo_ds import repeatable
from tezo_ds.doctor import (
    machine,
    network,
    output_layer,
    resources,
    selftest,
    trunk_cache,
    verdicts,
)
from tezo_ds.doctor.flags import RunFlags
from tezo_ds.doctor.hostfile import check_hostfile
from tezo_ds.doctor.meeting import Meeting, within
from tezo_ds.doctor.network import Address
from tezo_ds.doctor.report import Failed, Row, attempt, row_of
from tezo_ds.doctor.verdicts import Asked, Who, settled
from tezo_ds.errors import ShardingError
from tezo_ds.launched import env_local_rank
from tezo_ds.plan.needs import Needs
from tezo_ds.settings import TIMEOUT
from tezo_ds.sharding.world import join_world, local_device


def examine(flags: RunFlags, meeting: Meeting) -> list[Row]:
    """The rows, on rank 0; nothing on the others. Leaves nothing on disk.

    Raises:
        ShardingError: rank 0 is gone.
    """
    return Examination(flags, meeting).run()


class Examination:
    """Checks of a run to come: each gathers facts of all ranks, which rank 0 judges."""

    def __init__(self, flags: RunFlags, meeting: Meeting) -> None:
        self._flags, self._meeting = flags, meeting
        self._first = meeting.rank == 0
        self._local_rank = env_local_rank()
        self.rows: list[Row] = []
        self._need: Needs | None = None
        self._skeleton: nn.Module | Failed | None = None  # of rank 0, as what all ranks said is
        self._machines: dict[int, dict[str, Any]] = {}
        self._layout, self._backend = flags.layout(meeting.world_size), flags.backend

    def run(self) -> list[Row]:
        """Makes all checks, one after the other; returns the rows, which are rank 0's."""
        hostfile, world_size = self._flags.hostfile, self._meeting.world_size
        with ExitStack() as stack:
            self._gather_ranks(stack)
            self._look_at_machines()
            self._judge("hostfile", lambda: check_hostfile(hostfile, world_size))
            self._look_at_folder()
            self._look_at_trunk_cache()
            if self._flags.config.output_layer != "frozen":
                known = self._layout, self._skeleton, self._need, self._machines
                self._judge(
                    output_layer.CHECK, lambda: output_layer.row(self._flags, self._asked, *known)
                )
            self._try_network()
        self._work_together()
        return self.rows

    def _judge(self, check: str, judge: Callable[[], Row]) -> None:
        if self._first:
            self.rows.append(row_of(check, judge))

    def _gather_ranks(self, stack: ExitStack) -> None:
        """Who takes part, and where each listens until the stack is left."""
        meeting = self._meeting

        def listen() -> Address:
            host = network.own_address(self._backend) if meeting.world_size > 1 else "127.0.0.1"
            return stack.enter_context(network.Listener(meeting.rank, host)).address

        me = Who(socket.gethostname(), self._local_rank), attempt(listen)
        come = meeting.tell("come", meeting.gather("who", me))
        if meeting.rank not in come:
            raise ShardingError(
                f"rank {meeting.rank} came too late, after {meeting.wait:.0f} s; raise --wait"
            )
        meeting.present = sorted(come)
        self._asked = Asked({rank: who for rank, (who, _) in come.items()})
        self._addresses = {rank: address for rank, (_, address) in come.items()}
        self._judge("ranks", lambda: verdicts.ranks(self._asked, meeting.world_size))

    def _look_at_machines(self) -> None:
        flags, asked, world_size = self._flags, self._asked, self._meeting.world_size
        skeleton = attempt(flags.skeleton) if flags.settings.model else None
        found = {
            "versions": attempt(machine.versions),
            "accelerators": attempt(
                lambda: machine.accelerator(self._local_rank, flags.deepspeed is not None)
            ),
            "backend": attempt(lambda: dist.is_backend_available(self._backend)),
            "memory": attempt(machine.memory),
            "products": attempt(repeatable.products),
            "shared memory": attempt(machine.shared_memory),
            "open files": attempt(machine.open_files),
            "model": attempt(lambda: flags.seen(skeleton)),
        }
        gathered = self._meeting.gather("machine", found)
        if not self._first:
            return
        self._skeleton, self._machines = skeleton, gathered

        def of(check: str) -> dict[int, Any]:
            return {rank: facts[check] for rank, facts in gathered.items()}

        def judge(check: str, rule: Callable[[dict[int, Any]], Row]) -> None:
            self._judge(check, lambda: settled(check, asked, of(check), rule))

        judge("versions", lambda held: verdicts.versions(asked, held))
        bfloat16 = "bfloat16" in (flags.settings.compute_dtype, flags.dtype)
        judge("accelerators", lambda held: verdicts.accelerators(asked, held, bfloat16))
        judge("products", lambda held: verdicts.products(asked, held))
        judge("backend", lambda held: verdicts.backend(self._backend, all(held.values())))
        judge(
            "shared memory",
            lambda held: verdicts.shared_memory(asked, held, "nccl" in self._backend),
        )
        judge("open files", lambda held: verdicts.open_files(asked, held, world_size))
        if skeleton is None:
            self.rows += [Row(check, "unchecked", "no --model") for check in ("model", "memory")]
            return
        judge("model", lambda held: resources.model(asked, held))

        def memory(held: dict[int, Any]) -> Row:
            if isinstance(skeleton, Failed):
                return Row("memory", "unchecked", "see model")
            self._need = flags.needs(skeleton, world_size)
            accelerators = of("accelerators")
            if any(isinstance(one, Failed) for one in accelerators.values()):
                return Row("memory", "unchecked", "see accelerators")
            return resources.memory(asked, self._need, self._layout, accelerators, held)

        judge("memory", memory)

    def _look_at_folder(self) -> None:
        output, meeting = self._flags.output, self._meeting
        if output is None:
            self._judge("run folder", lambda: Row("run folder", "unchecked", "no --output"))
            return
        with _token(output, self._first) as left:
            token = meeting.tell("token", left)
            seen = meeting.gather("seen", attempt(lambda: _sees(token)))

            def judge(held: dict[int, bool]) -> Row:
                space, writes = machine.disk(output), self._flags.writes
                needed = self._need.disk if self._need else None
                return resources.disk(self._asked, space, held, output, needed, writes)

            self._judge("run folder", lambda: settled("run folder", self._asked, seen, judge))

    def _look_at_trunk_cache(self) -> None:
        """Adds a row only where the run asks for a cache."""
        if self._flags.config.trunk_cache != "off":
            self._judge(trunk_cache.CHECK, self._of_trunk_cache)

    def _of_trunk_cache(self) -> Row:
        flags, asked, need = self._flags, self._asked, self._need
        if self._skeleton is None or isinstance(self._skeleton, Failed) or need is None:
            why = "no --model" if self._skeleton is None else "see model"
            return Row(trunk_cache.CHECK, "unchecked", why)
        if flags.config.chooses:
            return Row(trunk_cache.CHECK, "unchecked", "include auto chooses what trains")
        wanted = flags.trunk_cache(self._skeleton, self._meeting.world_size)
        if row := trunk_cache.nothing_to_keep(wanted):
            return row
        if flags.config.trunk_cache == "disk":
            if flags.output is None:
                return Row(trunk_cache.CHECK, "unchecked", "no --output")
            space = machine.disk(flags.output)
            return trunk_cache.on_disk(asked, wanted, space, flags.output, need.disk)
        hosts = {rank: facts["memory"] for rank, facts in self._machines.items()}
        if any(isinstance(one, Failed) for one in hosts.values()):
            return Row(trunk_cache.CHECK, "unchecked", "see memory")
        kinds = {getattr(facts["accelerators"], "kind", "cpu") for facts in self._machines.values()}
        beside = resources.bytes_on_host(need, self._layout, "cpu" in kinds)
        return trunk_cache.in_memory(asked, wanted, hosts, beside)

    def _try_network(self) -> None:
        asked, meeting = self._asked, self._meeting
        peers = {r: a for r, a in self._addresses.items() if not isinstance(a, Failed)}
        mute = {
            r: a for r, a in self._addresses.items() if isinstance(a, Failed) and r != meeting.rank
        }
        tried: dict[int, float | Failed] = {**network.reach_all(meeting.rank, peers), **mute}
        reached = meeting.gather("reached", attempt(lambda: tried))
        meeting.tell("tried", None)  # all of it, before links are filled
        leaders = [ranks[0] for ranks in asked.hosts.values()]
        rate: tuple[int, float | Failed] | None = None
        if meeting.rank in leaders and len(leaders) > 1:
            peer = leaders[(leaders.index(meeting.rank) + 1) % len(leaders)]
            rate = peer, attempt(lambda: network.rate(peer, peers[peer]))
        rates = meeting.gather("rates", rate)
        meeting.tell("rated", None)
        if not self._first:
            return
        loopback = [rank for rank, address in peers.items() if address.host.startswith("127.")]

        def ways(held: dict[int, Any]) -> Row:
            return verdicts.reachability(asked, held, loopback)

        self._judge("reachability", lambda: settled("reachability", asked, reached, ways))
        if self.rows[-1].status == "red":  # what is not reached would only be red again
            self._skip("bandwidth", "reachability")
            return
        found = {rank: rate for rank, rate in rates.items() if rate is not None}
        self._judge("bandwidth", lambda: verdicts.bandwidth(asked, found, self._sent()))

    def _sent(self) -> int | None:
        """Bytes of weights that a forward brings to each host from others at least."""
        hosts = self._asked.hosts
        spread = self._layout.second or self._layout.shards
        if self._need is None or spread <= min(len(held) for held in hosts.values()):
            return None
        return self._need.sent * (len(hosts) - 1) // len(hosts)

    def _work_together(self) -> None:
        """What hangs where ranks do not reach each other, so each has an end."""
        flags, meeting = self._flags, self._meeting
        lame = [row.check for row in self.rows if row.status == "red"]
        why = next((c for c in ("ranks", "reachability", "backend", "versions") if c in lame), None)
        if why := meeting.tell("not together", why):
            self._skip("collectives", why)
            self._skip(selftest.CHECK, why)
            return
        seconds = meeting.gather(
            "joined", attempt(lambda: within(meeting.wait, lambda: _joined(flags)))
        )
        self._judge(
            "collectives", lambda: settled("collectives", self._asked, seconds, self._collectives)
        )
        if meeting.tell("apart", self._first and self.rows[-1].status == "red"):
            self._skip(selftest.CHECK, "collectives")
            return
        found = meeting.gather(
            selftest.CHECK,
            attempt(
                lambda: within(
                    meeting.wait,
                    lambda: selftest.run(flags.settings, flags.deepspeed, meeting.world_size),
                )
            ),
        )
        self._judge(
            selftest.CHECK,
            lambda: selftest.judge(
                {rank: found.get(rank, Failed("no answer in time")) for rank in self._asked.ranks},
                selftest.expected(meeting.world_size), flags.how,
            ),
        )  # fmt: skip

    def _collectives(self, seconds: dict[int, float]) -> Row:
        if len(seconds) == 1:
            return Row("collectives", "unchecked", "there is one rank")
        text = f"all-reduce by {self._backend} in {1000 * max(seconds.values()):.1f} ms"
        return Row("collectives", "green", text)

    def _skip(self, check: str, why: str) -> None:
        self._judge(check, lambda: Row(check, "unchecked", f"see {why}"))


@contextmanager
def _token(output: Path, first: bool) -> Iterator[resources.Token | Failed | None]:
    token = attempt(lambda: resources.leave_token(output)) if first else None
    try:
        yield token
    finally:
        if isinstance(token, resources.Token):
            with suppress(OSError):
                token.path.unlink()


def _sees(token: resources.Token | Failed | None) -> bool:
    if not isinstance(token, resources.Token):
        raise ShardingError(token.why if token else "no token")
    return resources.sees(token)


def _joined(flags: RunFlags) -> float:
    """Seconds of an all-reduce in the run's own world.

    Raises:
        ShardingError: it sums wrongly.
    """
    join_world(flags.deepspeed is not None, flags.settings.fsdp, TIMEOUT)
    if not dist.is_initialized():
        return 0.0
    size, taken = dist.get_world_size(), 0.0
    for _ in range(2):  # the first makes connections
        numbers = torch.full((1024,), dist.get_rank() + 1, dtype=torch.int64, device=local_device())
        start = time.perf_counter()
        dist.all_reduce(numbers)
        found = set(numbers.tolist())
        taken = time.perf_counter() - start
        if found != {size * (size + 1) // 2}:
            raise ShardingError(f"an all-reduce of 1 to {size} gave {min(found)} to {max(found)}")
    return taken
