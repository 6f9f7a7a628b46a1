"""Plans of runs that train adapters: their sizes, the memory and the products that they add."""

from __future__ import annotations

import json

import pytest
from command_line import call
from world_plan import job_of

from tezo_ds.adapters.found import AHEAD
from tezo_ds.config import TezoConfig
from tezo_ds.doctor.flags import RunFlags
from tezo_ds.plan import timing
from tezo_ds.plan.dry_run import count
from tezo_ds.settings import Settings

MLP = ("--adapter", "tt", "--adapter-sites", "mlp", "--tt-modes", "16,16,16,4,4,4")
TT = {"adapter": "tt", "bottleneck": 16}


def test_the_released_llama_adapters(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("plan", "--model", "llama-7b", *MLP) == 0
    printed = capsys.readouterr().out
    assert (
        "adapter tt: 96 of them, 610,560 numbers train" in printed and "tezo tt, fused" in printed
    )
    assert call("plan", "--model", "llama-7b", *MLP, "--queries", 4, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["adapter"] == {"sites": 96, "numel": 610_560}
    # What is contracted of some sites at a time in 8 branches, and the parameters that it is of.
    each = (4096 + 64) * (1 + 2 * 5)
    expected = 4 * 8 * (AHEAD // (8 * each)) * (each + 610_560 // 96)
    assert found["columns"][0]["memory"]["factors"] == expected


def test_a_dry_run_gathers_what_a_plain_forward_does() -> None:
    plain, tt = (
        job_of("llama", "fsdp2", 3, 3, TezoConfig(rank=3, queries=2, **fields))
        for fields in ({}, TT)
    )
    counted = count(tt)
    assert counted.gathers == tt.messages == plain.messages
    assert counted.gathered == tt.gathered_bytes and counted.scalars == sum(tt.scalars)
    token = sum(site.adapter.prepared_numel for site in tt.run.adapters.sites)
    fused = timing.flops(tt, tt.tokens, True) - timing.flops(tt, tt.tokens, False)
    assert fused == 2 * tt.tokens * token > 0
    assert tt.need.state == 8 * tt.run.adapters.numel


def test_late_adapters_leave_a_trunk() -> None:
    late = job_of("llama", "fsdp2", 3, 3, TezoConfig(include=("last:1",), **TT))
    assert late.trunk.first == 2 and len(late.run.adapters.sites) == 2
    settings = Settings(model="m", task="t", train_examples=8)
    flags = RunFlags(settings, late.config.model_copy(update={"trunk_cache": "memory"}))
    assert flags.trunk_cache(late.module, 2).first == 2
    assert flags.needs(late.module, 2).state == 8 * late.run.adapters.numel


def test_what_does_not_fit_is_said_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--adapter", "tt", "--tt-modes", "16,16,4,4")
    assert call("plan", "--model", "llama-7b", *flags) == 2
    error = capsys.readouterr().err
    assert "tt_modes: the product of 16, 16, 4, 4 does not fit" in error and error.count("\n") == 1
