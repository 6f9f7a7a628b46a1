"""Rows from what the ranks found: pure functions of gathered facts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import metadata, requires
from typing import Any, NamedTuple, TypeVar

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from tezo_ds import repeatable
from tezo_ds.doctor.machine import ABSENT, Accelerator, Space
from tezo_ds.doctor.report import Failed, Row
from tezo_ds.engine.replicas import listed
from tezo_ds.plan.needs import GIB
from tezo_ds.repeatable import Products

Thing = TypeVar("Thing")
TIGHT = 0.8  # of what is free; more is a warning
SHARED_MEMORY = GIB  # that NCCL's documentation asks for
OPTIONAL = {"deepspeed"}  # packages that only some runs need
_SHOWN = 3


class Who(NamedTuple):
    """Host and local rank of a rank."""

    host: str
    local_rank: int


class Asked(NamedTuple):
    """Ranks that were asked, and where each is; for words."""

    ranks: Mapping[int, Who]

    @property
    def hosts(self) -> dict[str, list[int]]:
        """Ranks by host."""
        found: dict[str, list[int]] = {}
        for rank, who in sorted(self.ranks.items()):
            found.setdefault(who.host, []).append(rank)
        return found

    def name(self, rank: int) -> str:
        """Names a rank and its host."""
        return f"rank {rank} ({self.ranks[rank].host})" if rank in self.ranks else f"rank {rank}"


def settled(
    check: str, asked: Asked, found: Mapping[int, Thing | Failed],
    judge: Callable[[dict[int, Thing]], Row],
) -> Row:  # fmt: skip
    """Returns the row that `judge` gives of what all ranks found; red where one could not."""
    fine: dict[int, Thing] = {}
    for rank in asked.ranks:
        answer = found.get(rank, Failed("gave no answer in time"))
        if isinstance(answer, Failed):
            return Row(check, "red", f"{asked.name(rank)}: {answer.why}")
        fine[rank] = answer
    return judge(fine)


def ranks(asked: Asked, world_size: int) -> Row:
    """Judges whether all ranks have come."""
    where = ", ".join(f"{host}: {len(held)}" for host, held in list(asked.hosts.items())[:8])
    found = f"{len(asked.ranks)} of {world_size} on {len(asked.hosts)} host(s) ({where})"
    if missing := [rank for rank in range(world_size) if rank not in asked.ranks]:
        return Row(
            "ranks", "red", f"{listed(missing)} did not report; {found}",
            "look at their output, their host, and whether it reaches MASTER_ADDR:MASTER_PORT",
        )  # fmt: skip
    return Row("ranks", "green", found)


def versions(asked: Asked, found: Mapping[int, Mapping[str, str]]) -> Row:
    """Judges versions: supported, and equal on all ranks."""
    wrong, first = [], found[min(found)]
    for name in first:
        by_value = _ranks_by({rank: held[name] for rank, held in found.items()}, str)
        if len(by_value) > 1:
            wrong.append(name + " is " + _differing(asked, by_value))
    if wrong:
        return Row("versions", "red", "; ".join(wrong), "install the same on all hosts")
    needed = {
        Requirement(text).name: Requirement(text).specifier for text in requires("tezo_ds") or ()
    }
    needed["python"] = SpecifierSet(metadata("tezo_ds")["Requires-Python"] or "")
    for name, value in first.items():
        if (
            value == ABSENT and name in OPTIONAL
        ):  # who asks for it without having it is refused before
            continue
        if not _within(value, needed.get(name, SpecifierSet())):
            wrong.append(f"{name} is {value}, supported is {needed.get(name)}")
    if wrong:
        return Row("versions", "red", "; ".join(wrong), "install what is supported")
    return Row("versions", "green", ", ".join(f"{name} {value}" for name, value in first.items()))


def _within(value: str, wanted: SpecifierSet) -> bool:
    """Returns whether a version fits; a build before a release, as vendors ship, counts as that release."""
    if value == ABSENT:
        return False
    try:
        return wanted.contains(Version(value.split(" ")[0]).base_version)
    except InvalidVersion:
        return True  # somebody's own build


def accelerators(asked: Asked, found: Mapping[int, Accelerator], bfloat16: bool) -> Row:
    """Judges accelerators: enough of them, the same on all ranks, and able to do what is asked.

    Args:
        asked: where ranks are.
        found: accelerators by rank.
        bfloat16: whether forwards are in bfloat16.
    """
    check, first = "accelerators", found[min(found)]
    for rank, held in found.items():
        if held.deepspeed not in (None, held.kind):
            return Row(
                check, "red", f"{asked.name(rank)}: DeepSpeed runs on {held.deepspeed}, torch on {held.kind}",
                f"set DS_ACCELERATOR={held.kind}, or leave it unset",
            )  # fmt: skip
        if held.kind != "cpu" and asked.ranks[rank].local_rank >= held.count:
            return Row(
                check, "red", f"{asked.name(rank)} is number {asked.ranks[rank].local_rank + 1} of its "
                f"host, which shows {held.count}", "start fewer ranks there (slots, --nproc-per-node)",
            )  # fmt: skip
    by_kind = _ranks_by(found, lambda held: f"{held.name or held.kind}, {held.total / GIB:.0f} GiB")
    if len({held.kind for held in found.values()}) > 1:
        return Row(check, "red", _differing(asked, by_kind), "use the same kind on all ranks")
    if first.kind == "cpu":
        return _of_cpus(asked, found)
    if bfloat16 and (lacking := [rank for rank, held in found.items() if not held.bf16]):
        return Row(check, "red", f"no bfloat16 on {listed(lacking)}", "use float16 or float32")
    if len(by_kind) > 1:
        return Row(
            check, "yellow", _differing(asked, by_kind), "the slowest and smallest of them sets the pace",
        )  # fmt: skip
    bf16 = "with" if first.bf16 else "without"
    return Row(
        check, "green", f"{len(found)} x {next(iter(by_kind))} ({first.kind}), {bf16} bfloat16"
    )


def _of_cpus(asked: Asked, found: Mapping[int, Accelerator]) -> Row:
    first = found[min(found)]
    text = f"none: forwards run on the CPU, {first.cores} cores, {first.threads} thread(s) a rank"
    crowded = [
        host
        for host, held in asked.hosts.items()
        if sum(found[rank].threads for rank in held) > max(found[rank].cores for rank in held)
    ]
    if crowded:
        return Row(
            "accelerators", "yellow", f"{text}; more threads than cores on {', '.join(crowded[:4])}",
            "set OMP_NUM_THREADS to cores / ranks of a host, or start fewer ranks",
        )  # fmt: skip
    return Row("accelerators", "green", text)


def products(asked: Asked, found: Mapping[int, Products]) -> Row:
    """Judges matrix products: the same wherever the operands lie, and by the same kernels on all ranks."""
    check, by_kernels = "products", _ranks_by(found, lambda held: f"{held.kernels}, {held.asked}")
    odd = [rank for rank, held in found.items() if held.results > 1]
    if odd:
        return Row(
            check, "yellow", f"{found[odd[0]].results} results of one product over "
            f"{repeatable.PLACES} places in memory, {asked.name(odd[0])} ({found[odd[0]].kernels})",
            f"set {repeatable.VARIABLE}={repeatable.MODE} before torch starts, as tezo-ds does by itself",
        )  # fmt: skip
    if len(by_kernels) > 1:
        return Row(
            check, "yellow", _differing(asked, by_kernels),
            "a run goes on bit for bit only on the kernels it began with; losses are equal up to rounding",
        )  # fmt: skip
    return Row(
        check,
        "green",
        f"the same over {repeatable.PLACES} places in memory ({next(iter(by_kernels))})",
    )


def backend(name: str, available: bool) -> Row:
    """Judges the backend of the collectives."""
    if available:
        return Row("backend", "green", name)
    return Row("backend", "red", f"torch was built without {name}", "install a torch build with it")


def reachability(
    asked: Asked, found: Mapping[int, Mapping[int, Any]], loopback: Sequence[int]
) -> Row:
    """Judges whether every rank reaches every other one.

    Args:
        asked: where ranks are.
        found: by rank, seconds of a round trip to each other rank, or `Failed`.
        loopback: ranks whose collectives listen where no other host gets to.
    """
    check, several = "reachability", len(asked.hosts) > 1
    if len(asked.ranks) == 1:
        return Row(check, "unchecked", "there is one rank", "start the doctor as the run will be")
    lost = [
        (rank, peer, answer.why)
        for rank, answers in found.items()
        for peer, answer in answers.items()
        if isinstance(answer, Failed)
    ]
    advice = "check firewall and routing between these hosts"
    if several and loopback:
        advice = (
            "their host's name resolves to a loopback address: set GLOO_SOCKET_IFNAME (NCCL_SOCKET_IFNAME) "
            "to the interface, or mend /etc/hosts"
        )
    if several and loopback and not lost:
        return Row(check, "red", f"{listed(loopback)} listen(s) at a loopback address", advice)
    if lost:
        said = [f"{asked.name(a)} to {asked.name(b)}: {why}" for a, b, why in lost]
        more = f" (and {len(lost) - _SHOWN} more)" if len(lost) > _SHOWN else ""
        return Row(check, "red", "; ".join(said[:_SHOWN]) + more, advice)
    trips = [(answer, a, b) for a, held in found.items() for b, answer in held.items()]
    slowest, a, b = max(trips)
    return Row(
        check, "green", f"all {len(trips)} ways; slowest round trip {1000 * slowest:.2f} ms, {asked.name(a)} "
        f"to {asked.name(b)}",
    )  # fmt: skip


def bandwidth(
    asked: Asked, found: Mapping[int, tuple[int, float | Failed]], sent: int | None
) -> Row:
    """Judges the bandwidth of each host to the next, all at the same time.

    Args:
        asked: where ranks are.
        found: by sending rank, the receiving one, and bytes a second.
        sent: bytes of weights that a step gathers between hosts at least; None: not known.
    """
    check = "bandwidth"
    if not found:
        return Row(check, "unchecked", "there is one host")
    for rank, (peer, answer) in found.items():
        if isinstance(answer, Failed):
            return Row(check, "red", f"{asked.name(rank)} to {asked.name(peer)}: {answer.why}")
    slowest, a, b = min((speed, rank, peer) for rank, (peer, speed) in found.items())
    assert not isinstance(slowest, Failed)
    text = f"slowest {8e-6 * slowest:,.0f} Mbit/s by one connection, {asked.name(a)} to {asked.name(b)}"
    if not sent:
        return Row(check, "green", text)
    seconds = sent / slowest
    text += f"; {sent / 1e9:.2g} GB of weights between hosts take {seconds:.1f} s a forward"
    if seconds < 1:
        return Row(check, "green", text)
    return Row(
        check, "yellow", text,
        "shard within each host: --fsdp-replicas, or zero_hpz_partition_size; then scalars travel alone",
    )  # fmt: skip


def shared_memory(asked: Asked, found: Mapping[int, Space], nccl: bool) -> Row:
    """Judges shared memory, by which NCCL sends between the ranks of a host."""
    check = "shared memory"
    if not nccl or all(len(held) == 1 for held in asked.hosts.values()):
        return Row(check, "unchecked", "not used by gloo" if not nccl else "one rank a host")
    rank = min(found, key=lambda rank: found[rank].free)
    text = f"{found[rank].free / GIB:.2f} GiB free in /dev/shm of {asked.ranks[rank].host}"
    if found[rank].free >= SHARED_MEMORY:
        return Row(check, "green", text)
    return Row(
        check, "yellow", text, "NCCL asks for 1 GiB; in a container start it with --shm-size=1g"
    )


def open_files(asked: Asked, found: Mapping[int, int], world_size: int) -> Row:
    """Judges the limit of open files: connections to all ranks in a few groups, and a checkpoint's files."""
    needed = 256 + 8 * world_size
    rank = min(found, key=lambda rank: found[rank] if found[rank] >= 0 else 1 << 62)
    limit = found[rank]
    text = f"at most {limit} on {asked.ranks[rank].host}, some {needed} needed"
    if limit < 0 or limit >= needed:
        return Row("open files", "green", text if limit >= 0 else "no limit")
    return Row("open files", "yellow", text, f"raise it: ulimit -n {max(4096, needed)}")


def _ranks_by(found: Mapping[int, Thing], value: Callable[[Thing], str]) -> dict[str, list[int]]:
    by_value: dict[str, list[int]] = {}
    for rank, held in sorted(found.items()):
        by_value.setdefault(value(held), []).append(rank)
    return by_value


def _differing(asked: Asked, by_value: Mapping[str, Sequence[int]]) -> str:
    """Lists values, each with the ranks that have it, and the host of the first."""
    return ", ".join(
        f"{value} on {listed(held)} ({asked.ranks[held[0]].host})"
        for value, held in by_value.items()
    )
