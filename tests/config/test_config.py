"""The tezo block: where it is read from, what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tezo_ds import ConfigError, TezoConfig
from tezo_ds.config import resolve

STAGE3 = {"zero_optimization": {"stage": 3}}


def test_all_ways_to_say_the_same(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({**STAGE3, "tezo": {"rank": 4, "lr": 0.5}}))
    expected = TezoConfig(rank=4, lr=0.5)
    assert resolve(expected) == (expected, None)
    assert resolve({"rank": 4, "lr": 0.5}) == (expected, None)
    assert resolve({**STAGE3, "tezo": {"rank": 4, "lr": 0.5}}) == (expected, STAGE3)
    assert resolve(path) == resolve(str(path)) == (expected, STAGE3)


def test_overrides_beat_the_block_which_beats_defaults() -> None:
    config, _ = resolve({"rank": 4, "rho": 0.1}, {"rank": 8, "lr": None}, {"rho": 0.2, "seed": 3})
    assert (config.rank, config.rho, config.seed, config.lr) == (8, 0.1, 3, TezoConfig().lr)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"rnak": 4},
            "unknown field 'rnak'; remove it or use one of: method, rank, rank_threshold",
        ),
        ({"rank": 0}, "rank: Input should be greater than or equal to 1 (got 0)"),
        ({"rho": 0.0}, "rho: Input should be greater than 0 (got 0.0)"),
        ({"rho": "automatic"}, "rho: "),
        ({"rho": float("nan")}, "rho: "),
        ({"momentum": 1.0}, "momentum: Input should be less than 1"),
        ({"method": "adam"}, "method: must be one of tezo, tezo-m,"),
        ({"schedule": "linear"}, "linear falls to 0 at total_steps, which is not set"),
        ({"warmup_steps": 9, "total_steps": 5}, "warmup_steps: 9 is more than total_steps 5"),
        ({"include": "*"}, "include: "),
    ],
)
def test_each_bad_field_is_named_in_one_line(fields: dict, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve({**STAGE3, "tezo": fields})
    assert str(caught.value).startswith('"tezo" block: ') and message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bad_files_are_named(tmp_path: Path) -> None:
    missing, broken, listed, bare = (tmp_path / name for name in ("no", "broken", "listed", "bare"))
    broken.write_text("{")
    listed.write_text("[]")
    bare.write_text(json.dumps(STAGE3))
    for path, message in [
        (missing, "cannot be read (No such file or directory)"),
        (broken, "not valid JSON"),
        (listed, "must hold a JSON object, holds a list"),
        (bare, '"tezo" block is missing; add one, e.g. "tezo": {"rank": 16}'),
    ]:
        with pytest.raises(ConfigError) as caught:
            resolve(path)
        assert str(caught.value).startswith(str(path)) and message in str(caught.value)
    with pytest.raises(ConfigError, match="block is missing"):
        resolve(STAGE3)


def test_cosine_falls_from_peak_to_zero() -> None:
    config = TezoConfig(lr=2.0, schedule="cosine", warmup_steps=1, total_steps=5)
    rates = [config.lr_at(step) for step in range(6)]
    assert rates == pytest.approx([2.0, 2.0, 1 + 0.5**0.5, 1.0, 1 - 0.5**0.5, 0.0])


@pytest.mark.parametrize(
    ("fields", "lr"),
    [
        ({}, 1e-6), ({"method": "lozo"}, 1e-6), ({"method": "tezo-adam-coef"}, 1e-4),
        ({"method": "tezo-adam"}, 1e-3),
        ({"method": "mezo-adam"}, 1e-3),
        ({"method": "tezo-gn"}, 1.0), ({"adapter": "tt"}, 1e-4), ({"adapter": "lora"}, 1e-4),
        ({"adapter": "tt", "method": "tezo-adam-coef"}, 1e-3),
        ({"adapter": "tt", "method": "tezo-gn"}, 1.0), ({"adapter": "lora", "lr": 1e-6}, 1e-6),
    ],
)  # fmt: skip
def test_rates_by_default_are_a_methods_own(fields: dict[str, Any], lr: float) -> None:
    assert TezoConfig(**fields).lr == lr
