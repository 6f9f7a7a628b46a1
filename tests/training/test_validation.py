"""Runs judged by validation examples: which are scored when, kept by, waited for, and told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import Given, Run, call
from test_resume import killed_after, same

from tezo_ds.run.folder import METRICS, VALIDATION, read_metrics

pytest_plugins = ("cli_fixtures",)
Captured = pytest.CaptureFixture[str]
# Steps so large that some make the loss worse.
WILD = {"lr": 0.05, "eval_every": 1, "keep": "best", "steps": 6, "validation_examples": 9}


def losses_of(run: Run, part: str) -> dict[int, float]:
    return {x["step"]: x[f"{part}_loss"] for x in read_metrics(run.path / METRICS, part)[1]}


def test_the_best_step_is_chosen_without_the_test_examples(
    given: Given, tmp_path: Path, capfd: Captured
) -> None:
    run, short = Run(tmp_path / "run"), Run(tmp_path / "short")
    assert call(*given.train(run.path, **WILD), drawn=True) == 0
    out = capfd.readouterr().out
    validated, tested, summary = losses_of(run, VALIDATION), losses_of(run, "test"), run.summary
    best = min(validated, key=validated.__getitem__)
    assert 0 < best < 6, f"the case is to be one in between: {validated}"
    assert list(validated) == list(range(7)) and set(tested) == {0, best}
    assert summary["kept_step"] == best and summary["validation_loss_after"] == validated[best]
    assert summary["test_loss_after"] == tested[best] != validated[best]
    assert summary["validation_examples"] == 9 and summary["train_examples"] == 13
    assert "films: 13 training, 9 validation and 26 test examples" in out
    assert (
        f"kept: the coefficients after {best} of 6 steps, the best evaluation's on the vali" in out
    )
    assert "on 9 validation examples" in out and "validation accuracy" in out
    # The test examples are those of a run without any, and score the kept coefficients.
    plain = {**WILD, "keep": "last", "steps": best}
    assert call(*given.train(short.path, **plain)) == 0
    assert all(torch.equal(run.coefficients[n], part) for n, part in short.coefficients.items())
    assert short.summary["test_loss_after"] == summary["test_loss_after"]
    capfd.readouterr()
    assert call("evaluate", "--run", run.path) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["loss"] == pytest.approx(summary["test_loss_after"], rel=1e-6)
    assert found["test_examples"] == 26


def test_a_killed_run_recalls_its_validations(
    given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert call(*given.train(whole, **WILD)) == 0
    killed_after(4, given.train(run, **WILD), monkeypatch)
    assert call(*given.train(run, **WILD)) == 0
    assert same(run, whole)
    for part in ("test", VALIDATION):
        assert losses_of(Run(run), part) == losses_of(Run(whole), part)
    left = ("seconds", "seconds_training")
    assert {k: v for k, v in Run(run).summary.items() if k not in left} == {
        k: v for k, v in Run(whole).summary.items() if k not in left
    }


def test_patience_goes_by_the_validation_examples(given: Given, tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    options = {**WILD, "lr": 0.5, "steps": 50, "patience": 2, "keep": "last"}
    assert call(*given.train(run.path, **options)) == 0
    validated, summary = losses_of(run, VALIDATION), run.summary
    best = min(validated, key=validated.__getitem__)
    assert summary["steps"] == best + 2 < 50 and set(losses_of(run, "test")) == {0, best + 2}


def test_other_validation_examples_are_another_run(
    given: Given, tmp_path: Path, capfd: Captured
) -> None:
    valid, run = tmp_path / "valid.jsonl", tmp_path / "run"
    valid.write_text(given.data.read_text().replace("film", "play"))
    options: dict[str, Any] = {"validation_data": valid}
    assert call(*given.train(run, steps=2, **options)) == 0
    assert call(*given.train(run, steps=3, **options)) == 0
    assert call(*given.train(run, steps=4)) == 2
    assert "holds a run of validation_data" in capfd.readouterr().err
    valid.write_text(valid.read_text().replace("play 1 ", "song 1 "))
    assert call(*given.train(run, steps=4, **options)) == 2
    assert f"the validation examples in {valid} are not those" in capfd.readouterr().err


def test_validation_examples_have_a_cache_of_their_own(given: Given, tmp_path: Path) -> None:
    late = {"include": "*.layers.1.*", "eval_every": 2, "validation_examples": 5}
    runs = [Run(tmp_path / name) for name in ("off", "memory")]
    for run in runs:
        assert call(*given.train(run.path, **late, steps=4, trunk_cache=run.path.name)) == 0
    for part in ("test", VALIDATION):
        off, memory = (losses_of(run, part) for run in runs)
        assert off.keys() == memory.keys() and memory[0] == pytest.approx(off[0], rel=1e-6)
