"""ZeRO-3 whose other ranks are not there: DeepSpeed's own engine on tensors without values."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator, set_accelerator
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from deepspeed.runtime.zero import partitioned_param_coordinator as coordinator
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tezo_ds.plan.absent import Absent
from tezo_ds.plan.job import Job
from tezo_ds.sharding.zero3 import Zero3, init_distributed, wrap
from tezo_ds.sharding.zero3_config import prepare


class AbsentZero3(Absent, Zero3):
    """Sharding of a DeepSpeedEngine."""


def config_of(job: Job) -> dict[str, Any]:
    """A DeepSpeed config with the job's limits, no persistent parameters, and else DeepSpeed's defaults.

    Args:
        job: of sharding zero3 or zero3-hpz.
    """
    zero = {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "stage3_prefetch_bucket_size": job.limits.bucket,
        "stage3_max_live_parameters": job.limits.live,
        "stage3_max_reuse_distance": job.limits.reuse,
        "zero_hpz_partition_size": job.cluster.in_node if job.sharding == "zero3-hpz" else 1,
    }
    names = {torch.bfloat16: "bf16", torch.float16: "fp16"}
    dtypes = {p.dtype for p in job.module.parameters()} & names.keys()
    return {"zero_optimization": zero, **{names[dtype]: {"enabled": True} for dtype in dtypes}}


def partitioned(job: Job, module: nn.Module, fake: FakeTensorMode) -> AbsentZero3:
    """The sharding of a model.

    Args:
        job: of sharding zero3 or zero3-hpz.
        module: its tensors have no values.
        fake: the mode that they are of.
    """
    config = prepare(config_of(job))
    init_distributed()
    with fake:
        # Not left to the engine, which would move the module to its device, as tensors without values cannot.
        deepspeed.zero.Init(module=module, config_dict_or_path=config)
        return AbsentZero3(wrap(module, config))


@contextmanager
def in_deepspeed() -> Iterator[None]:
    """Context manager: inside, DeepSpeed computes on the CPU, as rank 0 of a process group that is there
    already, and does not compare the layers' order over ranks, for which numbers would be needed."""
    before, rank = get_accelerator(), os.environ.get("LOCAL_RANK")
    compared = coordinator.assert_ints_same_as_other_ranks
    set_accelerator(CPU_Accelerator())
    os.environ["LOCAL_RANK"] = "0"
    coordinator.assert_ints_same_as_other_ranks = lambda ints: None
    try:
        yield
    finally:
        coordinator.assert_ints_same_as_other_ranks = compared
        set_accelerator(before)
        if rank is None:
            del os.environ["LOCAL_RANK"]
        else:
            os.environ["LOCAL_RANK"] = rank
        deepspeed.utils.groups._release_process_group_references()
        deepspeed.comm.comm.cdb = None
