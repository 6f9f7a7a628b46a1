"""Measurement of one way of sharding in one world: what its steps take and send. Runs on every rank."""

from __future__ import annotations

import argparse
import gc
import os
import socket
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from step_overhead import ROOT, make_batch

from parts.common.backends import settle
from parts.common.machine import describe
from parts.methods.report import Record
from parts.scaling.split import PARTS, Split
from tezo_ds.config import resolve
from tezo_ds.engine.engine import Engine
from tezo_ds.engine.live_bytes import LiveBytes
from tezo_ds.models import loading
from tezo_ds.models.fsdp import FsdpPlan
from tezo_ds.sharding import Sharding, sharding_of

sys.path.append(str(ROOT / "tests" / "helpers"))
from traffic import Collective, Traffic

SHARDINGS = ("zero3", "zero3-hpz", "fsdp2", "fsdp2-hybrid")


def copies(sharding: str, nodes: int) -> int:
    """Returns how many copies of the weights a world holds: of hybrids one a node, or two on a single one."""
    return max(2, nodes) if sharding in ("zero3-hpz", "fsdp2-hybrid") else 1


def misfit(sharding: str, world: int, nodes: int = 1) -> str | None:
    """Returns why a world cannot have a way of sharding; None if it can."""
    many = copies(sharding, nodes)
    if many > 1 and (world % many or world < 2 * many):
        return f"{sharding} needs {many} copies of two ranks or more each, and {world} ranks are no such"
    return None


def load(sharding: str, model: str, dtype: str, nodes: int) -> Sharding:
    """Loads a model as each rank's shards; none is ever whole but where ZeRO-3's rank 0 reads it.

    Args:
        sharding: one of SHARDINGS.
        model: a folder.
        dtype: dtype of the weights.
        nodes: machines of this world.
    """
    many = copies(sharding, nodes)
    if sharding.startswith("fsdp2"):
        return sharding_of(loading.load_model(model, dtype, fsdp=FsdpPlan(many)))
    zero: dict[str, Any] = {"stage": 3, "stage3_param_persistence_threshold": 0}
    if many > 1:
        zero["zero_hpz_partition_size"] = dist.get_world_size() // many
    config = {"zero_optimization": zero, "bf16": {"enabled": dtype == "bfloat16"}}
    return sharding_of(loading.load_model(model, "auto", config), config)


def examples_of(mode: str, world: int, args: argparse.Namespace) -> int:
    """Returns a rank's number of examples: the same in any world (weak), or its part of a total (strong)."""
    return int(args.batch_size if mode == "weak" else args.global_batch // world)


def measure(sharding: str, args: argparse.Namespace) -> list[Record]:
    """Returns a record for each probe and mode, the same on all ranks.

    Args:
        sharding: one of SHARDINGS, which fits the world.
        args: arguments of `scaling.arguments`.
    """
    world, where = dist.get_world_size(), hosts(args.threads)
    weights = load(sharding, args.model, args.dtype, len(where))
    common = {
        "model": args.name, "dtype": args.dtype, "sharding": sharding, "world": world, "nodes": len(where),
        "workers": sum(min(ranks, units) for ranks, units in where.values()),
        "length": args.length, "queries": args.queries, "rank": args.rank, "steps": args.steps,
        "backend": dist.get_backend(), "machine": describe(),
    }  # fmt: skip
    live, records = LiveBytes(), []
    for probe in args.probes:
        sizes: dict[int, Record] = {}
        for mode in args.modes:
            examples = examples_of(mode, world, args)
            if examples not in sizes:  # weak and strong meet in one world
                sizes[examples] = _steps(weights, probe, examples, args, live)
            record = {**common, "probe": probe, "mode": mode, "examples": examples}
            records.append({**record, **sizes[examples]})
    return records


def hosts(threads: int) -> dict[str, tuple[int, int]]:
    """Returns for each machine its ranks, and how many of them can work at once (accelerators, or cores by
    the threads of a rank)."""
    accelerator = torch.accelerator.is_available()
    cores = max(1, len(os.sched_getaffinity(0)) // threads)
    mine = socket.gethostname(), torch.accelerator.device_count() if accelerator else cores
    everyone = gathered(mine)
    ranks = Counter(name for name, _ in everyone)
    return {name: (ranks[name], units) for name, units in everyone}


def gathered(thing: Any) -> list[Any]:
    """Gathers a thing of every rank on all of them."""
    things = [thing] * dist.get_world_size()
    dist.all_gather_object(things, thing)
    return things


def _steps(
    weights: Sharding, probe: str, examples: int, args: argparse.Namespace, live: LiveBytes
) -> Record:
    """Measures steps of one probe on a batch of its own for each rank."""
    vocabulary = cast(Any, weights.module).config.vocab_size
    batch = make_batch(f"{examples}x{args.length}", vocabulary, "last", seed=weights.place)
    fields = {"rank": args.rank, "queries": args.queries, "lr": 1e-9, "probe": probe}
    config, _ = resolve({**fields, "include": args.include, "check_every": 0})
    with live:  # from the first forward on, whose buffers FSDP2 keeps
        engine = Engine(weights, config, None)
        for _ in range(args.discard):
            engine.step(batch)
        live.peak = 0
        with Traffic() as traffic:
            engine.step(batch)
    if torch.accelerator.is_available():
        torch.accelerator.reset_peak_memory_stats()
    seconds = timed_steps(engine, batch, args.steps)
    peak = (
        torch.accelerator.max_memory_allocated()
        if torch.accelerator.is_available()
        else held(engine) + live.peak
    )
    record = {
        **summary(gathered(seconds)),
        **sent(traffic.calls),
        "peak_bytes": max(gathered(peak)),
    }
    record["gathers_alone_s"] = gathers_alone(traffic.calls, weights.device)
    del engine
    gc.collect()
    return record


def timed_steps(
    engine: Engine, batch: dict[str, torch.Tensor], steps: int
) -> list[dict[str, float]]:
    """Measures seconds of each part of each step, and of the "step", which all ranks begin together."""
    split, found = Split(), []
    with split.of(engine):
        for _ in range(steps):
            settle()
            with split.part("rest"):
                engine.step(batch)
            parts = split.seconds()
            found.append({**parts, "step": sum(parts.values())})
    return found


def held(engine: Engine) -> int:
    """Counts the bytes of this rank's shards, of parameters that train or not; all copies of them."""
    sizes: list[int] = []
    names = [name for name, _ in engine.sharding.module.named_parameters()]
    engine.sharding.each_shard(names, lambda view: sizes.append(view.local.nbytes))
    return sum(sizes)


def summary(ranks: Sequence[Sequence[dict[str, float]]]) -> Record:
    """Summarises every rank's steps: the median of each part's mean over ranks, and of the slowest rank's
    step, and how far 10 and 90 % of the steps go, as columns NAME_s, NAME_s_low and NAME_s_high."""
    record: Record = {}
    for name in ("step", *PARTS):
        over = max if name == "step" else statistics.mean
        values = [over([step[name] for step in steps]) for steps in zip(*ranks, strict=True)]
        tenths = statistics.quantiles(values, n=10, method="inclusive")
        low, middle, high = tenths[0], statistics.median(values), tenths[-1]
        record |= {f"{name}_s": middle, f"{name}_s_low": low, f"{name}_s_high": high}
    return record


def sent(calls: Sequence[Collective]) -> Record:
    """Counts calls and bytes of a step, of whole messages with their padding: gathers, and the rest, which is
    ours."""
    found: dict[tuple[str, int], list[int]] = {}
    for call in calls:
        kind = "gather" if call.gathers else call.op.strip("_")
        found.setdefault((kind, len(call.ranks)), []).append(call.nbytes)
    gathers = [call for call in calls if call.gathers]
    return {
        "gather_ranks": max((len(call.ranks) for call in gathers), default=1),
        "gather_calls": len(gathers),
        "gather_bytes": sum(call.nbytes for call in gathers),
        "our_calls": len(calls) - len(gathers),
        "our_bytes": sum(call.nbytes for call in calls if not call.gathers),
        "collectives": "; ".join(
            f"{kind} of {ranks}: {len(sizes)} x, {sum(sizes)} B"
            for (kind, ranks), sizes in sorted(found.items())
        ),
    }  # fmt: skip


def gathers_alone(calls: Sequence[Collective], device: torch.device, repeats: int = 3) -> float:
    """Measures median seconds of a step's all-gathers one after the other with nothing beside them, on the
    slowest rank. All ranks call this."""
    mine = [call for call in calls if call.gathers]
    groups = {ranks: group for ranks, group in _groups([call.ranks for call in mine])}
    most = max((call.nbytes for call in mine), default=0)
    whole = torch.empty(most, dtype=torch.uint8, device=device)
    found = []
    for _ in range(repeats + 1):
        settle()
        start = time.perf_counter()
        for call in mine:
            size = call.nbytes // len(call.ranks)
            whole_part = whole[: size * len(call.ranks)]
            dist.all_gather_into_tensor(whole_part, whole[:size].clone(), groups[call.ranks])
        settle()
        found.append(max(gathered(time.perf_counter() - start)))
    for group in groups.values():
        if group is not None:
            dist.destroy_process_group(group)
    return statistics.median(found[1:])  # the first finds new memory


def _groups(mine: Sequence[tuple[int, ...]]) -> Iterator[tuple[tuple[int, ...], Any]]:
    """Yields a new group for each set of ranks that any rank has a call with; None for all of the world. All
    ranks make all groups, in the same order."""
    world = tuple(range(dist.get_world_size()))
    for ranks in sorted({ranks for some in gathered(sorted(set(mine))) for ranks in some}):
        yield ranks, None if ranks == world else dist.new_group(list(ranks))
