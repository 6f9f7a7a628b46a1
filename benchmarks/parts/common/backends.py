"""Backends that a benchmark runs a model on, and the ranks they take, all on this machine."""

from __future__ import annotations

import argparse
import logging
import os
import socket
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from tezo_ds.sharding.world import join_world

SPLIT = {
    "mlp.gate_proj": ColwiseParallel(), "mlp.up_proj": ColwiseParallel(),
    "mlp.down_proj": RowwiseParallel(),
}  # fmt: skip
BACKENDS = ("none", "zero3", "zero3-hpz", "fsdp2", "tensor")


def spawn(ranks: int, backend: str, run: Callable[..., None], *args: Any) -> None:
    """Calls run(rank, *args) in `ranks` new processes, which share the processor's cores."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    threads = max(1, torch.get_num_threads() // ranks)
    mp.start_processes(_rank, (ranks, port, threads, backend, run, args), ranks)


def _rank(
    rank: int,
    ranks: int,
    port: int,
    threads: int,
    backend: str,
    run: Callable[..., None],
    args: Any,
) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    torch.set_num_threads(threads)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.simplefilter("ignore", FutureWarning)  # DeepSpeed calls torch by older names
    join_world(deepspeed=backend.startswith("zero3"), fsdp=False, timeout=1800)
    run(rank, *args)
    dist.destroy_process_group()


def place(model: nn.Module, backend: str) -> nn.Module:
    """Returns the model as `tezo_ds.initialize` takes it on a backend.

    Args:
        model: a model, equal on all ranks.
        backend: "zero3-hpz" makes two groups of ranks, each with a whole copy of the model; "tensor" splits
            the feed-forward parts of a Llama over all ranks, which then share a batch, under FSDP2.
    """
    if backend == "tensor":
        mesh = init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("data", "model"))
        for block in _blocks(model):
            parallelize_module(block, mesh["model"], SPLIT)
        fully_shard(model, mesh=mesh["data"])
    if backend == "fsdp2":
        for block in _blocks(model):
            fully_shard(block)
        fully_shard(model)
    if not backend.startswith("zero3"):
        return model
    from tezo_ds.sharding import zero3  # DeepSpeed takes seconds to import

    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    if backend == "zero3-hpz":
        zero["zero_hpz_partition_size"] = dist.get_world_size() // 2
    dtype = next(model.parameters()).dtype
    config = {
        "zero_optimization": zero,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": dtype == torch.float16},
    }
    return zero3.wrap(model, config)


def batch_of(backend: str, rank: int) -> int:
    """Returns which batch a rank takes: its own, or where ranks split the layers that of all."""
    return 0 if backend == "tensor" else rank


def _blocks(model: nn.Module) -> nn.ModuleList:
    return next(module for module in model.modules() if isinstance(module, nn.ModuleList))


def settle() -> None:
    """Waits for the device and for the other ranks."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    if dist.is_initialized():
        dist.barrier()


def on_ranks(
    parser: argparse.ArgumentParser, args: argparse.Namespace, run: Callable[..., None]
) -> None:
    """Runs `run(rank, args)` in this process, or in as many as --sharding and --ranks say."""
    if args.sharding == "none":
        run(0, args)
    elif args.ranks < (fewest := 4 if args.sharding == "zero3-hpz" else 2):
        parser.error(f"--sharding {args.sharding} takes at least {fewest} --ranks")
    else:
        spawn(args.ranks, args.sharding, run, args)
