"""Runs whose examples come again to hidden states that are kept: the same numbers, however a run ended."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from command_line import BATCH, Given, call
from other_kernels import OtherKernels
from test_resume import kappas, killed_after, result, same
from torch import nn

from tezo_ds.run.folder import METRICS, TRUNK_CACHE, read_metrics
from tezo_ds.tasks.batches import lane_indices

pytest_plugins = ("cli_fixtures",)
LATE = {"include": "*.layers.1.*", "steps": 18, "eval_every": 6, "test_examples": 7}
Captured = pytest.CaptureFixture[str]


def scores(run: Path) -> list[Any]:
    return read_metrics(run / METRICS)[1]


@pytest.fixture(scope="module")
def whole(given: Given, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    with OtherKernels("shapes"):
        assert call(*given.train(run, **LATE, trunk_cache="memory")) == 0
    return run


@pytest.mark.parametrize("kind", ["memory", "disk", "lost"])
@pytest.mark.parametrize("at", [3, 11])
def test_a_killed_run_goes_on_bit_for_bit(
    given: Given, whole: Path, kind: str, at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    first, then = ("memory", "disk") if kind == "memory" else ("disk", "disk")
    with OtherKernels("shapes"):
        killed_after(at, given.train(run, **LATE, trunk_cache=first), monkeypatch)
        if kind == "lost":
            shutil.rmtree(run / TRUNK_CACHE)
        assert call(*given.train(run, **LATE, trunk_cache=then)) == 0
    assert kappas(run) == kappas(whole) and same(run, whole)
    assert scores(run) == scores(whole)


def test_an_evaluation_in_a_new_process_gives_the_runs_own_numbers(
    given: Given, whole: Path, capfd: Captured
) -> None:
    with OtherKernels("shapes"):
        assert call("evaluate", "--run", whole) == 0
    assert json.loads(capfd.readouterr().out)["loss"] == scores(whole)[-1]["test_loss"]


def test_later_visits_run_late_blocks_alone(
    given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Captured
) -> None:
    calls: list[int] = []
    forward = nn.Embedding.forward

    def counted(self: nn.Embedding, ids: Any) -> Any:
        calls.append(len(ids))
        return forward(self, ids)

    monkeypatch.setattr(nn.Embedding, "forward", counted)
    assert call(*given.train(tmp_path / "run", **LATE, trunk_cache="memory")) == 0
    out = capfd.readouterr().out
    assert "trunk: blocks 0 to 0 of 2 run once an example" in out
    assert "trunk cache:" in out and "GiB of memory" in out
    count = int(out.split(" training and")[0].rsplit(" ", 1)[-1])
    # Every training example once, the test examples once, and what is tried out before the first step.
    assert sum(calls) < count + 7 + 40 < 18 * BATCH + 4 * 7


def test_what_a_cache_is_of_is_compared(given: Given, tmp_path: Path, capfd: Captured) -> None:
    run = tmp_path / "run"
    assert call(*given.train(run, **{**LATE, "steps": 2}, trunk_cache="disk")) == 0
    key = run / TRUNK_CACHE / "key.json"
    content = json.loads(key.read_text())
    for name, shown in (("base", "base"), ("first block", "first block"), ("dtype", "dtype")):
        key.write_text(json.dumps({**content, name: "another"}))
        capfd.readouterr()
        assert call(*given.train(run, **{**LATE, "steps": 3}, trunk_cache="disk")) == 2
        error = capfd.readouterr().err.strip().splitlines()[-1]
        assert f"hidden states of another run: {shown} differ; remove the folder" in error


def test_runs_with_and_without_a_cache_are_different_runs(
    given: Given, tmp_path: Path, capfd: Captured
) -> None:
    run = tmp_path / "run"
    assert call(*given.train(run, **{**LATE, "steps": 2})) == 0
    assert call(*given.train(run, **{**LATE, "steps": 3}, trunk_cache="memory")) == 2
    assert "holds a run of trunk_cache 'off', not 'memory'" in capfd.readouterr().err


def test_a_bound_leaves_the_numbers_to_rounding(given: Given, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    few = {"trunk_cache": "memory", "trunk_cache_gib": 3e-6}  # some examples
    assert call(*given.train(run, **LATE, **few)) == 0
    for (mine, my_loss), (its, its_loss) in zip(kappas(run), kappas(whole), strict=True):
        assert mine == pytest.approx(its, rel=5e-3, abs=5e-3)
        assert my_loss == pytest.approx(its_loss, rel=1e-4)
    assert result(run)


def test_a_model_without_a_trunk_is_refused(given: Given, tmp_path: Path, capfd: Captured) -> None:
    assert call(*given.train(tmp_path / "run", trunk_cache="memory")) == 2
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert "trunk_cache: nothing to keep, as there is no trunk: " in error
    assert (
        "acts before the first block returns; train late layers alone, e.g. include last:6" in error
    )


@pytest.mark.parametrize(("n", "batch_size"), [(10, 4), (9, 3), (5, 7), (1, 1)])
def test_lanes(n: int, batch_size: int) -> None:
    steps = 6 * -(-n // batch_size)
    alone = [lane_indices(n, batch_size, step, 3, 0, 1) for step in range(steps)]
    for world in (2, 3, 5):
        parts = [
            [lane_indices(n, batch_size, step, 3, rank, world) for step in range(steps)]
            for rank in range(world)
        ]
        joined = [[i for part in step for i in part] for step in zip(*parts, strict=True)]
        assert joined == alone
        if batch_size <= n:
            owners = [{i for step in part for i in step} for part in parts]
            assert sum(map(len, owners)) == n  # each example on one rank
    whole = n // batch_size
    first = [i for step in alone[:whole] for i in step]
    assert len(set(first)) == len(first) or n < batch_size  # an epoch has each once
    if n == 10:
        assert {i for step in alone[:3] for i in step} == set(range(10))
        companies = [{frozenset(step) for step in alone[k : k + 2]} for k in (0, 6, 12)]
        assert len(set(map(frozenset, companies))) > 1  # in other company each time
