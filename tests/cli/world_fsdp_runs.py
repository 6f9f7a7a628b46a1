"""`tezo-ds train --fsdp` and what is done with its runs, by the real command line on two ranks."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from cli_fixtures import make_given
from command_line import BLOCK, Given, Run, assert_near, command, flags, not_drawn
from safetensors.torch import load_file
from tiny import tiny
from torch import Tensor
from world_hazards import refusal
from world_loading import saved
from worlds import World, case

import tezo_ds
from tezo_ds import cli
from tezo_ds.directions.draws import factors
from tezo_ds.models.fsdp import FsdpPlan
from tezo_ds.models.loading import load_model
from tezo_ds.run.folder import COEFFICIENTS, MODEL
from tezo_ds.settings import Settings
from tezo_ds.training import records
from tezo_ds.training.session import open_engine

MIXED = {"dtype": "float32", "compute_dtype": "bfloat16"}


def given_to(world: World) -> Given:
    """Makes the model and data of the command line's tests."""
    folder = world.folder / "given-to-fsdp"
    if world.rank == 0 and not folder.exists():
        folder.mkdir()
        make_given(folder)
    dist.barrier()
    return Given(folder / "model", folder / "films.jsonl")


def call(*arguments: object) -> str:
    """Runs `tezo-ds ARGUMENTS`, without a run's picture, and returns what this rank prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), mock.patch.object(records, "draw_curve", not_drawn):
        command(cli.app)([str(word) for word in arguments], standalone_mode=False)
    dist.barrier()
    return out.getvalue()


def train(world: World, name: str, *switches: str, **options: Any) -> Run:
    """Trains a short run that both ranks shard by FSDP2."""
    folder = world.folder / f"fsdp-{name}"
    call(*given_to(world).train(folder, steps=3, **options), "--fsdp", *switches)
    return Run(folder)


def evaluated(run: Path, world: World, *switches: str, **options: Any) -> dict[str, Any]:
    """Returns the result that `tezo-ds evaluate` prints on rank 0; {} on the other ranks."""
    out = call("evaluate", "--run", run, *switches, *flags(options))
    return dict(json.loads(out)) if world.rank == 0 else {}


@case(worlds=(2,), bits=True)
def hybrid_and_offloaded_runs_are_the_same(world: World) -> None:
    """Hybrid and offloaded runs equal a plain one to the bit by the fused probe, and up to rounding in
    place, as shards of other shapes are written."""
    for probe in ("fused", "inplace"):
        plain = train(world, f"plain {probe}", probe=probe)
        options = {"probe": probe, "fsdp_replicas": 2}
        other = train(world, f"hybrid {probe}", "--fsdp-offload-params", **options)
        assert other.config["settings"]["fsdp"] and other.config["settings"]["fsdp_replicas"] == 2
        assert other.config["world_size"] == 2 and other.summary["probe"] == probe
        assert all(bool(part.any()) for part in plain.coefficients.values())
        assert_near(other, plain)
        if probe == "fused":
            for name, part in plain.coefficients.items():
                assert torch.equal(other.coefficients[name], part)


@case(worlds=(2,), bits=True)
def runs_in_mixed_precision_are_evaluated_as_they_were_trained(world: World) -> None:
    run = train(world, "mixed", **MIXED)
    assert run.config["weights_dtype"] == "float32"
    assert run.config["factors_dtype"] == "bfloat16"
    after = run.summary["accuracy_after"], run.summary["test_loss_after"]
    for switches in ((), ("--no-fsdp",)):  # as the run did; whole in bfloat16, which FSDP2 gathered
        found = evaluated(run.path, world, *switches)
        if world.rank == 0:
            assert (found["accuracy"], found["loss"]) == after, switches
    exact = evaluated(run.path, world, "--no-fsdp", dtype="float32")
    if world.rank == 0:
        assert 0 < abs(exact["loss"] - after[1]) < 0.05


@case(worlds=(2,), bits=True)
def runs_that_write_weights_are_found_again(world: World) -> None:
    """A run is evaluated by the model in its folder, written in float32; without that, by a replay on
    float32 shards, which one process rounds to bfloat16 afterwards."""
    run = train(world, "written", **MIXED, method="mezo", lr=1e-3)
    after = run.summary["accuracy_after"], run.summary["test_loss_after"]
    assert abs(after[1] - run.summary["test_loss_before"]) > 1e-3
    assert not (run.path / COEFFICIENTS).exists()
    for there in (True, False):
        assert (run.path / MODEL).exists() == there
        for switches in ((), ("--no-fsdp",)):
            found = evaluated(run.path, world, *switches)
            if world.rank == 0:
                assert (found["accuracy"], found["loss"]) == after, (there, switches)
        if world.rank == 0 and there:
            shutil.rmtree(run.path / MODEL)
        dist.barrier()


@case(worlds=(2,))
def exports_add_the_factors_that_were_trained(world: World) -> None:
    """The factors of a run in mixed precision are rounded to bfloat16, its weights are not."""
    path = train(world, "merged", **MIXED, lr=0.01).path
    written: list[dict[str, Tensor]] = []
    for switch in ("--fsdp", "--no-fsdp"):
        folder = world.folder / f"exported{switch}"
        call("export", "--run", path, "--merged", folder, switch)
        files = [load_file(file) for file in folder.glob("*.safetensors")]
        written.append({name: tensor for file in files for name, tensor in file.items()})
    base = load_model(str(given_to(world).model)).state_dict()
    learnt = load_file(path / COEFFICIENTS)
    for name, a in learnt.items():
        U, V = factors(name, base[name].shape, BLOCK["rank"], BLOCK["seed"])
        exact = base[name] + (U * a.float()) @ V.t()
        rounded = base[name] + (U.bfloat16() * a.float()) @ V.bfloat16().float().t()
        assert (exact - rounded).abs().max() > 3e-5
        for tensors in written:
            torch.testing.assert_close(tensors[name], rounded, rtol=1e-5, atol=1e-6)


@case(worlds=(2,))
def evaluations_may_be_sharded_in_another_way(world: World) -> None:
    """The factors stay those of the run; bfloat16 in the forward alone costs some of the loss's digits."""
    run = train(world, "float32")
    loss = run.summary["test_loss_after"]
    for options, digits in (({}, 1e-6), ({"compute_dtype": "bfloat16"}, 0.02)):
        found = evaluated(run.path, world, "--fsdp", **options)
        if world.rank == 0:
            assert abs(found["loss"] - loss) < digits


@case(worlds=(2,))
def copies_from_different_files_are_refused(world: World) -> None:
    path = [saved(world, f"copy-{i}", tiny(seed=i).save_pretrained) for i in (0, 1)][world.rank]
    settings = Settings(model=str(path), task="-", fsdp=True, fsdp_replicas=2)
    config = tezo_ds.TezoConfig(rank=3)
    message = refusal(lambda: open_engine(settings, config, None), tezo_ds.ShardingError)
    assert "weights of model.embed_tokens.weight on rank 1 differ from those on rank 0" in message
    # Without the handling: nobody looks.
    model = load_model(str(path), fsdp=FsdpPlan(replicas=2))
    tezo_ds.initialize(model, {"rank": 3})
