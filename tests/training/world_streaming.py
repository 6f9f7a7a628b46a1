"""Runs of several ranks whose rows stay on disk, and whose padding is counted over all of them."""

from __future__ import annotations

from unittest import mock

import datasets
import torch
from world_fsdp_runs import train
from worlds import World, case


@case(worlds=(2,), bits=True)
def a_streamed_run_is_that_in_memory(world: World) -> None:
    plain = train(world, "in memory")
    with mock.patch.object(datasets.config, "HF_DATASETS_CACHE", world.folder / "cache"):
        streamed = train(world, "streamed", streaming=True)
    expected = plain.coefficients
    assert all(torch.equal(part, expected[name]) for name, part in streamed.coefficients.items())
    assert streamed.summary["padding_share"] == plain.summary["padding_share"]
    assert [line["loss"] for line in streamed.steps] == [line["loss"] for line in plain.steps]
