"""Layer-wise ranks on every sharding: the same everywhere, though no rank holds a whole matrix."""

from __future__ import annotations

from unittest import mock

import torch
import torch.distributed as dist
import world_everywhere
from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum
from file_aio import toy_nvme
from torch import nn
from world_everywhere import WAYS
from world_hazards import refusal
from world_offload import nvme
from world_zero3 import ZERO3
from worlds import World, case

import tezo_ds
from tezo_ds.auto import rank as auto_rank
from tezo_ds.auto.rank import auto_ranks
from tezo_ds.directions.space import Matrix
from tezo_ds.engine.live_bytes import LiveBytes
from tezo_ds.patterns import numbered_module
from tezo_ds.sharding import Sharding, ShardView, sharding_of
from tezo_ds.sharding.view import matrix_shape

THRESHOLD, CAP, SEED = 0.25, 9, 5


class Spread(world_everywhere.Model):
    """A model whose singular values fall by another factor in each matrix."""

    def __init__(self) -> None:
        super().__init__()
        for i, weight in enumerate(p for p in self.parameters() if p.dim() > 1):
            U, values, V = torch.linalg.svd(weight.detach(), full_matrices=False)
            falling = (0.95 - 0.05 * i) ** torch.arange(len(values))
            weight.data = (U * falling) @ V


def matrices_of(sharding: Sharding) -> list[Matrix]:
    shapes = {name: sharding.shape(p) for name, p in sharding.module.named_parameters()}
    return [Matrix(name, matrix_shape(s), 1) for name, s in shapes.items() if len(s) > 1]


def of(sharding: Sharding) -> dict[str, int]:
    with mock.patch.object(
        auto_rank, "OVERSAMPLING", 4
    ):  # else all of these small matrices are exact
        return auto_ranks(sharding, matrices_of(sharding), THRESHOLD, CAP, SEED)


def expected() -> dict[str, int]:
    """Counts the ranks by LAPACK, from whole matrices."""
    least: dict[str, int] = {}
    weights = {name: p.detach() for name, p in Spread().named_parameters() if p.dim() > 1}
    for name, weight in weights.items():
        values = torch.linalg.svdvals(weight) / torch.linalg.matrix_norm(weight, 2)
        assert ((values / THRESHOLD - 1).abs() > 0.01).all()
        block = numbered_module(name) or name
        least[block] = min(least.get(block, CAP), int((values >= THRESHOLD).sum()))
    assert len(set(least.values())) == len(least) > 3 and CAP in least.values(), least
    return {name: least[numbered_module(name) or name] for name in weights}


def zero3(model: nn.Module) -> Sharding:
    return sharding_of(model, ZERO3)


def held(sharding: Sharding, matrix: Matrix) -> torch.Tensor:
    """Counts how often each element of a matrix is held, over all ranks."""
    times = torch.zeros(matrix.shape)

    def add(view: ShardView) -> None:
        for piece in view.pieces(10):
            rows, columns = piece.rows, piece.columns
            times[rows.start : rows.stop, columns.start : columns.stop] += 1

    sharding.each_shard({matrix.name}, add)
    return sharding.total(times)


@case(worlds=(1, 2, 3, 4))
def ranks_are_the_same_everywhere(world: World) -> None:
    with mock.patch.object(world_everywhere, "Model", Spread):
        # Under zero.Init a weight is partitioned before Spread writes it, so what it writes is lost.
        for way in (w for w in WAYS if world.size in w.ranks and "zero.Init" not in w.name):
            sharding = sharding_of(*way.model(world))
            assert of(sharding) == expected(), way.name
            for matrix in matrices_of(sharding):
                times = held(sharding, matrix)
                assert times.min() == times.max() >= 1, (way.name, matrix.name)
            if way.name in ("FSDP2, hybrid", "ZeRO-3, hpZ"):
                assert times.max() > 1


@case(worlds=(2, 3))
def products_need_the_parts_of_all_ranks(world: World) -> None:
    sharding = zero3(Spread())
    assert of(sharding) == expected()
    with mock.patch.object(Sharding, "total", lambda self, tensor: tensor):
        assert of(sharding) != expected()


@case(worlds=(3, 4))
def padding_counts_for_nothing(world: World) -> None:
    sharding = zero3(Spread())
    padded = torch.zeros(1)
    for parameter in sharding.module.parameters():
        start = parameter.ds_zero_partition_rank * parameter.ds_tensor.numel()
        pad = parameter.ds_tensor.data[max(0, parameter.ds_numel - start) :]
        pad.fill_(float("nan"))
        padded += pad.numel()
    assert sharding.total(padded) > 0
    assert of(sharding) == expected()


@case(worlds=(2,))
def shards_in_files_are_read_and_not_written(world: World) -> None:
    with toy_nvme() as files:
        zero = {**ZERO3["zero_optimization"], **nvme(world)}
        sharding = sharding_of(Spread(), {"zero_optimization": zero})
        parameters = list(sharding.module.parameters())
        assert any(p.ds_tensor.final_location == OffloadDeviceEnum.nvme for p in parameters)
        written = files.written
        assert of(sharding) == expected()
        assert files.written == written


@case(worlds=(2, 3))
def what_is_not_finite_on_one_rank_stops_all(world: World) -> None:
    model = Spread()
    model.blocks[1].up.weight.data[-1, -1] = float("inf")
    message = refusal(lambda: of(zero3(model)), tezo_ds.ConfigError)
    assert message.startswith("blocks.1.up.weight has weights that are not finite")


@case(worlds=(2,))
def processors_that_round_otherwise_do_the_same(world: World) -> None:
    """A rank that would go on, or that counts fewer singular values, follows what all ranks decide
    together."""
    judge, calls = auto_rank.judge, []

    def otherwise(*args: object) -> tuple[int, bool]:
        calls.append(args)
        found, settled = judge(*args)
        return found - 1, settled and len(calls) > 20

    sharding = zero3(Spread())
    if world.rank == 1:
        with mock.patch.object(auto_rank, "judge", otherwise):
            assert of(sharding) == expected()
        assert len(calls) > 20
    else:
        assert of(sharding) == expected()
    dist.barrier()


@case(worlds=(3,))
def no_rank_holds_a_matrix(world: World) -> None:
    torch.manual_seed(0)
    sharding = zero3(nn.Linear(600, 2000, bias=False))
    with LiveBytes() as live:
        auto_ranks(sharding, matrices_of(sharding), THRESHOLD, 2, SEED)
    whole = 600 * 2000 * 4
    assert live.peak < whole / 3
