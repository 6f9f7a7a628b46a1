"""A plan as a table or as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from tezo_ds.plan.columns import Column
from tezo_ds.plan.dry_run import Counted
from tezo_ds.plan.job import Job
from tezo_ds.plan.needs import GIB
from tezo_ds.plan.shapes import numel


def show(job: Job, columns: Sequence[Column], about: str, warnings: Sequence[str]) -> None:
    """Prints the table, and a line for each warning."""
    console = Console(highlight=False, width=None if Console().is_terminal else 110)
    console.print(_heading(job, about), markup=False)
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("of a rank and a step")
    for column in columns:
        table.add_column(column.name, justify="right")
    for name, cell in _rows(job):
        table.add_row(name, *map(cell, columns), end_section=name in ("of it reserved", "scalars"))
    console.print(table)
    for warning in warnings:
        console.print(f"warning: {warning}", markup=False)


def show_counted(counted: Counted) -> None:
    """Prints what a dry run counted."""
    table = Table("counted by a dry run, of a rank and a step", box=box.SIMPLE_HEAD)
    table.add_column("", justify="right")
    table.add_row("all-gathers", f"{counted.gathers:,}")
    table.add_row("bytes gathered", f"{counted.gathered:,}")
    table.add_row("bytes of scalars", f"{counted.scalars:,}")
    table.add_row("bytes of tensors at the peak", f"{counted.tensors:,}")
    Console(highlight=False).print(table)


def as_json(
    job: Job, columns: Sequence[Column], warnings: Sequence[str], counted: Counted | None,
    trunk: dict[str, Any] | None = None, output_layer: Mapping[str, Any] | None = None,
) -> str:  # fmt: skip
    """One object; bytes and seconds."""
    found = {
        "parameters": numel(job.module),
        "bits": job.bits,
        "examples_per_rank": job.examples,
        "columns": [
            {**asdict(c), "fits": c.memory.total <= job.cluster.gpu.memory, "step": c.timing.step,
             "total": c.memory.total}
            for c in columns
        ],
        "warnings": list(warnings),
    }  # fmt: skip
    if adapters := job.run.adapters.sites:
        found["adapter"] = {"sites": len(adapters), "numel": job.run.adapters.numel}
    if trunk is not None:
        found["trunk"] = trunk
    if output_layer is not None:
        found["output_layer"] = output_layer
    if counted is not None:
        found["dry_run"] = asdict(counted)
    return json.dumps(found, indent=2)


def of_adapters(job: Job) -> str:
    """Returns a line that tells what trains beside the weights."""
    adapters, branches = job.run.adapters, job.branches_at_once
    return (
        f"adapter {job.config.adapter}: {len(adapters.sites)} of them, {adapters.numel:,} numbers train; "
        f"in {branches} branches at once they take {adapters.bytes_in(branches) / GIB:.3f} GiB"
    )


def _heading(job: Job, about: str) -> str:
    cluster = job.cluster
    return (
        f"{about}: {numel(job.module) / 1e9:.1f} B weights of {job.bits:.4g} bits; "
        f"{cluster.nodes} nodes of {cluster.in_node} GPUs, {cluster.link * 8 / 1e9:g} Gbit/s a node; "
        f"{job.examples} examples of {job.length} tokens a rank, {job.branches} branches"
    )


def _rows(job: Job) -> list[tuple[str, Callable[[Column], str]]]:
    def gib(of: Callable[[Column], float]) -> Callable[[Column], str]:
        return lambda column: f"{of(column) / GIB:.2f} GiB"

    def seconds(of: Callable[[Column], float]) -> Callable[[Column], str]:
        return lambda column: f"{of(column):.3g} s"

    def largest(column: Column) -> str:
        return (
            f"{column.examples} ({column.examples * job.cluster.world})" if column.examples else "-"
        )

    def total(column: Column) -> str:
        over = "" if column.memory.total <= job.cluster.gpu.memory else " !"
        return f"{column.memory.total / GIB:.2f} GiB{over}"

    return [
        ("shard of the weights", gib(lambda c: c.memory.shard)),
        ("U, V, adapters or copies", gib(lambda c: c.memory.factors)),
        ("state of the method", gib(lambda c: c.memory.state)),
        ("gathered weights", gib(lambda c: c.memory.gathered)),
        ("activations", gib(lambda c: c.memory.activations)),
        ("logits", gib(lambda c: c.memory.logits)),
        ("peak memory", total),
        ("of it reserved", gib(lambda c: c.memory.reserved)),
        ("largest batch a rank (all)", largest),
        ("received by a rank", gib(lambda c: c.traffic.received)),
        ("moved inside a node", gib(lambda c: c.traffic.inside)),
        ("into a node from others", gib(lambda c: c.traffic.between)),
        ("collectives of weights", lambda c: f"{c.traffic.collectives:,}"),
        ("scalars", lambda c: f"{sum(c.traffic.scalars)} B"),
        ("arithmetic", seconds(lambda c: c.timing.compute)),
        ("collectives", seconds(lambda c: c.timing.gather)),
        ("writing weights", seconds(lambda c: c.timing.update)),
        ("step", seconds(lambda c: c.timing.step)),
        ("tokens/s, all ranks", lambda c: f"{c.tokens:,.0f}"),
        ("directions/s", lambda c: f"{c.directions:.3g}" if c.directions else "-"),
    ]
