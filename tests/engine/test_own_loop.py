"""The page on loops of one's own: its code runs, and a resumed run has the bits of an uninterrupted one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_batch, tiny

import tezo_ds

PAGE = Path(__file__).resolve().parents[2] / "docs" / "own-loop.md"
LOOP, RESUME, RANKS, WRITE, FILL = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
STEPS, CUT = 7, 5
BATCHES = [make_batch(3, seed=step) for step in range(STEPS)]


def execute(block: str, names: dict[str, Any], steps: int) -> tezo_ds.Engine:
    """Runs a block of the page on a newly loaded model, as a new process would have it."""
    names |= {"model": tiny(), "steps": steps, "batches": BATCHES}
    exec(compile(block, str(PAGE), "exec"), names)
    engine: tezo_ds.Engine = names["engine"]
    return engine


def uninterrupted(config: dict[str, Any]) -> tezo_ds.Engine:
    engine = tezo_ds.initialize(tiny(), config)
    for batch in BATCHES:
        engine.step(batch)
    return engine


def assert_same_bits(engine: tezo_ds.Engine, other: tezo_ds.Engine) -> None:
    assert engine.step_index == other.step_index == STEPS
    for found, expected in (
        (engine.state(), other.state()),
        (engine.coefficients(), other.coefficients()),
        (engine.state_dict(), other.state_dict()),
    ):
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            assert torch.equal(tensor, expected[name]), name
    start = tiny().state_dict()
    assert any(not torch.equal(start[name], part) for name, part in engine.state_dict().items())


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"method": "tezo-m"},
        {"method": "tezo-adam-coef", "lr": 1e-3},
        {"refresh_every": 3},
        {"method": "tezo-m", "refresh_every": 2, "probe": "inplace"},
        {"rho": "auto", "clip_kappa": 0.5},
        {"schedule": "cosine", "total_steps": STEPS, "warmup_steps": 2, "train_vectors": True},
    ],
)
def test_a_resumed_loop(
    more: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = {"config": {"rank": 2, "lr": 1e-2, "rho": 1e-2, **more}}
    execute(LOOP, names, CUT)
    saved = sorted(path.name for path in (tmp_path / "snapshots").iterdir())
    assert saved == ["step-00000002.safetensors", "step-00000004.safetensors"]
    engine = execute(RESUME, names, STEPS)
    assert_same_bits(engine, uninterrupted(names["config"]))
    execute(RANKS, names, STEPS)
    assert (tmp_path / "snapshots" / "step-00000007.safetensors").is_file()


@pytest.mark.parametrize(
    "more",
    [
        {"method": "lozo", "nu": 3},
        {"method": "lozo-m", "nu": 3},
        {"method": "mezo", "lr": 1e-4},
        {"method": "mezo-m", "lr": 1e-4},
        {"method": "mezo-adam", "lr": 1e-3, "restore": "copy"},
        {"method": "tezo-adam", "lr": 1e-3},
    ],
)
def test_a_resumed_loop_of_a_method_that_writes_weights(
    more: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = {"config": {"rank": 2, "lr": 1e-3, "rho": 1e-2, **more}}
    execute(LOOP, names, CUT)
    execute(WRITE, names, CUT)
    engine = execute(FILL, names, STEPS)
    assert_same_bits(engine, uninterrupted(names["config"]))


def test_the_state_alone_is_not_enough_where_weights_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = {"config": {"method": "lozo", "nu": 3, "rank": 2, "lr": 1e-2, "rho": 1e-2}}
    execute(LOOP, names, CUT)
    execute(WRITE, names, CUT)
    engine = execute(FILL.replace("fill()\n", ""), names, STEPS)
    with pytest.raises(AssertionError):
        assert_same_bits(engine, uninterrupted(names["config"]))


def test_loaded_coefficients_leave_the_index_at_0() -> None:
    config = {"rank": 2, "lr": 1e-2}
    engine, other = uninterrupted(config), tezo_ds.initialize(tiny(), config)
    other.load_coefficients(engine.coefficients())
    assert other.step_index == 0 and "leaves the index at 0" in PAGE.read_text()
