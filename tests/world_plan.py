"""What `tezo-ds plan` predicts of a small model, beside what real ranks gather and hold."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
import world_fsdp2
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from traffic import Traffic
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM
from world_zero3 import ZERO3
from worlds import World, case

import tezo_ds
from tezo_ds import watch
from tezo_ds.config import TezoConfig
from tezo_ds.live_bytes import LiveBytes
from tezo_ds.plan import memory, traffic
from tezo_ds.plan.hardware import GPUS, Cluster
from tezo_ds.plan.job import Job, Sharded
from tezo_ds.sharding import zero3

EXAMPLES, LENGTH, LABELS = 3, 41, 2
CONFIG = TezoConfig(rank=3, queries=2, rho=1e-2)


def small(kind: str = "llama", tied: bool = False) -> nn.Module:
    """Large enough to drown what a plan leaves out; no size that a world divides."""
    sizes = {"vocab_size": 301, "hidden_size": 94, "num_hidden_layers": 3, "num_attention_heads": 1}
    sizes["max_position_embeddings"] = 64
    if kind == "opt":
        return OPTForCausalLM(OPTConfig(**sizes, ffn_dim=381, word_embed_proj_dim=94)).eval()
    config = LlamaConfig(**sizes, intermediate_size=253, tie_word_embeddings=tied)
    return LlamaForCausalLM(config).eval()


def job_of(
    kind: str, sharding: Sharded, world: int, per_node: int, config: TezoConfig = CONFIG
) -> Job:
    with torch.device("meta"):
        module = small(kind)
    cluster = Cluster(GPUS["a100-40g"], world, per_node)
    return Job(module, config, sharding, cluster, EXAMPLES, LENGTH, LABELS)


def seen(make: Callable[[], nn.Module], config: TezoConfig) -> tuple[Traffic, int]:
    """A third step's collectives, and the most bytes of tensors in it."""
    ids = torch.arange(EXAMPLES * LENGTH).view(EXAMPLES, LENGTH)
    labels = ids.clone()
    labels[:, :-LABELS] = -100
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    watch.digest(torch.zeros(1))  # makes 2 MiB of constants, which stay
    with LiveBytes() as live:
        engine = tezo_ds.initialize(make(), config)
        for _ in range(3):
            gc.collect()  # what a first forward leaves in cycles is no tensor of a step
            live.peak = 0
            with Traffic() as moved:
                engine.step(batch)
    return moved, live.peak


def assert_as_predicted(job: Job, make: Callable[[], nn.Module]) -> None:
    moved, peak = seen(make, job.config)
    predicted = traffic.engine(job)
    gathered = sum(call.nbytes for call in moved.calls if call.gathers)
    assert gathered == predicted.times * predicted.gathered * job.gathers
    own = [call.nbytes for call in moved.calls if not call.gathers]
    assert own == [predicted.scalars]
    tensors = memory.engine(job).tensors
    if job.sharding == "zero3":  # DeepSpeed's messages lie beside what they bring for a while
        assert 0.8 * peak < tensors < peak
        return
    assert tensors == pytest.approx(peak, rel=0.1), (job.sharding, tensors, peak)


@case(worlds=(2,))
def a_plan_is_what_ranks_gather_and_hold(world: World) -> None:
    for kind in ("llama", "opt"):
        job = job_of(kind, "fsdp2", world.size, 8)
        assert_as_predicted(job, lambda: world_fsdp2.shard(small(kind)))  # noqa: B023
    dense = TezoConfig(method="mezo", queries=2, rho=1e-2)
    job = job_of("llama", "fsdp2", world.size, 8, dense)
    assert traffic.engine(job).times == 4
    assert_as_predicted(job, lambda: world_fsdp2.shard(small()))
    job = job_of("llama", "zero3", world.size, 8)
    assert_as_predicted(job, lambda: zero3.wrap(small(), ZERO3))
    job = job_of("llama", "replicated", world.size, 8)
    assert_as_predicted(job, small)


@case(worlds=(4,))
def a_plan_of_replicas_is_what_ranks_gather_and_hold(world: World) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    job = job_of("llama", "fsdp2-hybrid", world.size, 2)
    assert_as_predicted(job, lambda: world_fsdp2.shard(small(), mesh))
