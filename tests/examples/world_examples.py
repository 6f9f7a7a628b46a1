"""examples/two_shardings.py on two ranks: both of its ways measure the same losses."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch.distributed as dist
from tiny_tokenizer import save_tiny_llama
from worlds import World, case

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@case(worlds=(2,))
def two_shardings(world: World) -> None:
    model = world.folder / "example"
    if world.rank == 0:
        save_tiny_llama(model, ["any text"], intermediate_size=38)
    dist.barrier()
    main = runpy.run_path(str(EXAMPLES / "two_shardings.py"))["main"]
    fsdp2, zero3 = (main(str(model), way, 3) for way in ("fsdp2", "zero3"))
    assert len(set(fsdp2)) == 3 and zero3 == pytest.approx(fsdp2, rel=1e-6)
