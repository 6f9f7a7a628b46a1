"""A plan: this engine beside MeZO-style in-place and first-order Adam under ZeRO-3, and what to do where it
does not fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from tezo_ds.config import resolve
from tezo_ds.plan import memory, timing, traffic
from tezo_ds.plan.job import Job, Sharded
from tezo_ds.plan.memory import Memory
from tezo_ds.plan.needs import GIB
from tezo_ds.plan.timing import Timing
from tezo_ds.plan.traffic import Traffic

MOST_RANKS = 4096  # up to which a larger world is proposed


@dataclass(frozen=True)
class Column:
    """One way to train.

    Attributes:
        name: of it.
        memory, traffic, timing: of a rank and a step.
        examples: largest number a rank that fits.
        tokens: of the batch, a second, over all ranks.
        directions: a second; 0 for Adam, which needs none.
    """

    name: str
    memory: Memory
    traffic: Traffic
    timing: Timing
    examples: int
    tokens: float
    directions: float


def columns(job: Job, overlapped: bool = True) -> list[Column]:
    """This engine, MeZO in place under ZeRO-3, and Adam under ZeRO-3."""
    kept = {"queries": job.config.queries, "micro_batch": job.config.micro_batch}
    dense, _ = resolve({"method": "mezo", **kept})
    mezo = replace(job, config=dense, sharding="zero3", cached=False, form=None)
    probe = "fused" if job.run.fused else "in place"
    beside = "" if job.config.adapter == "none" else f" {job.config.adapter}"
    packed = f" {job.form.name}" if job.form else ""
    ours = f"{job.config.method}{beside}, {probe}, {job.sharding}{packed}"
    return [
        _engine(ours, job, overlapped),
        _engine("MeZO in place, ZeRO-3", mezo, overlapped),
        _adam("Adam, ZeRO-3", mezo, overlapped),
    ]


def advice(job: Job, ours: Column) -> list[str]:
    """What to change where this engine's run does not fit; [] where it does."""
    room = job.cluster.gpu.memory
    if ours.memory.total <= room:
        return []
    over = f"does not fit: {ours.memory.total / GIB:.1f} GiB of {room / GIB:.1f} GiB a rank"
    if ours.examples:
        batch = ours.examples * job.cluster.world
        return [f"{over}; lower --batch to {batch} ({ours.examples} a rank) or less{_smaller(job)}"]
    if chunked := _smaller(job):
        return [f"{over}, nor does one example a rank{chunked}"]
    return [f"{over}, nor does one example a rank; {_larger(job)}"]


def _smaller(job: Job) -> str:
    """Forwards of less at a time, if they fit."""
    update = {"branch_chunk": 1, "micro_batch": 1}
    less = replace(job, config=job.config.model_copy(update=update))
    if memory.engine(less).total > job.cluster.gpu.memory:
        return ""
    return f"; or run {less.forwards} forwards a step by --branch-chunk 1 --micro-batch 1"


def _larger(job: Job) -> str:
    """More ranks, or another sharding."""
    if job.form is not None:
        return "use --weights of fewer bits, or a GPU with more memory"
    least = job.with_examples(1)
    least = replace(least, config=job.config.model_copy(update={"branch_chunk": 1}))
    sharding: Sharded = "fsdp2" if job.layout.by_rows or not job.gathers else "zero3"
    tries: list[Job] = []
    if job.sharding != sharding:
        tries = [replace(least, sharding=sharding)]
    world = 2 * job.cluster.world
    while world <= MOST_RANKS:
        cluster = replace(job.cluster, world=world)
        tries.append(replace(least, cluster=cluster, sharding=sharding))
        world *= 2
    for other in tries:
        if memory.engine(other).total <= job.cluster.gpu.memory:
            return f"use --sharding {other.sharding} on --world {other.cluster.world}"
    return (
        "more ranks do not help, as what is gathered at once is too large; use a GPU with more memory, or "
        "shorter examples"
    )


def _engine(name: str, job: Job, overlapped: bool) -> Column:
    moved = traffic.engine(job)
    spent = timing.engine(job, moved, overlapped)
    return _column(name, job, memory.engine, moved, spent, job.directions)


def _adam(name: str, job: Job, overlapped: bool) -> Column:
    moved = traffic.adam(job)
    spent = timing.adam(job, moved, overlapped)
    return _column(name, job, memory.adam, moved, spent, 0)


def _column(
    name: str, job: Job, of: Callable[[Job], Memory], moved: Traffic, spent: Timing, directions: int
) -> Column:
    return Column(
        name, of(job), moved, spent, memory.largest_batch(job, of),
        job.cluster.world * job.examples * job.length / spent.step, directions / spent.step,
    )  # fmt: skip
