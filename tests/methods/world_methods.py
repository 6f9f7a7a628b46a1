"""Every method against its oracle, on ZeRO-3, FSDP2 and replicas, by both probes, on ragged shards."""

from __future__ import annotations

import torch
import world_fsdp2
import world_zero3
from once import once
from tiny import make_batch, part_of, tiny
from torch import nn
from world_everywhere import WAYS, Model
from world_replicated import alone, assert_equal_on_all_ranks
from worlds import World, case

import tezo_ds
from tezo_ds.methods import reference

STEPS = 7  # two periods, and a beginning of a third
FIELDS = {"rank": 3, "rho": 1e-2, "lr": 3e-4, "queries": 2, "seed": 11, "train_vectors": True}
SMALL = {"lr": 1e-4}
METHODS: dict[str, dict] = {
    "tezo": {"refresh_every": 3}, "tezo-m": {}, "tezo-adam": SMALL, "tezo-adam-coef": SMALL,
    "lozo": {"nu": 3}, "lozo-m": {"nu": 3}, "mezo": SMALL, "mezo-m": SMALL, "mezo-adam": SMALL,
}  # fmt: skip


def batch_of(step: int) -> dict[str, torch.Tensor]:
    return make_batch(7, seed=step)


@once
def oracle(method: str, vectors: bool) -> reference.Record:
    """Returns the last record of the oracle, of a float32 model."""
    model = Model()

    def loss(step: int, weights: dict[str, torch.Tensor]) -> float:
        narrow = {name: tensor.float() for name, tensor in weights.items()}
        batch = batch_of(step)
        logits = torch.func.functional_call(model, narrow, (batch["input_ids"],), tie_weights=True)
        return nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100
        ).item()

    fields = {**FIELDS, **METHODS[method]}
    weights = {k: p for k, p in model.named_parameters() if vectors or p.dim() > 1}
    options = {k: v for k, v in fields.items() if k in reference.Fields.__dataclass_fields__}
    with torch.no_grad():
        *_, last = reference.run(
            method, weights, loss, STEPS, fields["lr"], fields["rho"], **options
        )
    return last


def assert_the_oracle(
    world: World, method: str, way_name: str, probe: str, vectors: bool = True
) -> None:
    way = next(way for way in WAYS if way.name == way_name)
    model, config = way.model(world)
    fields = {
        **FIELDS,
        **METHODS[method],
        "method": method,
        "probe": probe,
        "train_vectors": vectors,
    }
    engine = tezo_ds.initialize(model, {**config, "tezo": fields} if config else fields)
    data = world.size // way.share
    for step in range(STEPS):
        engine.step(part_of(batch_of(step), engine.sharding.rank, data))
    engine.check()
    for packed in engine.method.state.values():
        assert_equal_on_all_ranks(packed.data)
    if merged := engine.state_dict():
        before = Model().state_dict()
        for name, expected in oracle(method, vectors).weights.items():
            change = expected - before[name]
            scale = change.abs().max().item()
            assert scale > 1e-4, (method, name)
            off = (merged[name].double() - before[name] - change).abs().max().item()
            assert off < 0.02 * scale, f"{method}, {way_name}, {probe}, {name}: off by {off}"


def every_method(world: World, way: str) -> None:
    for method in METHODS:
        assert_the_oracle(world, method, way, "inplace" if method.startswith("mezo") else "fused")
    for method in ("tezo-adam", "lozo-m"):  # those that also write
        assert_the_oracle(world, method, way, "inplace")


@case(worlds=(2,))
def zero3_is_the_oracle(world: World) -> None:
    every_method(world, "ZeRO-3")


@case(worlds=(2,))
def fsdp2_is_the_oracle(world: World) -> None:
    every_method(world, "FSDP2")


@case(worlds=(4,))
def secondary_copies_hybrids_and_split_columns_are_the_oracle(world: World) -> None:
    for way in ("ZeRO-3, hpZ", "FSDP2, hybrid", "FSDP2 over tensor parallelism"):
        for method in ("tezo-adam", "mezo-adam"):
            assert_the_oracle(world, method, way, "inplace")


@case(worlds=(4,))
def a_fused_write_meets_split_columns(world: World) -> None:
    """Fused writes meet split columns without vectors, as the vectors of split layers are for the in-place
    probe."""
    for method in ("tezo-adam", "lozo-m"):
        assert_the_oracle(world, method, "FSDP2 over tensor parallelism", "fused", vectors=False)


@case(worlds=(2,))
def other_weights_than_a_linears_train_as_on_one_process(world: World) -> None:
    """GPT-2's Conv1D trains by the fused probe; experts in one weight of three dims, in place."""
    for kind, method in (
        ("gpt2", "tezo-m"), ("gpt2", "lozo"), ("mixtral", "tezo-adam"), ("qwen-moe", "mezo")
    ):  # fmt: skip
        probe = "fused" if kind == "gpt2" else "inplace"
        fields = {**FIELDS, "method": method, "lr": 1e-4, "nu": 2, "probe": probe}
        made = world_zero3.sharded if method in ("tezo-m", "mezo") else world_fsdp2.sharded
        engine, one = made(kind, False, fields), alone(kind, False, fields)
        for step in range(4):
            batch = make_batch(7, seed=step)
            ours = engine.step(part_of(batch, world.rank, world.size))
            theirs = one.step(batch)
            torch.testing.assert_close(ours.kappa, theirs.kappa, rtol=1e-2, atol=1e-2)
        before, expected, merged = (
            tiny(kind, False).state_dict(),
            one.state_dict(),
            engine.state_dict(),
        )
        for name in merged:
            change = expected[name] - before[name]
            off = (merged[name] - before[name] - change).abs().max().item()
            assert off <= 0.03 * change.abs().max().item(), f"{kind} {method} {name}: off by {off}"
            assert change.any() == (name in engine.space.slices), name
