"""Encoder-decoder models and classifiers by the command line on two ranks: loaded shard by shard, trained,
evaluated with generated answers, and exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from command_line import Given, Run, assert_near
from kinds import ENCODER_DECODERS, NO_TABLE, save_kind
from test_model_kinds import LLAMA, TEXTS
from world_fsdp_runs import call, given_to
from worlds import World, case

from tezo_ds.export.merged import is_complete
from tezo_ds.models import loading

ZERO3 = {
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "tezo": {"rank": 2},
}


def kind_given(world: World, name: str) -> Given:
    """Makes a model of a kind, and the data of the command line's tests."""
    folder, data = world.folder / f"kind-{name}", given_to(world).data
    if world.rank == 0 and not folder.exists():
        save_kind(folder, name, TEXTS, **({} if name in ENCODER_DECODERS else {"num_labels": 3}))
        (world.folder / "zero3.json").write_text(json.dumps(ZERO3))
    dist.barrier()
    return Given(folder, data)


@case(worlds=(2,))
def sharded_runs_are_those_of_whole_weights(world: World) -> None:
    ways: dict[str, tuple[Any, ...]] = {
        "whole": (), "fsdp": ("--fsdp",), "zero3": ("--deepspeed", world.folder / "zero3.json"),
    }  # fmt: skip
    # All of them before transformers partitions what is made.
    models = {name: kind_given(world, name) for name in (ENCODER_DECODERS[0], LLAMA)}
    for name, given in models.items():
        runs: dict[str, Run] = {}
        options: dict[str, Any] = {"rank": 2, "steps": 3}
        if name in ENCODER_DECODERS:
            options |= {"metric": "f1", "max_new_tokens": 3, "test_examples": 5}
            options["exclude"] = NO_TABLE
        for way, switches in ways.items():
            run = runs[way] = Run(world.folder / f"{name}-{way}")
            call(*given.train(run.path, **options), *switches)
            assert run.summary["status"] == "finished" and "adapter" not in run.summary
            assert_near(run, runs["whole"])
            after = run.summary["accuracy_after"], run.summary["test_loss_after"]
            expected = runs["whole"].summary
            assert after[0] == expected["accuracy_after"], way
            assert after[1] == pytest.approx(expected["test_loss_after"], rel=1e-4), way
            assert run.summary.get("metric_after") == expected.get("metric_after")
            found = call("evaluate", "--run", run.path)
            if world.rank == 0:
                assert json.loads(found)["loss"] == pytest.approx(after[1], rel=1e-5)
            if switches:
                _exported(world, run, name, way)
            loading._zero_configs.clear()  # by which transformers would partition the models of later cases


def _exported(world: World, run: Run, name: str, way: str) -> None:
    folder: Path = world.folder / f"{name}-{way}-merged"
    call("export", "--run", run.path, "--merged", folder)
    written = json.loads((folder / "config.json").read_text())
    assert written["architectures"] == [name] and is_complete(folder)
