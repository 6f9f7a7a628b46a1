"""One run, whatever holds the weights: a table of all ways, each held against one process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import deepspeed
import torch
from once import once
from picking import WORDS, picking
from tiny import VOCABULARY, make_batch, part_of
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from world_fsdp2 import shard
from world_replicated import assert_equal_on_all_ranks
from world_zero3 import ZERO3, views_of
from worlds import World, case

import tezo_ds
from tezo_ds.directions.lowrank import FixedFactors
from tezo_ds.sharding.zero3_config import prepare

FIELDS = {"rank": 3, "rho": 1e-2, "lr": 3e-4, "queries": 2, "seed": 11}
STEPS = 3


class Block(nn.Module):
    """An MLP; 38 is even for the sake of tensor parallelism, nothing else divides by anything."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.up, self.down = nn.Linear(22, 22), nn.Linear(22, 38), nn.Linear(38, 22)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(self.mix(x).cumsum(dim=1))))


class Model(nn.Module):
    """A model with tied embeddings, and a 3 x 3 matrix of which the last of four ranks holds nothing."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.words = nn.Embedding(VOCABULARY, 22)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.gate = nn.Linear(3, 3)
        self.head = nn.Linear(22, VOCABULARY, bias=False)
        self.head.weight = self.words.weight

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = 0.5 * self.words(input_ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x * self.gate(x[..., :3]).sum(dim=-1, keepdim=True).tanh())


@dataclass(frozen=True)
class Way:
    """One way to hold the weights, on `ranks` ranks of which each `data` see other examples."""

    name: str
    ranks: tuple[int, ...]
    model: Callable[[World], tuple[nn.Module, dict]]
    share: int = 1  # ranks that see the same examples

    def engine(self, world: World, probe: str) -> tezo_ds.Engine:
        model, config = self.model(world)
        fields = {**FIELDS, "probe": probe}
        return tezo_ds.initialize(model, {**config, "tezo": fields} if config else fields)


def zero3(**more: object) -> Callable[[World], tuple[nn.Module, dict]]:
    optimization = {**ZERO3["zero_optimization"], **more}
    return lambda _: (Model(), {"zero_optimization": optimization})


def zero3_from_the_start(**more: object) -> Callable[[World], tuple[nn.Module, dict]]:
    """Makes models as from_pretrained does under ZeRO-3: each parameter is partitioned as soon as it is
    made."""

    def model(_: World) -> tuple[nn.Module, dict]:
        config = {**ZERO3, "zero_optimization": {**ZERO3["zero_optimization"], **more}}
        # zero.Init insists on making this group itself.
        deepspeed.utils.groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None
        with deepspeed.zero.Init(config_dict_or_path=prepare(config)):
            model = Model()
        return model, {"zero_optimization": config["zero_optimization"]}

    return model


def hybrid(_: World) -> tuple[nn.Module, dict]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    return shard(Model(), mesh), {}


def over_tensor_parallelism(_: World) -> tuple[nn.Module, dict]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "model"))
    model = Model()
    for block in model.blocks:
        plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
        parallelize_module(block, mesh["model"], plan)
    return shard(model, mesh["data"]), {}


WAYS = (
    Way("replicated", (1, 2, 3), lambda _: (Model(), {})),
    Way("ZeRO-3", (1, 2, 3, 4), zero3()),
    Way("ZeRO-3, hpZ", (4,), zero3(zero_hpz_partition_size=2)),
    Way("ZeRO-3, hpZ, zero.Init", (4,), zero3_from_the_start(zero_hpz_partition_size=2)),
    Way("ZeRO-3, CPU offload", (2, 3), zero3(offload_param={"device": "cpu"})),
    Way("FSDP2", (2, 3, 4), lambda _: (shard(Model()), {})),
    Way("FSDP2, hybrid", (4,), hybrid),
    Way("FSDP2 over tensor parallelism", (4,), over_tensor_parallelism, share=2),
)


@once
def reference(probe: str) -> tuple[list[tezo_ds.StepReport], dict, dict]:
    """Returns reports, coefficients and merged weights of one process that sees every example."""
    engine = tezo_ds.initialize(Model(), {**FIELDS, "probe": probe})
    reports = [engine.step(make_batch(7, seed=step)) for step in range(STEPS)]
    return reports, engine.coefficients(), engine.state_dict()


def assert_same_bits(engine: tezo_ds.Engine) -> None:
    """Asserts that U, V and τ are those of the public functions, whatever part of them a rank needs."""
    make = FixedFactors(engine.space)
    for view in views_of(engine):
        U, V = tezo_ds.factors(view.name, view.shape, FIELDS["rank"], FIELDS["seed"])
        mine, right = make.left_of(view), make.right_of(view)
        columns = (
            slice(None) if view.columns is None else slice(view.columns.start, view.columns.stop)
        )
        assert torch.equal(mine, U[view.rows.start : view.rows.stop])
        assert torch.equal(right, V[columns])
    tau = engine.space.taus(STEPS, range(FIELDS["queries"]))
    for direction in range(FIELDS["queries"]):
        for name, part in engine.space.split(tau[direction]).items():
            expected = tezo_ds.tau(name, FIELDS["rank"], FIELDS["seed"], STEPS, direction)
            assert torch.equal(part, expected)


def assert_close(ours: dict, theirs: dict) -> None:
    assert list(ours) == list(theirs)
    for name, expected in theirs.items():
        scale = expected.abs().max().item()
        torch.testing.assert_close(ours[name], expected, rtol=1e-3, atol=1e-4 * scale)


@case(worlds=(1, 2, 3, 4))
def the_run_is_the_same_everywhere(world: World) -> None:
    before = Model().state_dict()
    for way in (way for way in WAYS if world.size in way.ranks):
        for probe in ("fused", "inplace"):
            engine = way.engine(world, probe)
            assert engine.probe.name == probe
            data = world.size // way.share
            assert engine.sharding.world_size == data, way.name
            assert_same_bits(engine)
            reports, coefficients, merged = reference(probe)
            for step, theirs in enumerate(reports):
                batch = part_of(make_batch(7, seed=step), engine.sharding.rank, data)
                ours = engine.step(batch)
                torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-5, atol=0)
            assert_equal_on_all_ranks(engine.method.coefficients)
            assert_close(engine.coefficients(), coefficients)
            assert max(a.abs().max().item() for a in coefficients.values()) > 1e-3
            engine.merge()
            if state := engine.state_dict():
                assert_close(state, merged)
                moved = [
                    n for n in before if "bias" not in n and not torch.equal(state[n], before[n])
                ]
                assert len(moved) == len(before) - 7, way.name  # all but the biases


def picker(model: nn.Module, config: dict, metric: str) -> tezo_ds.Engine:
    fields = {**FIELDS, "rho": 0.3, "lr": 0.03}
    engine = tezo_ds.initialize(model, {**config, "tezo": fields} if config else fields)
    engine.objective.choices, engine.objective.metric = WORDS, metric
    return engine


def some_unlabelled(step: int) -> dict[str, torch.Tensor]:
    """Returns five examples of a step; in the last one the second rank's two have no label."""
    batch = picking(5, seed=step)
    if step == STEPS:
        batch["labels"][3:] = -100
    return batch


@once
def picks(metric: str) -> list[tuple[float, ...]]:
    """Returns κ of one process that sees every example."""
    engine = picker(Model(), {}, metric)
    return [engine.step(some_unlabelled(step)).kappa for step in range(STEPS + 1)]


@case(worlds=(2,))
def a_metric_is_that_of_all_ranks(world: World) -> None:
    for way in (way for way in WAYS if way.name in ("ZeRO-3", "FSDP2")):
        for metric in ("accuracy", "f1"):
            engine, expected = picker(*way.model(world), metric), picks(metric)
            for step, theirs in enumerate(expected):
                ours = engine.step(part_of(some_unlabelled(step), world.rank, world.size)).kappa
                torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
            assert_equal_on_all_ranks(engine.method.coefficients)
            assert len({kappa for step in expected for kappa in step}) > 3


@case(worlds=(4,))
def the_last_rank_may_hold_nothing(world: World) -> None:
    for way in WAYS:
        if way.name in ("ZeRO-3", "FSDP2"):
            # The first view of each: once a process has made an hpZ engine, DeepSpeed gives
            # every later one a secondary copy.
            mine = next(v for v in views_of(way.engine(world, "fused")) if v.name == "gate.weight")
            assert (mine.numel == 0) == (world.rank == 3), way.name
