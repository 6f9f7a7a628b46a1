"""Fields that do nothing in a run are named, once, on the first rank."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from command_line import Given, call
from tiny import tiny

import tezo_ds
from tezo_ds import TezoConfig
from tezo_ds.config.declared import extra_of
from tezo_ds.config.registry import METHODS
from tezo_ds.intake.unused_fields import PROBES, REWARD, WRITERS

pytest_plugins = ("cli_fixtures",)


def said(config: dict[str, Any], caplog: pytest.LogCaptureFixture) -> str:
    caplog.clear()
    with caplog.at_level(logging.WARNING, "tezo_ds"):
        tezo_ds.initialize(tiny("llama"), config)
    lines = [r.getMessage() for r in caplog.records if "set, but not used" in r.getMessage()]
    assert len(lines) <= 1
    return lines[0] if lines else ""


@pytest.mark.parametrize(
    ("config", "idle"),
    [
        ({"nu": 9}, "nu"),
        ({"momentum": 0.5}, "momentum"),
        ({"rank_max": 8}, "rank_max"),
        ({"method": "lozo", "betas": (0.5, 0.9)}, "betas"),
        ({"method": "tezo-adam", "momentum": 0.5}, "momentum"),
        ({"method": "mezo", "rank": 4}, "rank"),
        ({"method": "mezo", "branch_chunk": 2}, "branch_chunk"),
        ({"restore": "copy"}, "restore"),
        ({"stochastic_rounding": False}, "stochastic_rounding"),
        ({"queries_max": 4}, "queries_max"),
        ({"tt_rank": 3}, "tt_rank"),
        ({"adapter": "tt", "bottleneck": 6}, "rank"),
        ({"query_alpha": 2.0}, "query_alpha"),
        ({"inner_maps": "values"}, "inner_maps"),
        ({"query_schedule": "adazeta", "queries_max": 4, "steps_per_epoch": 2, "queries": 3}, "queries"),
    ],
)  # fmt: skip
def test_what_is_not_looked_at_is_named(
    config: dict[str, Any], idle: str, caplog: pytest.LogCaptureFixture
) -> None:
    line = said({"rank": 2, **config}, caplog)
    assert f" {idle} (for " in line
    assert line.count(" (for ") == 1 + (config.get("method") == "mezo" and idle != "rank")


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"method": "lozo", "nu": 9, "rank_scaling": True, "stochastic_rounding": False},
        {"method": "tezo-m", "momentum": 0.5},
        {"method": "tezo-adam", "betas": (0.5, 0.9), "eps": 1e-6, "bias_correction": False},
        {"rank": "auto", "rank_max": 4, "rank_threshold": 0.5},
        {"refresh_every": 5, "stochastic_rounding": False},
        {"probe": "inplace", "restore": "copy"},
        {"branch_chunk": 2, "placement": "shared"},
        {"query_schedule": "adazeta", "queries_max": 4, "steps_per_epoch": 2, "query_beta": 1.0},
    ],
)
def test_what_is_looked_at_is_not(config: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    assert said({"rank": 2, **config}, caplog) == ""


def test_every_declaration_can_be_read() -> None:
    for name, field in TezoConfig.model_fields.items():
        used_by = extra_of(field)["used_by"]
        named, _, values = used_by.partition(" ")
        if used_by == "all" or used_by in {*PROBES, WRITERS, REWARD}:
            continue
        if named in TezoConfig.model_fields:
            for value in values.split(", ") if values else ():
                assert value in str(TezoConfig.model_fields[named].annotation), name
            continue
        for method in used_by.split(", "):
            known = [m for m in METHODS if m == method or m.startswith(method.rstrip("…"))]
            assert known if method.endswith("…") else method in METHODS, name


def test_train_says_it(given: Given, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(*given.train(tmp_path / "run", steps=1, nu=9)) == 0
    out = capsys.readouterr().out
    assert out.count("set, but not used in this run: nu (for lozo…)") == 1
