"""Steps of a plan whose first layers stay frozen: each branch runs them, one does for all, or none does, as
what they give is cached."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from tezo_ds.plan import timing, traffic
from tezo_ds.plan.job import Job
from tezo_ds.plan.needs import GIB
from tezo_ds.plan.timing import Timing
from tezo_ds.plan.traffic import Traffic
from tezo_ds.plan.trunk import Kept

EPOCHS = (2, 5, 10)  # of which means are shown


@dataclass(frozen=True)
class Way:
    """A step with or without the trunk.

    Attributes:
        name: "each branch", "shared" or "cached".
        flops: FLOPs of all forwards of a rank, over those of the step in which each branch runs all layers.
        traffic, timing: of a rank and a step.
    """

    name: str
    flops: float
    traffic: Traffic
    timing: Timing


def ways(job: Job, overlapped: bool) -> list[Way]:
    """Returns the three ways of a step; [] where there is no trunk."""
    shared = job.as_way(shared=True)
    if not shared.trunk.first:
        return []
    jobs = {
        "each branch": job.as_way(shared=False),
        "shared": shared,
        "cached": job.as_way(shared=True, cached=True),
    }
    found, plain = [], timing.step_flops(jobs["each branch"])
    for name, way in jobs.items():
        moved = traffic.engine(way)
        spent = timing.engine(way, moved, overlapped)
        found.append(Way(name, timing.step_flops(way) / plain, moved, spent))
    return found


def mean_step(ways: Sequence[Way], epochs: int) -> float:
    """Returns seconds of a step in the mean of some epochs: the first shares the trunk and fills the cache,
    from which all others are served."""
    _, shared, cached = (way.timing.step for way in ways)
    return (shared + (epochs - 1) * cached) / epochs


def kept(job: Job, examples: int | None, tokens: float | None) -> Kept:
    """Returns what a rank's cache takes.

    Args:
        job: the planned run.
        examples: training examples over all ranks; None: not known.
        tokens: mean tokens of an example, without padding; None: those of the job.
    """
    bound = job.config.trunk_cache_gib
    return Kept(
        round((tokens or job.length) * job.shape.hidden * job.shape.itemsize),
        None if examples is None else -(-examples // job.cluster.world),
        None if bound is None else int(bound * GIB),
    )


def lines(job: Job, ways: Sequence[Way], kept: Kept) -> list[str]:
    """Returns what is to be said of the trunk and its cache beside the table."""
    chosen = job.config.trunk_cache
    if not ways:
        if chosen == "off":
            return []
        return [
            f"trunk_cache {chosen}: there is no trunk to keep, as the first layer, or what stands before it, "
            "trains; train late layers alone, e.g. --include last:6"
        ]
    trunk = job.as_way(shared=True).trunk
    means = ", ".join(f"{mean_step(ways, epochs):.3g} s over {epochs}" for epochs in EPOCHS)
    found = [
        f"layers 0 to {trunk.first - 1} of {trunk.layers} come before the first that trains",
        "trunk_cache pays from the second epoch on: in the mean of E epochs a step takes (shared + (E - 1) "
        f"cached) / E, {means}",
    ]
    if chosen == "off":
        return found
    where = "host memory" if chosen == "memory" else "the run's folder"
    each = f"trunk_cache {chosen}: an example takes {kept.each / 2**20:.3g} MiB of {where}"
    if kept.kept is None or kept.examples is None:
        most = "" if kept.bound is None else f", and a rank's at most {kept.bound / GIB:.3g} GiB"
        return [*found, f"{each}{most}; name --train-examples for all of them"]
    size = kept.kept * kept.each / GIB
    fits = "" if kept.kept == kept.examples else ", the others are computed at each visit"
    return [
        *found,
        f"{each}; {kept.kept:,} of a rank's {kept.examples:,} examples take {size:.3g} GiB, on all ranks "
        f"{size * job.cluster.world:.3g} GiB{fits}",
    ]  # fmt: skip


def show(ways: Sequence[Way], lines: Sequence[str]) -> None:
    """Prints the lines and the table of the ways, where there are any."""
    console = Console(highlight=False, width=None if Console().is_terminal else 110)
    for line in lines:
        console.print(line, markup=False)
    if not ways:
        return
    table = Table("of a rank and a step: the trunk", box=box.SIMPLE_HEAD)
    for way in ways:
        table.add_column(way.name, justify="right")
    table.add_row("FLOPs of forwards", *(f"{way.flops:.1%}" for way in ways))
    table.add_row("gathered weights", *(f"{way.traffic.total / GIB:.2f} GiB" for way in ways))
    table.add_row("received by a rank", *(f"{way.traffic.received / GIB:.2f} GiB" for way in ways))
    table.add_row("collectives of weights", *(f"{way.traffic.collectives:,}" for way in ways))
    table.add_row("arithmetic", *(f"{way.timing.compute:.3g} s" for way in ways))
    table.add_row("step", *(f"{way.timing.step:.3g} s" for way in ways))
    console.print(table)


def as_dict(job: Job, ways: Sequence[Way], kept: Kept) -> dict[str, Any] | None:
    """Returns all numbers; None where there is no trunk."""
    if not ways:
        return None
    trunk = job.as_way(shared=True).trunk
    return {
        "first": trunk.first,
        "layers": trunk.layers,
        "ways": [{**asdict(w), "gathered": w.traffic.total, "step": w.timing.step} for w in ways],
        "mean_step": {str(epochs): mean_step(ways, epochs) for epochs in EPOCHS},
        "cache": {"example": kept.each, "kept": kept.kept, "bytes": kept.nbytes},
    }
