"""Predictions of `tezo-ds plan` for a small model, beside what real ranks gather and hold."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import world_fsdp2
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from traffic import Traffic
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)
from worlds import World, case

import tezo_ds
from tezo_ds.config import TezoConfig
from tezo_ds.engine import replicas
from tezo_ds.engine.live_bytes import LiveBytes
from tezo_ds.plan import memory, traffic
from tezo_ds.plan.absent_zero3 import config_of
from tezo_ds.plan.hardware import GPUS, Cluster
from tezo_ds.plan.job import Job, Sharded
from tezo_ds.plan.prefetch import Limits
from tezo_ds.sharding import zero3

EXAMPLES, LENGTH, LABELS = 3, 41, 2
CONFIG = TezoConfig(rank=3, queries=2, rho=1e-2)
SMALL = {2: (("llama", 3),), 3: (("opt", 3), ("deep", 1))}  # and examples, by world
TIGHT = Limits(bucket=30_000, live=100_000, reuse=100_000)  # less than a block of `small`


def small(kind: str = "llama", tied: bool = False) -> nn.Module:
    """Makes a model large enough to drown what a plan leaves out, of sizes that no world divides. "deep"
    is a llama, too."""
    torch.manual_seed(0)  # or replicas differ after a case in which ranks drew unequally often
    hidden, layers = (142, 5) if kind == "deep" else (94, 3)
    sizes = {"vocab_size": 301, "hidden_size": hidden, "num_hidden_layers": layers}
    sizes |= {"num_attention_heads": 1, "max_position_embeddings": 64}
    if kind == "opt":
        return OPTForCausalLM(OPTConfig(**sizes, ffn_dim=381, word_embed_proj_dim=94)).eval()
    if kind == "gpt2":
        return GPT2LMHeadModel(GPT2Config(**sizes, n_inner=381)).eval()
    config = LlamaConfig(**sizes, intermediate_size=253, tie_word_embeddings=tied)
    return LlamaForCausalLM(config).eval()


def job_of(
    kind: str, sharding: Sharded, world: int, per_node: int, config: TezoConfig = CONFIG,
    examples: int = EXAMPLES,
) -> Job:  # fmt: skip
    with torch.device("meta"):
        module = small(kind)
    cluster = Cluster(GPUS["a100-40g"], world, per_node)
    return Job(module, config, sharding, cluster, examples, LENGTH, LABELS)


def seen(job: Job, make: Callable[[], nn.Module]) -> tuple[Traffic, int]:
    """Records a third step's collectives, and the most bytes of tensors alive in that step."""
    ids = torch.arange(job.examples * LENGTH).view(job.examples, LENGTH)
    labels = ids.clone()
    labels[:, :-LABELS] = -100
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    replicas.digest(torch.zeros(1))  # makes 2 MiB of constants, which stay
    gc.freeze()  # collections go through what is made from here on, not through all that cases have left
    with LiveBytes() as live:
        engine = tezo_ds.initialize(make(), job.config)
        for _ in range(3):
            gc.collect()  # what a first forward leaves in cycles is no tensor of a step
            live.peak = 0
            with Traffic() as moved:
                engine.step(batch)
    return moved, live.peak


def assert_as_predicted(job: Job, make: Callable[[], nn.Module]) -> int:
    """Asserts that a step gathers and holds what the plan predicts; returns the peak that was seen."""
    moved, peak = seen(job, make)
    predicted = traffic.engine(job)
    gathered = [call.nbytes for call in moved.calls if call.gathers]
    assert sum(gathered) == predicted.times * predicted.gathered * job.gathers
    assert len(gathered) == predicted.collectives
    own = [call.nbytes for call in moved.calls if not call.gathers]
    assert own == list(predicted.scalars)
    tensors = memory.engine(job).tensors
    assert tensors == pytest.approx(peak, rel=0.1), (job.sharding, tensors, peak)
    return peak


def assert_zero3_as_predicted(job: Job, kind: str) -> None:
    peak = assert_as_predicted(job, lambda: zero3.wrap(small(kind), config_of(job)))
    # Without the messages that lie beside what was copied out of them it would be off.
    assert memory.engine(job).tensors - max(job.ahead.messages) < 0.9 * peak


@case(worlds=(2, 3))
def a_plan_is_what_fsdp2_gathers_and_holds(world: World) -> None:
    for kind, examples in SMALL[world.size]:
        job = job_of(kind, "fsdp2", world.size, world.size, examples=examples)
        assert_as_predicted(job, lambda: world_fsdp2.shard(small(kind)))  # noqa: B023


@case(worlds=(2, 3))
def a_plan_is_what_zero3_gathers_and_holds(world: World) -> None:
    for kind, examples in SMALL[world.size]:
        job = job_of(kind, "zero3", world.size, world.size, examples=examples)
        assert_zero3_as_predicted(job, kind)


@case(worlds=(2,))
def a_plan_follows_limits_probes_and_copies(world: World) -> None:
    dense = TezoConfig(method="mezo", queries=2, rho=1e-2)
    for job in (
        replace(job_of("opt", "zero3", world.size, world.size), limits=TIGHT),
        replace(job_of("deep", "zero3", world.size, world.size, dense), limits=TIGHT),
    ):
        kind = "opt" if job.run.fused else "deep"
        assert_as_predicted(job, lambda: zero3.wrap(small(kind), config_of(job)))  # noqa: B023
    job = job_of("llama", "fsdp2", world.size, 8, dense)
    assert traffic.engine(job).times == 4
    assert_as_predicted(job, lambda: world_fsdp2.shard(small()))
    job = job_of("llama", "replicated", world.size, 8)
    assert_as_predicted(job, small)


@case(worlds=(4,))
def a_plan_of_replicas_is_what_ranks_gather_and_hold(world: World) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    job = job_of("llama", "fsdp2-hybrid", world.size, 2)
    assert_as_predicted(job, lambda: world_fsdp2.shard(small(), mesh))
    hpz = job_of("llama", "zero3-hpz", world.size, 2)
    assert_zero3_as_predicted(hpz, "llama")
