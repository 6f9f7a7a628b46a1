"""Steps on clusters that are not there, by the model of `tezo-ds plan`, and where they stop scaling."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from tezo_ds.config import resolve
from tezo_ds.plan import timing, traffic
from tezo_ds.plan.columns import Column, columns
from tezo_ds.plan.hardware import Cluster, gpu
from tezo_ds.plan.job import Job
from tezo_ds.plan.shapes import skeleton
from tezo_ds.plan.timing import Timing

OURS = {  # ways of this engine, and where a copy of the weights is
    "ZeRO-3": "one copy over all GPUs",
    "FSDP2": "one copy over all GPUs, a message a block",
    "hybrid": "FSDP2, a copy on each node, or on as few as hold one",
}
WAYS = (*OURS, "MeZO in place", "Adam")


@dataclass(frozen=True)
class Point:
    """A step of one way on one cluster.

    Attributes:
        model, gbit, world, way: a name of BUILT_IN; Gbit/s into a node; GPUs; one of WAYS.
        group: number of GPUs that share one copy of the weights.
        column: column of `tezo-ds plan`, of one such group.
        timing: timing of the step.
        latency: seconds of the step's gathers that are hops, and not bytes; not asked of MeZO and Adam.
        examples, length: examples of a rank's batch, and tokens of each.
        directions: number of directions that a step measures, over all ranks.
        fits: whether the step fits into the memory of a GPU.
    """

    model: str
    gbit: float
    world: int
    way: str
    group: int
    column: Column
    timing: Timing
    latency: float
    examples: int
    length: int
    directions: int
    fits: bool

    @property
    def tokens(self) -> float:
        """Tokens a second, over all ranks; those of the data, not of its branches."""
        return self.world * self.examples * self.length / self.timing.step

    @property
    def waits(self) -> bool:
        """Whether forwards wait for gathers."""
        return self.timing.gather - self.timing.exposed > self.timing.compute


def job_at(module: nn.Module, args: argparse.Namespace, world: int, gbit: float) -> Job:
    """Makes the job of this engine under plain ZeRO-3, each rank with directions of its own.

    Args:
        module: model of `shapes.skeleton`.
        args: arguments of `scaling_model.arguments`.
        world, gbit: GPUs, and Gbit/s into a node.
    """
    cluster = Cluster(gpu(args.gpu), world, args.per_node, gbit * 1e9 / 8, args.efficiency)
    fields = {"placement": "per_rank", "queries": args.queries, "include": args.include}
    config, _ = resolve(fields)
    return Job(
        module, config, "zero3", cluster, args.examples, args.length, labels=1, cached=args.cached
    )


def points(name: str, args: argparse.Namespace) -> list[Point]:
    """Returns the points of one model: every network, world and way.

    Args:
        name: name of a model, as `tezo-ds plan` takes it.
        args: arguments of `scaling_model.arguments`; worlds ascend and are whole nodes.
    """
    module, found = skeleton(name, "bfloat16"), []
    for gbit in args.gbit:
        whole: dict[int, Point] = {}
        for world in args.worlds:
            zero3 = job_at(module, args, world, gbit)
            fsdp2 = replace(zero3, sharding="fsdp2")
            ours, mezo, adam = columns(zero3)
            room = zero3.cluster.gpu.memory
            for way, column, latency, directions in (
                ("ZeRO-3", ours, hops(zero3), zero3.directions),
                ("FSDP2", columns(fsdp2)[0], hops(fsdp2), fsdp2.directions),
                ("MeZO in place", mezo, math.nan, args.queries),
                ("Adam", adam, math.nan, 0),
            ):
                found.append(Point(
                    name, gbit, world, way, world, column, column.timing, latency, args.examples,
                    args.length, directions, column.memory.total <= room,
                ))  # fmt: skip
            whole[world] = found[-3]
            found.append(hybrid(whole, world))
    return found


def hops(job: Job) -> float:
    """Returns seconds of a step's gathers on links that bytes do not fill."""
    cluster = job.cluster
    free = replace(cluster, link=math.inf, gpu=replace(cluster.gpu, nvlink=math.inf))
    endless = replace(job, cluster=free)
    return timing.engine(endless, traffic.engine(endless), True).gather


def hybrid(whole: dict[int, Point], world: int) -> Point:
    """Returns the point with copies on as few nodes as hold one. A copy gathers as a world of its own would;
    only the scalars are the whole world's.

    Args:
        whole: points of one copy, by world, of one model and network, up to this world.
        world: GPUs.
    """
    groups = [size for size, point in whole.items() if world % size == 0 and point.fits]
    copy, all_ = whole[min(groups, default=world)], whole[world]
    timing = replace(copy.timing, scalars=all_.timing.scalars)
    return replace(copy, way="hybrid", world=world, timing=timing, directions=all_.directions)


def efficiency(point: Point, line: Sequence[Point]) -> float:
    """Returns tokens/s and rank, over those of the smallest world in the line that fits."""
    first = next(other for other in line if other.fits)
    return (point.tokens / point.world) / (first.tokens / first.world)


@dataclass(frozen=True)
class Limit:
    """Point at which one way stops scaling, and why.

    Attributes:
        last: point of the largest world.
        efficiency: efficiency of the largest world.
        fits: the smallest world that fits; None: none does.
        waits: the smallest world whose forwards wait for gathers; None: none does.
        ceiling: tokens/s that no number of GPUs passes.
        half: GPUs that have half of the ceiling.
        examples: examples of a rank that would hide the gathers of the largest world.
        gbit: Gbit/s into a node that would; None: nothing crosses nodes, or NVLink would be slower.
    """

    last: Point
    efficiency: float
    fits: int | None
    waits: int | None
    ceiling: float
    half: float
    examples: int
    gbit: float | None


def limit(line: Sequence[Point], fastest: float) -> Limit:
    """Returns the limit of one model, network and way of this engine.

    Args:
        line: points of the worlds, ascending, two at least.
        fastest: bytes a second of NVLink.
    """
    before, last = line[-2:]
    spent, more = last.timing, last.world - before.world
    # Hops come one by one with the ranks, bytes and arithmetic do not: of W ranks a step takes
    # max(arithmetic, bytes + gathers · W) + scalars · W, and half of W → ∞ is where that is twice the hops.
    gathers = (last.latency - before.latency) / more
    scalars = (spent.scalars - before.timing.scalars) / more
    bytes_ = spent.gather - gathers * last.world
    return Limit(
        last,
        efficiency(last, line) if last.fits else math.nan,
        next((p.world for p in line if p.fits), None),
        next((p.world for p in line if p.waits), None),
        last.examples * last.length / (gathers + scalars),
        max(bytes_ / (gathers + scalars), spent.compute / (2 * gathers + scalars)),
        math.ceil(last.examples * (spent.gather - spent.exposed) / spent.compute),
        _hiding(last, fastest),
    )  # fmt: skip


def _hiding(point: Point, fastest: float) -> float | None:
    spent, moved = point.timing, point.column.traffic
    # The first gather is as large a part of all of them at any rate.
    longest = spent.compute * spent.gather / (spent.gather - spent.exposed)
    for_bytes = longest - point.latency
    if not moved.between or moved.received > fastest * for_bytes:
        return None
    return moved.received / for_bytes * 8 / 1e9


def line_of(points: Sequence[Point], model: str, gbit: float, way: str) -> list[Point]:
    """Returns the points of one model, network and way, the worlds ascending."""
    found = [p for p in points if (p.model, p.gbit, p.way) == (model, gbit, way)]
    return sorted(found, key=lambda p: p.world)
