"""A loss far above its start is said once, and ends a run on request; runs are evaluated from anywhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import Given, Run, call

import tezo_ds
from tezo_ds.engine.engine import Engine
from tezo_ds.tasks.evaluation import Evaluator
from tezo_ds.training.divergence import WINDOW, Divergence

pytest_plugins = ["cli_fixtures"]


def fed(losses: list[float | None], before: int = 0, stops: bool = False) -> list[str | None]:
    watch = Divergence(losses[:before], stops)
    return [
        watch.step(float(x or "nan"), step) for step, x in enumerate(losses[before:], start=before)
    ]


def test_a_warning_comes_once_and_not_for_noise() -> None:
    calm = [3.0 + 0.5 * (-1) ** i for i in range(3 * WINDOW)]
    assert not any(fed(calm))
    assert not any(fed([*calm, *[1e6] * 5, *calm])), "a few outliers"
    lost = [*calm, *[50.0] * WINDOW, *[90.0] * WINDOW]
    said = [line for line in fed(lost) if line]
    assert len(said) == 1 and "lower lr or rho" in said[0] and "was 3 at the start" in said[0]
    assert len([x for x in fed([*calm, None, *[50.0] * WINDOW], before=len(calm)) if x]) == 1
    assert not any(fed(lost, before=len(lost) - 5)), "said by the process before"
    with pytest.raises(tezo_ds.ProbeError, match="--stop-on-divergence"):
        fed(lost, stops=True)


def test_a_run_that_diverges(
    given: Given,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        Divergence, "_far", lambda self: (3.0, 50.0) if len(self._last) > 4 else None
    )
    assert call(*given.train(tmp_path / "warned")) == 0
    assert capsys.readouterr().out.count("warning: the loss is 50 after 5 steps") == 1
    assert call(*given.train(tmp_path / "stopped", stop_on_divergence=True)) == 2
    stopped = Run(tmp_path / "stopped")
    assert stopped.summary["status"] == "failed" and stopped.summary["steps"] == 5
    assert stopped.coefficients


def test_sigterm_ends_an_evaluation_between_its_batches(
    given: Given, tmp_path: Path, hearing_again: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches, of_batch = [], Evaluator._batch
    asked: list[Engine] = []

    def batch(self: Evaluator, *args: object) -> object:
        batches.append(self._engine.step_index)
        if self._engine.step_index == 4 and not asked:
            asked.append(self._engine)
            self._engine.ask_to_stop()
        return of_batch(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Evaluator, "_batch", batch)
    options = {"eval_every": 4, "eval_batch_size": 3}
    assert call(*given.train(tmp_path / "run", **options)) == 0
    run = Run(tmp_path / "run")
    assert run.summary["status"] == "stopped" and run.summary["steps"] == 4
    assert batches.count(0) > 2 and batches.count(4) == 1, "of as many batches"
    assert call(*given.train(tmp_path / "run", **options)) == 0
    assert run.summary["status"] == "finished" and batches.count(4) == 1 + batches.count(0)


def test_a_run_is_evaluated_from_another_folder(
    given: Given,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "model").symlink_to(given.model)
    (tmp_path / "films.jsonl").symlink_to(given.data)
    monkeypatch.chdir(tmp_path)
    here = Given(Path("model"), Path("films.jsonl"))
    assert call(*here.train(Path("run"))) == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    capsys.readouterr()
    assert call("evaluate", "--run", "../run") == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["loss"] == pytest.approx(
        Run(tmp_path / "run").summary["test_loss_after"], rel=1e-6
    )
    assert call("export", "--run", "../run", "--merged", "merged") == 0
    assert (
        json.loads((tmp_path / "run" / "config.json").read_text())["settings"]["model"] == "model"
    )
