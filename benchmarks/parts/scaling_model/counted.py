"""Comparison of what `tezo-ds plan` predicts with what its dry run counts."""

from __future__ import annotations

from tezo_ds.plan import memory, traffic
from tezo_ds.plan.dry_run import Counted
from tezo_ds.plan.job import Job

CLOSE = 0.1  # by which counted memory may differ from what was predicted

Line = tuple[str, float, float, bool]  # what, predicted, counted, whether that will do


def compared(job: Job, counted: Counted) -> list[Line]:
    """Returns the predictions of a job beside what a dry run counted, whose branches all run all layers."""
    job = job.as_way(shared=False)
    moved, tensors = traffic.engine(job), memory.engine(job).tensors
    scalars = sum(moved.scalars)
    return [
        ("all-gathers", moved.collectives, counted.gathers, moved.collectives == counted.gathers),
        ("bytes gathered", moved.total, counted.gathered, moved.total == counted.gathered),
        ("bytes of scalars", scalars, counted.scalars, scalars == counted.scalars),
        ("bytes of tensors at the peak", tensors, counted.tensors,
         abs(tensors - counted.tensors) <= CLOSE * counted.tensors),
    ]  # fmt: skip
