"""Random and damaged configs, of ours and of DeepSpeed: the right result, or one line that names what is
wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fuzzing import NUMBERS, TEXTS, VALUES, changed, damaged, examples, outcome
from hypothesis import example, given
from hypothesis import strategies as st

from tezo_ds.config import TezoConfig, build, resolve
from tezo_ds.intake.deepspeed_json import fit
from tezo_ds.sharding import zero3

FIELDS = sorted(TezoConfig.model_fields)
CHOICES = st.sampled_from(["auto", "lozo", "mezo-adam", "adazeta", "adaptive", "linear", "cosine"])
BLOCK = {"method": "tezo", "rank": 16, "betas": [0.9, 0.99], "include": ["*"], "rho": 1e-3}
ZERO = {"stage": 3, "offload_param": {"device": "cpu"}, "stage3_max_live_parameters": 9}
DEEPSPEED = {"zero_optimization": ZERO, "bf16": {"enabled": True}}


def used(config: TezoConfig) -> TezoConfig:
    """Checks that a config survives a round trip, and has a rate and directions for any step."""
    assert build(config.model_dump(mode="json"), "again") == config
    config = config.model_copy(update={"steps_per_epoch": config.steps_per_epoch or 3})
    for step in (0, 7, 10**6):
        config.lr_at(step)
        assert config.queries_at(step) >= 1
    return config


@examples(120)
@example({"warmup_steps": 10**400, "total_steps": 10**401})
@example({"query_schedule": "adazeta", "queries_max": 3, "query_beta": 1e300})
@example({"query_schedule": "adazeta", "queries_max": 3, "query_alpha": 1e308, "query_beta": 9.0})
@given(st.dictionaries(st.sampled_from(FIELDS), NUMBERS | CHOICES | VALUES, max_size=3))
def test_blocks(block: dict[str, Any]) -> None:
    outcome(lambda: used(build(block, "here")), *block)


@examples(60)
@given(st.dictionaries(TEXTS, VALUES, min_size=1, max_size=2))
def test_unknown_fields(block: dict[str, Any]) -> None:
    assert outcome(lambda: build(block, "here"), "unknown field", "unicode") is None


@examples(120)
@example(b"\xff{}")
@example(b'{"tezo": {"rho": NaN}}')
@example(b'{"tezo": {"rho": 1e999}}')
@example(b"[" * 100_000)
@example(b'{"tezo": {"seed": ' + b"9" * 5000 + b"}}")
@given(damaged(json.dumps({**DEEPSPEED, "tezo": BLOCK}, indent=1).encode()))
def test_deepspeed_files(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "ds.json"
    path.write_bytes(content)
    outcome(lambda: used(resolve(path)[0]), str(path))


@examples(60)
@given(changed(DEEPSPEED))
def test_zero_blocks(config: dict[str, Any]) -> None:
    for read in (zero3.prepare, fit):
        outcome(lambda read=read: read(config), "zero_optimization", "offload_param", "bf16")


def test_what_is_no_config_file(tmp_path: Path) -> None:
    for path in (
        tmp_path,
        tmp_path / "none.json",
        tmp_path / ("a" * 5000),
        tmp_path / "line\nbreak.json",
    ):
        assert outcome(lambda path=path: resolve(path), "cannot be read") is None
    twice = tmp_path / "twice.json"
    twice.write_text('{"tezo": {"rank": 3, "rank": 4}}')
    assert outcome(lambda: resolve(twice), "'rank' is there twice") is None
