"""The same steps under two shardings:

    torchrun --nproc-per-node 2 examples/two_shardings.py HuggingFaceTB/SmolLM2-135M fsdp2
    torchrun --nproc-per-node 2 examples/two_shardings.py HuggingFaceTB/SmolLM2-135M zero3

The directions are the same numbers under both, so losses agree up to the rounding of their sums.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

import tezo_ds

TEZO = {"rank": 8, "lr": 1e-6, "queries": 2}
ZERO3 = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}, "tezo": TEZO}


def sharded(model, how: str) -> tezo_ds.Engine:
    """Shards a model over all ranks; everything after this is the same."""
    if how == "zero3":
        return tezo_ds.initialize(model, ZERO3)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    return tezo_ds.initialize(model, TEZO)


def main(name: str, how: str, steps: int = 5) -> list[float]:
    if not dist.is_initialized():
        dist.init_process_group()
    rank, size = dist.get_rank(), dist.get_world_size()
    device = torch.device("cpu")
    if torch.accelerator.is_available():
        device = torch.device(torch.accelerator.current_accelerator().type, rank)
        torch.accelerator.set_device_index(rank)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).to(device).eval()
    engine, losses = sharded(model, how), []
    for step in range(steps):
        words = torch.Generator().manual_seed(step)
        ids = torch.randint(model.config.vocab_size, (4, 12), generator=words)
        own = ids.tensor_split(size)[rank].to(device)  # this rank's examples
        mask = torch.ones_like(own)
        report = engine.step({"input_ids": own, "labels": own, "attention_mask": mask})
        losses.append(report.loss)
        if rank == 0:
            print(f"{how}  step {step}  loss {report.loss:.6f}  κ {report.kappa[0]:+.3f}")
    engine.check()  # all ranks hold the same bits
    return losses


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
    dist.destroy_process_group()
