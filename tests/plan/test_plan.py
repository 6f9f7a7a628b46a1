"""`tezo-ds plan`: shapes, formulas, dry run and the command itself, without a world."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from command_line import call
from parts.families.models import make
from parts.scaling_model.counted import compared
from tiny import tiny
from world_plan import TIGHT, job_of, small

from tezo_ds.config import TezoConfig
from tezo_ds.engine import engine
from tezo_ds.errors import ConfigError
from tezo_ds.plan import memory, timing, traffic
from tezo_ds.plan.absent import Absent
from tezo_ds.plan.columns import advice, columns
from tezo_ds.plan.dry_run import count
from tezo_ds.plan.hardware import GPUS, Cluster, gpu
from tezo_ds.plan.job import Job
from tezo_ds.plan.prefetch import Limits, gathered
from tezo_ds.plan.shapes import BUILT_IN, numel, outline, skeleton
from tezo_ds.plan.trunk import trunk_of

GIB = 1 << 30


@pytest.mark.parametrize(
    ("name", "published", "within"),
    [
        ("opt-13b", 12_853_473_280, 0),
        ("opt-30b", 29.97e9, 0.001),
        ("opt-66b", 65.72e9, 0.001),
        ("opt-175b", 175e9, 0.01),
        ("llama-7b", 6_738_415_616, 0),
        ("llama-13b", 13_015_864_320, 0),
        ("llama-30b", 32_528_943_616, 0),
        ("llama-65b", 65_285_660_672, 0),
        ("llama3-8b", 8_030_261_248, 0),
        ("llama3-70b", 70_553_706_496, 0),
        ("qwen2.5-32b", 32_763_876_352, 0),
        ("qwen2.5-72b", 72_706_203_648, 0),
    ],
)
def test_built_in_shapes_have_as_many_weights_as_published(
    name: str, published: float, within: float
) -> None:
    module = skeleton(name, "auto")
    assert numel(module) == pytest.approx(published, rel=within, abs=0)
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
    assert {p.device.type for p in module.parameters()} == {"meta"}


def test_every_built_in_shape_is_tested() -> None:
    (mark,) = test_built_in_shapes_have_as_many_weights_as_published.pytestmark
    assert [row[0] for row in mark.args[1]] == list(BUILT_IN)


def test_an_outline_is_read_from_the_modules() -> None:
    of = outline(small("opt"))
    assert (of.hidden, of.inner, of.wide, of.layers) == (94, 381, 2, 3)
    of = outline(small("gpt2"))  # its matrices lie the other way round, its GELU is written out
    assert (of.hidden, of.inner, of.wide, of.layers) == (94, 381, 4, 3)
    llama = outline(tiny("llama"))  # 2 heads of 10, 1 of keys
    assert (llama.inner, llama.wide, llama.queries, llama.keys) == (37, 3, 20, 10)
    assert llama.multiplied == 2 * (22 * 20 * 2 + 22 * 10 * 2 + 3 * 22 * 37)
    for module in (torch.nn.Linear(3, 3), make("Mamba")):
        with pytest.raises(ConfigError, match="no blocks of attention and linear layers"):
            outline(module)


def test_a_token_meets_the_experts_that_it_is_sent_to() -> None:
    model = tiny("mixtral")  # two of three experts
    of, names = outline(model), dict(model.named_parameters())
    experts = sum(p.numel() for name, p in names.items() if "experts." in name)
    assert experts > of.read / 2 and of.multiplied == of.read - experts // 3
    assert trunk_of(model, [name for name in names if "layers.1." in name]).multiplied == (
        of.multiplied // 2
    )
    llama = outline(tiny("llama"))
    assert llama.read == llama.multiplied


@pytest.mark.parametrize("family", ["Mixtral", "Qwen 3 MoE", "gpt-oss"])
def test_experts_of_any_size_are_planned(family: str) -> None:
    with torch.device("meta"):
        model: Any = make(family).float()
    model.set_experts_implementation("grouped_mm")  # whose sizes are particular
    assert sum(gathered(model, 1, Limits()).messages) == 4 * numel(model)


def test_an_outline_leaves_a_tower_for_images_out() -> None:
    assert outline(make("Gemma 3 with a tower for images")) == outline(make("Gemma 3"))


@cache
def llama_30b() -> torch.nn.Module:
    """Makes the model of `llama`, whose forward is then followed once for all tests."""
    return skeleton("llama-30b", "auto")


def llama(world: int = 64, sharding: Any = "fsdp2", **fields: Any) -> Job:
    """Makes a job of LLaMA-30B on nodes of 8 H100s."""
    cluster = Cluster(GPUS["h100-80g"], world, 8)
    return Job(llama_30b(), TezoConfig(**fields), sharding, cluster, 4, 512, 1)


def test_traffic_by_hand() -> None:
    job = llama(queries=2)
    whole = 2 * numel(job.module)  # rows that 64 divides: 32000, 6656 and 17920
    ours = traffic.engine(job)
    assert (ours.times, ours.gathered, ours.received) == (1, whole, whole * 63 // 64)
    assert ours.between == ours.received and ours.inside == 7 * ours.received
    assert ours.scalars == (16 * 4 + 8,)
    hybrid = traffic.engine(replace(job, sharding="fsdp2-hybrid"))
    assert hybrid.between == 0 and hybrid.inside == 8 * (whole * 7 // 8)
    dense = TezoConfig(method="mezo", queries=2)
    assert traffic.engine(replace(job, config=dense)).received == 4 * ours.received
    assert traffic.adam(job).received == 3 * ours.received
    assert traffic.engine(replace(job, sharding="replicated")).received == 0
    own = TezoConfig(queries=2, placement="per_rank")
    losses = 64 * 16 * 4 + 8
    assert traffic.engine(replace(job, config=own)).scalars == (losses,)
    many = replace(job, config=own.model_copy(update={"queries": 8}))  # 63 * 8 others, D = 3,616
    assert traffic.engine(many).scalars == (64 * 16 * 16 + 8, 8 * many.run.space.numel)
    of_each = replace(job, config=TezoConfig(queries=2, placement="per_example"))
    examples = 64 * job.examples
    assert of_each.directions == 2 * examples
    counts, losses, *sums = traffic.engine(of_each).scalars
    assert (counts, losses) == (8 * 64, 16 * 4 * examples + 8)
    assert bool(sums) == (
        (of_each.directions - 2 * job.examples) * of_each.run.space.numel > 1 << 20
    )


def test_memory_by_hand() -> None:
    job = llama()
    found = memory.engine(job)
    assert found.shard == 2 * numel(job.module) // 64
    block = 2 * (4 * 6656**2 + 3 * 6656 * 17920 + 2 * 6656)
    outside = 2 * (2 * 32000 * 6656 + 6656)
    assert found.gathered == outside + 2 * block and found.stage == "block"
    assert found.activations == 2 * 4096 * (4 * 6656 + 3 * 17920)
    assert found.total == found.tensors + 2 * GIB
    adam = memory.adam(job)
    assert adam.shard + adam.state == 18 * numel(job.module) // 64
    # A batch that fits leaves no room for one more.
    most = memory.largest_batch(job, memory.engine)
    room = job.cluster.gpu.memory
    assert memory.engine(job.with_examples(most)).total <= room
    assert memory.engine(job.with_examples(most + 1)).total > room
    # A vocabulary that outweighs a block lies there twice at first.
    wide = replace(job, module=skeleton("llama3-70b", "auto"))
    assert memory.engine(wide).stage == "embedding"


def test_what_zero3_gathers_by_hand() -> None:
    with torch.device("meta"):
        llama, opt = small(), small("opt")

    def padded(weight: torch.Tensor) -> int:
        return 4 * 7 * -(-weight.numel() // 7)

    # Nothing ahead: a message a module, of which each has one weight, and no other weight beside it.
    alone = gathered(llama, 7, Limits(bucket=0))
    assert sorted(alone.messages) == sorted(padded(p) for p in llama.parameters())
    assert max(moment.most for moment in alone.moments) == max(alone.messages)
    # All in the first bucket, and copied out of its message when the first of it is used.
    (message,) = gathered(llama, 7, Limits()).messages
    assert message == sum(alone.messages)
    most = max(moment.most for moment in gathered(llama, 7, Limits()).moments)
    assert most == message + 4 * numel(llama)
    # Experts that are chosen by values: modules in the order in which they are registered.
    with torch.device("meta"):
        experts = tiny("mixtral")
    assert sum(gathered(experts, 1, Limits()).messages) == 4 * numel(experts)
    # OPT's output layer is its embedding, which comes again where that is far.
    once, far = gathered(opt, 7, Limits()), gathered(opt, 7, Limits(reuse=0, live=0))
    assert sum(far.messages) - sum(once.messages) == padded(opt.get_input_embeddings().weight)


def test_time_by_hand() -> None:
    job = llama()
    moved = traffic.engine(job)
    spent = timing.engine(job, moved, overlapped=True)
    alpha = timing.BASE + 7 * 14e-6 + 56 * 3.4e-6
    assert spent.gather == pytest.approx(moved.received / 50e9 + 61 * alpha)
    assert spent.compute == pytest.approx(timing.flops(job, 4096, fused=True) / (989e12 / 2))
    assert timing.flops(job, 4096, fused=False) == pytest.approx(2 * 4096 * 32.3e9, rel=0.05)
    assert spent.step < timing.engine(job, moved, overlapped=False).step
    hybrid = replace(job, sharding="fsdp2-hybrid")
    inside = timing.engine(hybrid, traffic.engine(hybrid), overlapped=True)
    assert inside.gather < spent.gather / 5
    assert timing.engine(llama(1), traffic.engine(llama(1)), overlapped=True).gather == 0


@pytest.mark.slow
def test_what_does_not_fit_comes_with_advice() -> None:
    job = llama(8)
    assert advice(job, columns(job)[0]) == []
    large = job.with_examples(10**5)
    (line,) = advice(large, columns(large)[0])
    assert "lower --batch to" in line and "--micro-batch 1" in line
    small_gpu = replace(job.cluster, gpu=replace(job.cluster.gpu, memory=8 * GIB))
    crowded = replace(job, cluster=small_gpu)
    (line,) = advice(crowded, columns(crowded)[0])
    assert "use --sharding fsdp2 on --world" in line
    alone = replace(job, sharding="replicated", cluster=replace(small_gpu, gpu=GPUS["a100-40g"]))
    (line,) = advice(alone, columns(alone)[0])
    assert "use --sharding fsdp2 on --world 8" in line
    tiny_gpu = replace(job.cluster, gpu=replace(job.cluster.gpu, memory=4 * GIB))
    hopeless = replace(job, cluster=tiny_gpu)
    (line,) = advice(hopeless, columns(hopeless)[0])
    assert "more ranks do not help" in line


@pytest.mark.parametrize(
    ("kind", "sharding", "fields", "limits"),
    [
        ("llama", "fsdp2", {"queries": 2}, Limits()),
        ("llama", "fsdp2-hybrid", {"method": "mezo"}, Limits()),
        ("llama", "fsdp2", {"probe": "inplace"}, Limits()),
        ("opt", "zero3", {"queries": 2}, Limits()),
        ("opt", "zero3", {"queries": 2}, TIGHT),
        ("llama", "zero3-hpz", {"method": "mezo"}, TIGHT),
        ("gpt2", "fsdp2", {"queries": 2}, Limits()),
    ],
)
@pytest.mark.slow
def test_a_dry_run_counts_what_is_predicted(
    kind: str, sharding: Any, fields: dict[str, Any], limits: Limits
) -> None:
    job = replace(job_of(kind, sharding, 15, 5, TezoConfig(rank=3, **fields)), limits=limits)
    lines = compared(job, count(job))
    assert all(fine for *_, fine in lines), lines
    assert not dist.is_initialized()


def test_a_dry_run_counts_sums_that_ranks_add_up() -> None:
    job = job_of("llama", "fsdp2", 15, 5, TezoConfig(rank=3, placement="per_rank"))
    with mock.patch.object(engine, "SHARED_FROM", 0):
        lines = compared(job, count(job))
        assert len(traffic.engine(job).scalars) == 2
    assert all(fine for *_, fine in lines), lines


def test_a_dry_run_of_examples_own_directions_is_refused_in_one_line() -> None:
    job = job_of("llama", "fsdp2", 15, 5, TezoConfig(rank=3, placement="per_example"))
    with pytest.raises(ConfigError, match="under placement per_example") as caught:
        count(job)
    assert "\n" not in str(caught.value)


def test_a_dry_run_of_experts_that_torch_cannot_follow_is_refused_in_one_line(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with torch.device("meta"):
        model: Any = make("Mixtral").float()
    model.set_experts_implementation("grouped_mm")
    with pytest.raises(
        ConfigError, match="multiplies experts without values in bfloat16"
    ) as caught:
        count(replace(job_of("llama", "fsdp2", 15, 5), module=model))
    assert "\n" not in str(caught.value) and not dist.is_initialized()
    assert "failed while attempting" not in caplog.text  # and a traceback


@pytest.mark.slow
def test_a_dry_run_sees_what_was_not_predicted() -> None:
    job = job_of("opt", "fsdp2", 5, 5)
    twice = Absent.forward

    def again(self: Absent, **inputs: Any) -> Any:
        twice(self, **inputs)
        return twice(self, **inputs)

    with mock.patch.object(Absent, "forward", again):
        fine = [line[-1] for line in compared(job, count(job))]
    assert fine[:3] == [False, False, True]
    less = replace(job, labels=job.length - 1)
    assert not compared(replace(job, examples=2), count(less))[3][-1]


def test_a_dry_run_needs_gathers() -> None:
    for sharding, world in (("zero3", 1), ("fsdp2", 1), ("replicated", 4)):
        with pytest.raises(ConfigError, match="has no gathers that it could count"):
            count(job_of("llama", sharding, world, 8))  # type: ignore[arg-type]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small().config.save_pretrained(tmp_path)
    flags = ["--model", str(tmp_path / "config.json"), "--world", "6", "--per-node", "3"]
    flags += ["--gpu", "a10g-24g", "--length", "41", "--dtype", "bfloat16"]
    assert call("plan", *flags) == 0
    printed = capsys.readouterr().out
    assert "tezo, fused, zero3" in printed and "Adam, ZeRO-3" in printed
    assert call("plan", *flags, "--memory", "2", "--flops", "1", "--hbm", "1", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [column["fits"] for column in found["columns"]] == [False] * 3
    assert found["examples_per_rank"] == 4 and len(found["warnings"]) == 1


@pytest.mark.slow
def test_the_command_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small().config.save_pretrained(tmp_path)
    flags = ["plan", "--model", str(tmp_path), "--world", "6", "--per-node", "3", "--length", "41"]
    flags += ["--sharding", "fsdp2", "--dry-run", "--rank", "3"]
    counted = count(
        replace(job_of("llama", "fsdp2", 6, 3, TezoConfig(rank=3)), examples=4, labels=1)
    )
    with mock.patch("tezo_ds.plan.dry_run.count", return_value=counted):
        assert call(*flags) == 0
    printed = capsys.readouterr().out
    for number in (counted.gathers, counted.gathered, counted.scalars, counted.tensors):
        assert f"{number:,}" in printed
    assert call(*flags, "--json") == 0
    assert json.loads(capsys.readouterr().out)["dry_run"] == asdict(counted)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--model", "gpt-5"], "none of opt-13b"),
        (["--gpu", "abacus"], "--gpu abacus is not known"),
        (["--sharding", "zero2"], "--sharding zero2: must be one of"),
        (["--world", "12"], "--per-node 8 does not divide --world 12"),
        (["--dtype", "int8"], "--dtype int8"),
        (["--labels", "512"], "must be below --length"),
        (["--method", "sgd"], "method"),
    ],
)
def test_what_cannot_be_planned_is_said_in_one_line(
    flags: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("plan", "--model", "opt-13b", *flags) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_gpus_by_name() -> None:
    assert gpu("a100-40g").memory == 40 * GIB


def test_a_solved_step_has_one_more_forward_of_its_scales() -> None:
    plain, solved = llama(queries=4), llama(queries=3, method="tezo-gn")  # and the last step's
    assert llama(queries=4, method="tezo-gn", recall=False).branches == solved.branches
    assert llama(queries=4, method="tezo-gn", refresh_every=1).branches == solved.branches
    assert solved.forwards == 2 and solved.full_forwards == 1 + 4 / 8
    assert solved.scalars == (*plain.scalars, 8 * (16 + 4 + 1), 16 * 4)
    one, two = traffic.engine(plain), traffic.engine(solved)
    assert two.collectives == 2 * one.collectives and two.total == 2 * one.total
    assert timing.step_flops(solved) == pytest.approx(1.5 * timing.step_flops(plain))
