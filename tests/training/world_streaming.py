"""Runs of several ranks whose rows stay on disk, and whose padding is counted over all of them."""

from __future__ import annotations

from unittest import mock

import datasets
import torch
import torch.distributed as dist
from cli_fixtures import with_ragged_films
from command_line import Run
from world_fsdp_runs import call, given_to
from worlds import World, case


@case(worlds=(2,), bits=True)
def a_streamed_run_is_that_in_memory(world: World) -> None:
    given, runs = given_to(world), {}
    if world.rank == 0:
        with_ragged_films(given, world.folder / "ragged.jsonl")
    dist.barrier()
    films = type(given)(given.model, world.folder / "ragged.jsonl")
    with mock.patch.object(datasets.config, "HF_DATASETS_CACHE", world.folder / "cache"):
        for name, streaming in (("in memory", False), ("streamed", True)):
            folder = world.folder / name
            call(*films.train(folder, steps=3, batch_size=5, streaming=streaming), "--fsdp")
            runs[name] = Run(folder)
    plain, streamed = runs["in memory"], runs["streamed"]
    expected = plain.coefficients
    assert all(torch.equal(part, expected[name]) for name, part in streamed.coefficients.items())
    assert [line["loss"] for line in streamed.steps] == [line["loss"] for line in plain.steps]
    assert streamed.summary["padding_share"] == plain.summary["padding_share"] > 0.05
