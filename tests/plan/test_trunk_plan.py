"""What a plan says of the layers before the first that trains: their size, their steps and their cache."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import call
from parts.scaling_model.counted import compared
from test_plan import llama_30b
from tiny import tiny
from world_plan import TIGHT, job_of, small

from tezo_ds.config import TezoConfig
from tezo_ds.plan import memory, timing, traffic, trunk_table
from tezo_ds.plan.columns import columns
from tezo_ds.plan.dry_run import count
from tezo_ds.plan.hardware import GPUS, Cluster
from tezo_ds.plan.job import Job
from tezo_ds.plan.prefetch import Limits
from tezo_ds.plan.shapes import numel
from tezo_ds.plan.trunk import Kept, trunk_of

GIB = 1 << 30
BLOCK = 4 * 6656**2 + 3 * 6656 * 17920  # weights of matrices in a layer of LLaMA-30B


def llama(world: int = 64, sharding: Any = "fsdp2", **fields: Any) -> Job:
    """Makes a job of LLaMA-30B on nodes of 8 H100s, of which the last 12 layers train."""
    cluster = Cluster(GPUS["h100-80g"], world, 8)
    config = TezoConfig(**{"include": ("last:12",), **fields})
    return Job(llama_30b(), config, sharding, cluster, 4, 512, 1)


@pytest.mark.parametrize(
    ("kind", "trained", "first"),
    [
        ("llama", ["model.layers.1.mlp.up_proj.weight"], 1),
        ("llama", ["model.layers.1.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"], 0),
        ("llama", ["model.norm.weight"], 2),
        ("llama", ["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"], 0),
        ("llama", [], 0),
        ("opt", ["model.decoder.layers.1.fc1.weight"], 1),
        ("opt", ["model.decoder.embed_positions.weight"], 0),
        ("gpt2", ["transformer.h.1.mlp.c_fc.weight"], 1),
        ("roberta", ["lm_head.dense.weight"], 2),
        ("roberta", ["roberta.encoder.layer.0.output.dense.weight"], 0),
    ],
)
def test_where_the_trunk_ends(kind: str, trained: list[str], first: int) -> None:
    model = tiny(kind)
    assert set(trained) <= {name for name, _ in model.named_parameters()}
    trunk = trunk_of(model, trained)
    assert (trunk.first, trunk.layers) == (first, 2)
    inside = [p for name, p in model.named_parameters() if ".0." in name or ".1." in name]
    assert len(trunk.weights) == first * len(inside) // 2
    assert trunk.multiplied == first * sum(p.numel() for p in inside if p.dim() > 1) // 2
    assert (model.get_input_embeddings() in trunk.modules) == (first > 0)


def test_an_output_layer_of_its_own_comes_last() -> None:
    assert trunk_of(tiny(tied=False), ["lm_head.weight"]).first == 2


def test_gathers_by_hand() -> None:
    job = llama(queries=2)
    block, outside = 2 * (BLOCK + 2 * 6656), 2 * (2 * 32000 * 6656 + 6656)
    shared, cached = traffic.engine(job), traffic.engine(replace(job, cached=True))
    assert (job.trunk.first, job.trunk.layers) == (48, 60)
    assert (shared.total, shared.collectives) == (2 * numel(job.module), 61)
    assert (cached.total, cached.collectives) == (12 * block + outside, 13)
    assert cached.received == cached.total * 63 // 64 == cached.between
    # Several forwards of a step need the trunk once for each part of the examples.
    parts = llama(queries=2, branch_chunk=1, micro_batch=2)
    moved = traffic.engine(parts)
    assert (parts.forwards, parts.trunk_forwards, moved.collectives) == (8, 2, 8 * 13 + 2 * 48)
    assert moved.total == 8 * (12 * block + outside) + 2 * 48 * block
    each = traffic.engine(parts.as_way(shared=False))
    assert (each.total, each.left_out) == (8 * 2 * numel(job.module), 0)
    # ZeRO-3 gathers weight by weight, so the embedding is not needed either.
    zero = llama(sharding="zero3")
    late = traffic.engine(replace(zero, cached=True))
    assert late.total == 12 * block + outside - 2 * 32000 * 6656
    assert 0 < late.collectives < traffic.engine(zero).collectives / 4
    for other in (llama(sharding="replicated"), llama(world=1)):
        assert traffic.engine(replace(other, cached=True)).received == 0


def test_scalars_by_hand() -> None:
    losses = 16 * 2 + 8
    assert llama().scalars == llama(include=("*",), trunk_cache="memory").scalars == (losses,)
    asking = llama(trunk_cache="memory")  # whether any rank has to run the trunk
    assert asking.scalars == replace(llama(), cached=True).scalars == (16, losses)
    assert llama(trunk_cache="disk", micro_batch=2).scalars == (16, 16, losses)
    assert asking.as_way(shared=False).scalars == (losses,)


def test_arithmetic_by_hand() -> None:
    job = llama(queries=2)
    layer = 2.0 * (BLOCK + 2 * 512 * 6656)  # of a token
    skinny = 2.0 * sum(m.rank * sum(m.shape) for m in job.run.space.matrices)
    head = 2.0 * 16 * 32000 * 6656  # 4 branches of 4 examples with one label each
    late = 4 * 2048 * (12 * layer + skinny) + head
    assert timing.step_flops(replace(job, cached=True)) == pytest.approx(late)
    assert timing.step_flops(job) == pytest.approx(late + 2048 * 48 * layer)
    plain = job.as_way(shared=False)
    assert timing.step_flops(plain) == pytest.approx(late + 4 * 2048 * 48 * layer)
    assert timing.step_flops(plain) == timing.flops(plain, plain.tokens, fused=True)
    parts = llama(queries=2, branch_chunk=1, micro_batch=2)
    assert timing.step_flops(parts) == pytest.approx(timing.step_flops(job))
    # ℓ + 2Q (L - ℓ) of 2Q L layers, but for the rest.
    _, shared, cached = trunk_table.ways(job, True)
    assert shared.flops == pytest.approx((48 + 4 * 12) / (4 * 60), abs=0.003)
    assert cached.flops == pytest.approx(12 / 60, abs=0.003)
    spent = timing.engine(job, traffic.engine(job), True)
    assert spent.compute == pytest.approx(timing.step_flops(job) / (989e12 / 2))


@pytest.mark.parametrize("sharding", ["fsdp2", "zero3"])
def test_ways_of_a_step(sharding: Any) -> None:
    job = llama(sharding=sharding)
    each, shared, cached = trunk_table.ways(job, True)
    assert [way.name for way in (each, shared, cached)] == ["each branch", "shared", "cached"]
    assert each.flops == 1 and each.traffic == shared.traffic
    assert cached.timing.step < shared.timing.step <= each.timing.step
    assert columns(job)[0].timing == shared.timing
    off = llama(sharding=sharding, shared_trunk=False)
    assert columns(off)[0].timing == each.timing and trunk_table.ways(off, True)[1] == shared
    mean = trunk_table.mean_step((each, shared, cached), 2)
    assert mean == pytest.approx((shared.timing.step + cached.timing.step) / 2)
    assert trunk_table.mean_step((each, shared, cached), 1) == shared.timing.step
    assert trunk_table.ways(llama(include=("*",)), True) == []


def test_more_examples_share_what_the_model_gives() -> None:
    job = llama()
    more = job.with_examples(64)
    assert more.trunk is job.trunk and more.trunk_forwards == 1
    assert memory.engine(more).total > memory.engine(job).total


def test_what_a_cache_takes() -> None:
    job = llama()
    found = trunk_table.kept(job, 1000, None)
    assert (found.each, found.examples) == (512 * 6656 * 2, 16)  # ⌈1000 / 64⌉
    assert (found.kept, found.nbytes) == (16, 16 * found.each)
    assert trunk_table.kept(job, 1000, 100.5).each == round(100.5 * 6656 * 2)
    bounded = trunk_table.kept(llama(trunk_cache_gib=0.05), 1000, None)
    assert (bounded.bound, bounded.kept) == (int(0.05 * GIB), 7)
    assert bounded.nbytes == 7 * bounded.each <= 0.05 * GIB
    assert (Kept(5, None, None).nbytes, Kept(5, None, 12).nbytes) == (None, 12)


def said(config: dict[str, Any], examples: int | None = None) -> str:
    job = llama(**config)
    kept = trunk_table.kept(job, examples, None)
    return "\n".join(trunk_table.lines(job, trunk_table.ways(job, True), kept))


def test_what_is_said() -> None:
    assert said({"include": ("*",)}) == ""
    assert "no trunk to keep" in said({"include": ("*",), "trunk_cache": "disk"})
    plain = said({})
    assert "layers 0 to 47 of 60 come before" in plain and "trunk_cache off" not in plain
    text = said({"trunk_cache": "memory"})
    assert "takes 6.5 MiB of host memory" in text and "name --train-examples" in text
    text = said({"trunk_cache": "disk"}, 64 * 100)
    assert "the run's folder" in text and "100 of a rank's 100 examples take 0.635 GiB" in text
    text = said({"trunk_cache": "disk", "trunk_cache_gib": 0.05}, 64 * 100)
    assert "7 of a rank's 100 examples" in text and "computed at each visit" in text
    assert "at most 0.05 GiB" in said({"trunk_cache": "memory", "trunk_cache_gib": 0.05})


@pytest.mark.parametrize(
    ("kind", "sharding", "limits"),
    [("llama", "fsdp2", Limits()), ("opt", "zero3", TIGHT)],
)
def test_a_dry_run_runs_all_layers_in_each_branch(kind: str, sharding: Any, limits: Limits) -> None:
    config = TezoConfig(rank=3, queries=2, include=("last:1",), trunk_cache="memory")
    job = replace(job_of(kind, sharding, 15, 5, config), limits=limits)
    assert job.trunk.first == 2
    lines = compared(job, count(job))
    assert all(fine for *_, fine in lines), lines


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with torch.device("meta"):
        small().config.save_pretrained(tmp_path)
    flags = ["plan", "--model", str(tmp_path), "--world", "6", "--per-node", "3", "--length", "40"]
    flags += ["--sharding", "fsdp2", "--rank", "3"]
    assert call(*flags) == 0
    assert "of a rank and a step: the trunk" not in capsys.readouterr().out
    flags += ["--include", "last:2"]
    assert call(*flags) == 0
    assert "layers 0 to 0 of 3 come before the first that trains" in capsys.readouterr().out
    flags += ["--trunk-cache", "disk", "--train-examples", "600", "--mean-tokens", "10"]
    assert call(*flags, "--trunk-cache-gib", "0.0001", "--json") == 0
    found = json.loads(capsys.readouterr().out)["trunk"]
    assert (found["first"], found["layers"]) == (1, 3)
    each = 10 * 94 * 4
    assert found["cache"] == {"example": each, "kept": 28, "bytes": 28 * each}
    each_branch, shared, cached = found["ways"]
    assert each_branch["gathered"] == shared["gathered"] > cached["gathered"]
    assert call(*flags, "--include", "last:4") == 2
    assert "include: 'last:4': the model has 3 layers" in capsys.readouterr().err
