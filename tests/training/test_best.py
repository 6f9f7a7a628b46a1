"""`--keep best` and `--patience`: the best evaluation's coefficients, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import Given, Run, call

from tezo_ds.errors import ConfigError
from tezo_ds.settings import RunOptions
from tezo_ds.training.best import Best

pytest_plugins = ("cli_fixtures",)

# Steps so large that some make the loss worse.
WILD = {"lr": 0.05, "eval_every": 1, "keep": "best", "steps": 6}


def best_of(losses: list[float], **options: Any) -> Best:
    best = Best(RunOptions(output=Path("o"), keep="best", **options), lambda engine, steps: None)
    for step, loss in enumerate(losses):
        best.see(step, {"test_loss": loss, "test_accuracy": 1 - loss / 10}, None)
        if best.over:
            break
    return best


def test_what_is_better_and_for_how_long_to_wait() -> None:
    assert best_of([3.0, 2.0, 2.5]).step == 1
    assert best_of([3.0, 2.0, 2.0]).step == 1, "of equals the first"
    assert best_of([3.0, 2.0, 2.5], best_by="accuracy").step == 1
    assert best_of([float("nan"), 5.0, float("nan")]).step == 1
    assert not best_of([3.0, 4.0, 2.0, 4.0], patience=2).over
    assert best_of([3.0, 4.0, 2.0, 4.0, 5.0, 1.0], patience=2).step == 2
    with pytest.raises(
        ConfigError, match="--best-by metric: evaluations of this task measure no metric"
    ):
        best_of([1.0], best_by="metric")


def losses_of(run: Run) -> dict[int, float]:
    return {line["step"]: line["test_loss"] for line in run.lines if "test_loss" in line}


def assert_same(run: Run, other: Run) -> None:
    found, expected = run.coefficients, other.coefficients
    assert all(torch.equal(found[name], part) for name, part in expected.items())


def test_the_result_is_that_of_the_best_evaluation(
    given: Given, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, short = Run(tmp_path / "run"), Run(tmp_path / "short")
    assert call(*given.train(run.path, **WILD)) == 0
    losses = losses_of(run)
    best = min(losses, key=losses.__getitem__)
    assert 0 < best < 6, f"the case is to be one in between: {losses}"
    assert f"kept: the coefficients after {best} of 6 steps" in capsys.readouterr().out
    summary = run.summary
    assert (summary["steps"], summary["kept_step"]) == (6, best)
    assert summary["test_loss_after"] == losses[best]
    assert call(*given.train(short.path, **{**WILD, "keep": "last", "steps": best})) == 0
    assert_same(run, short)
    # Gone on with, the best of the earlier process is rebuilt from the journal; nothing later is better.
    assert call(*given.train(run.path, **{**WILD, "steps": 7, "lr": 0.05})) == 0
    assert min(losses_of(run), key=losses_of(run).__getitem__) == best
    assert run.summary["kept_step"] == best and run.summary["steps"] == 7
    assert_same(run, short)
    assert (
        call("replay", run.path, "--to-step", best, "--coefficients", tmp_path / "c.safetensors")
        == 0
    )


def test_a_run_ends_when_nothing_better_comes(given: Given, tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    assert call(*given.train(run.path, **{**WILD, "lr": 0.5, "steps": 50, "patience": 2})) == 0
    losses, summary = losses_of(run), run.summary
    best = min(losses, key=losses.__getitem__)
    assert summary["status"] == "finished" and summary["steps"] == best + 2 < 50
    assert summary.get("kept_step") == best


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"keep": "best", "eval_every": 0}, "--keep best chooses among evaluations; set --eval-every"),
        ({"patience": 2, "eval_every": 0}, "--patience counts evaluations; set --eval-every, too"),
        ({"keep": "best", "method": "mezo", "rank": None}, "--keep best: mezo writes weights as it goes"),
        ({"keep": "best", "refresh_every": 2}, "--keep best: tezo writes weights as it goes"),
        ({"keep": "best", "best_by": "metric"}, "--best-by metric: there is none; name one by --metric"),
    ],
)  # fmt: skip
def test_what_does_not_go_together(
    given: Given, tmp_path: Path, options: dict[str, Any], words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert call(*given.train(tmp_path / "run", **{"eval_every": 1, **options})) == 2
    assert words in capsys.readouterr().err
