"""`--report-to`: what trackers are told, read from what they keep, and that a run needs none of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import accelerate.tracking
import pytest
import torch
from accelerate.utils import LoggerType
from command_line import BATCH, STEPS, Given, Run, call

from tezo_ds.run.folder import TENSORBOARD, TRACKERS
from tezo_ds.settings import RunOptions
from tezo_ds.training.display import Display
from tezo_ds.training.trackers import Trackers

pytest_plugins = ("cli_fixtures",)
pytest.importorskip("tensorboard")

FIRST = 4  # steps of the run before it goes on
FAILS = "train/loss"  # with which the other tracker fails in the last step


class Other(accelerate.tracking.GeneralTracker):
    """A tracker in mlflow's place, which fails in a run's last step."""

    name, requires_logging_directory, main_process_only = "mlflow", False, False
    told: ClassVar[list[tuple[str, Any]]] = []

    def __init__(self, **given: Any) -> None:
        self.given, self.info = given, self
        self.run_id = given["run_id"] or "made-by-a-server"

    @property
    def tracker(self) -> Other:
        return self

    def start(self) -> None:
        self.told.append(("start", self.given))

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.told.append(("config", values))

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        if step == STEPS and FAILS in values:
            raise ConnectionError("no route\nto host")
        self.told.append((f"log {step}", values))

    def finish(self) -> None:
        self.told.append(("finish", None))


@pytest.fixture(scope="module")
def tracked(given: Given, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Run, str]]:
    """A run of two processes, of which the first reports to TensorBoard and the second to two trackers; with
    what the second printed."""
    output = tmp_path_factory.mktemp("tracked") / "run"
    first = given.train(output, steps=FIRST, eval_every=2, report_to="tensorboard", metric="exact")
    with pytest.MonkeyPatch.context() as patch:
        assert call(*first) == 0
        patch.setitem(accelerate.tracking.LOGGER_TYPE_TO_CLASS, "mlflow", Other)
        both = [LoggerType.TENSORBOARD, LoggerType.MLFLOW]
        patch.setattr(accelerate.tracking, "_available_trackers", both)
        notes: list[str] = []
        note = Display.note
        patch.setattr(Display, "note", lambda self, text: (notes.append(text), note(self, text))[1])
        options = {"eval_every": 2, "report_to": "tensorboard,mlflow", "metric": "exact"}
        assert call(*given.train(output, **options)) == 0
        yield Run(output), "\n".join(notes)


def events(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder)).Reload()


def test_tensorboard_has_every_step_and_evaluation_once(tracked: tuple[Run, str]) -> None:
    run, _ = tracked
    found = events(run.path / TENSORBOARD)
    steps = run.steps
    assert len(steps) == STEPS
    tags = {
        "train/loss": "loss", "train/kappa": "kappa_mean", "train/gradient_norm": "gradient_norm",
        "train/lr": "lr", "train/rho": "rho", "train/directions_failed": "dropped",
    }  # fmt: skip
    for tag, field in tags.items():
        points = [(point.step, point.value) for point in found.Scalars(tag)]
        expected = [(line["step"] + 1, pytest.approx(line[field], rel=1e-6)) for line in steps]
        assert points == expected, tag
    speeds = [point.value for point in found.Scalars("train/tokens_per_second")]
    assert speeds == pytest.approx([line["tokens"] / line["seconds"] for line in steps])
    assert all(0.05 < point.value < 1000 for point in found.Scalars("memory/peak_gib"))
    scores = [line for line in run.lines if "test_loss" in line]
    for what in ("loss", "accuracy", "metric"):
        points = [(point.step, point.value) for point in found.Scalars(f"test/{what}")]
        assert (
            points[:-1]
            == [(line["step"], pytest.approx(line[f"test_{what}"])) for line in scores][:-1]
        )
        assert points[-1][0] == STEPS
    assert len(found.Tensors("samples/test/text_summary")) == len(found.Scalars("test/loss"))


def test_the_configuration_is_stored_once_and_is_not_changed_by_it(
    tracked: tuple[Run, str], plain: Run
) -> None:
    run, _ = tracked
    assert len(list((run.path / TENSORBOARD).rglob("hparams.yml"))) == 1
    text = next((run.path / TENSORBOARD).rglob("hparams.yml")).read_text()
    assert "tezo/lr: 0.002" in text and f"batch_size: {BATCH}" in text
    assert run.config["tezo"] == plain.config["tezo"] and "report_to" not in str(run.config)
    found = run.coefficients
    assert all(torch.equal(found[name], part) for name, part in plain.coefficients.items())


def test_a_tracker_that_comes_later_is_told_what_was_before(tracked: tuple[Run, str]) -> None:
    told = Other.told
    assert [what for what, _ in told[:2]] == ["start", "config"]
    assert told[0][1] == {"experiment_name": "tezo_ds", "run_name": "run", "run_id": None}
    logged = [int(what.split()[1]) for what, _ in told if what.startswith("log")]
    assert logged == sorted(logged)  # as wandb drops earlier steps
    losses = [what for what, values in told if what.startswith("log") and FAILS in values]
    assert losses == [f"log {step}" for step in range(1, STEPS)]
    assert not any(
        "samples/test" in values for _, values in told[2:] if values
    )  # takes numbers alone
    assert '"mlflow": "made-by-a-server"' in (tracked[0].path / TRACKERS).read_text()


def test_one_that_fails_is_let_go_and_the_run_ends_well(tracked: tuple[Run, str]) -> None:
    run, notes = tracked
    assert notes.count("--report-to mlflow") == 1
    assert (
        f"mlflow failed after {STEPS} steps (ConnectionError: no route to host); the run" in notes
    )
    assert run.summary["status"] == "finished" and Other.told[-1] == ("finish", None)


def test_one_that_cannot_start_or_finish_is_said_too(
    tracked: tuple[Run, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Folder:
        path = tracked[0].path

    def fail(self: object) -> None:
        raise RuntimeError

    for when in ("start", "finish"):
        with monkeypatch.context() as patch:
            patch.setattr(Other, when, fail)
            with Trackers(["mlflow"], Folder, Display(0, 1, 1)):  # type: ignore[arg-type]
                pass
        assert f"mlflow could not {when} (RuntimeError: RuntimeError)" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setattr(Other, "start", fail)  # no rank but the first has a folder
        with Trackers(["mlflow"], None, Display(0, 1, 1)) as trackers:
            trackers.step({})
    assert not capsys.readouterr().out


def test_a_missing_package_is_refused_before_anything_else(
    given: Given,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(accelerate.tracking, "_available_trackers", [LoggerType.TENSORBOARD])
    words = given.train(tmp_path / "run")
    assert call(*words, "--report-to", "tensorboard", "--report-to", "wandb") == 2
    assert "pip install wandb" in capsys.readouterr().err
    assert call(*words, "--report-to", "none,tensorboard") == 2
    assert "--report-to none: stands alone" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert RunOptions(output=tmp_path, report_to="none").report_to == ()
