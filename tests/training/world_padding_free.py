"""Rows without padding, of other lengths on each rank, and of none on some."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from task_files import TEMPLATE, WORDS, write
from tiny_tokenizer import save_tiny_llama
from world_zero3 import ZERO3
from worlds import World, case

from tezo_ds.config import TezoConfig
from tezo_ds.settings import Settings
from tezo_ds.training.session import open_session
from tezo_ds.training.step_batches import StepBatches

LENGTHS = (1, 7, 2, 12, 5, 3, 9, 4, 6, 8)


def saved(world: World) -> tuple[str, str]:
    """Writes, on rank 0, a model and reviews of many lengths."""
    folder, data = Path(world.folder, "flat"), Path(world.folder, "flat.jsonl")
    if world.rank == 0:
        save_tiny_llama(folder, ["film very great It was terrible"])
        rows = [{"text": "film" + " very" * n, "label": ("neg", "pos")[n % 2]} for n in LENGTHS]
        write(data, rows)
    dist.barrier()
    return str(folder), str(data)


@case(worlds=(2, 3))
def losses_are_those_of_padded_rows(world: World) -> None:
    model, data = saved(world)
    block = TezoConfig(rank=2, rho=1e-2, lr=1e-3, queries=2)

    def losses(flat: bool, size: int, fsdp: bool = False, sharded: bool = False) -> list[float]:
        settings = Settings(
            model=model, task=data, template=TEMPLATE, verbalizers=WORDS, test_fraction=0.1,
            padding_free=flat, fsdp=fsdp, attn_implementation="sdpa" if flat else None,
        )  # fmt: skip
        session = open_session(settings, block, dict(ZERO3) if sharded else None, batch_size=size)
        batches = StepBatches(session, session.encoded(), size)
        found = [session.engine.step(batches(step)).loss for step in range(3)]
        padding, computed = batches.tokens(0)
        assert 0 <= padding < computed and (padding == 0 or not flat or size < world.size)
        rows = batches(0)["input_ids"]
        assert len(rows) == 1 or not flat
        widths = [torch.zeros(1) for _ in range(world.size)]
        dist.all_gather(widths, torch.tensor([float(rows.shape[1])]))
        assert len(set(map(float, widths))) > 1  # each rank's own length
        return found

    expected = losses(False, 7)
    for ways in ({}, {"sharded": True}, {"fsdp": True}):
        assert losses(True, 7, **ways) == pytest.approx(expected, abs=1e-5)
    # All ranks but one have nothing to do.
    assert losses(True, 1, sharded=True) == pytest.approx(losses(False, 1), abs=1e-5)
