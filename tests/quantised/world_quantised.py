"""Packed weights over several ranks: a copy on each, and FSDP2 of weights of 4 bits."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch
import torch.distributed as dist
from tiny import make_batch, part_of
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM
from world_hazards import refusal
from worlds import World, case

import tezo_ds
from tezo_ds.models.fsdp import FsdpPlan
from tezo_ds.models.loading import load_model

CONFIG = {"rank": 3, "rho": 1e-2, "lr": 1e-2, "queries": 2, "check_every": 1}


def saved(world: World) -> Path:
    """Saves a tiny model of sizes that formats need."""
    folder = world.folder / "for-packing"
    if world.rank == 0 and not folder.exists():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=61, hidden_size=64, intermediate_size=192, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, initializer_range=0.1,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(folder)
    dist.barrier()
    return folder


def learnt(engine: tezo_ds.Engine, world: World) -> tuple[list[tuple[float, ...]], torch.Tensor]:
    """Takes three steps, as gathers may go wrong from the second or third on."""
    kappas = []
    for step in range(3):
        batch = make_batch(5, seed=step)
        kappas.append(engine.step(part_of(batch, world.rank, world.size)).kappa)
    return kappas, engine.method.coefficients.clone()


def assert_as_one_process(world: World, engine: tezo_ds.Engine, load_in: str) -> None:
    from tezo_ds.intake.checked_engine import checked_engine
    from tezo_ds.sharding.replicated import alone

    kappas, found = learnt(engine, world)
    whole = load_model(str(saved(world)), "float32", load_in=load_in).eval()
    single = checked_engine(alone(whole), engine.config)
    wanted = [single.step(make_batch(5, seed=step)).kappa for step in range(3)]
    torch.testing.assert_close(torch.tensor(kappas), torch.tensor(wanted), rtol=1e-3, atol=2e-3)
    assert (found - single.method.coefficients).abs().max() < 1e-3 * found.abs().max()


@case(worlds=(3,))
def copies_of_packed_weights(world: World) -> None:
    if find_spec("torchao") is None:
        return
    model = load_model(str(saved(world)), "float32", load_in="int8")
    engine = tezo_ds.initialize(model, CONFIG)
    assert_as_one_process(world, engine, "int8")
    if world.rank == 1:  # a scale that differs
        packed = next(iter(engine.sharding.packed.values()))
        packed.module.weight.scale.mul_(1.5)
    broken = lambda: tezo_ds.initialize(model, CONFIG)  # noqa: E731
    assert "rank 1 differ" in refusal(broken, tezo_ds.ShardingError)


@case(worlds=(3,))
def fours_under_fsdp2(world: World) -> None:
    if find_spec("bitsandbytes") is None:
        return
    path = saved(world)
    model = load_model(str(path), "float32", fsdp=FsdpPlan(), load_in="4bit")
    engine = tezo_ds.initialize(model, CONFIG)
    sharding = engine.sharding
    packed = sharding.packed["model.layers.0.mlp.down_proj.weight"]
    held = packed.module.weight
    assert isinstance(held, DTensor) and held.to_local().numel() < held.numel()
    shapes = {matrix.name: matrix.shape for matrix in engine.space.matrices}
    assert shapes["model.layers.0.mlp.down_proj.weight"] == (64, 192)
    assert_as_one_process(world, engine, "4bit")
    assert "mezo writes weights" in refusal(
        lambda: tezo_ds.initialize(model, {"method": "mezo"}), tezo_ds.ShardingError
    )
    refused = {
        "packed and sharded here": lambda: tezo_ds.initialize(model, {"rank": "auto"}),
        "merged weights: weights are": lambda: engine.state_dict(),
    }
    for why, call in refused.items():
        assert why in refusal(call, tezo_ds.ShardingError)
    plan = FsdpPlan(compute_dtype=torch.bfloat16)
    for why, call in {
        "--compute-dtype would cast": lambda: load_model(str(path), fsdp=plan, load_in="4bit"),
        "which --fsdp does not shard": lambda: load_model(
            str(path), fsdp=FsdpPlan(), load_in="int8"
        ),
    }.items():
        assert why in refusal(call, tezo_ds.ConfigError)
