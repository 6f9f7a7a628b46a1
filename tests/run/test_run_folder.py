"""Files that a run leaves on disk when it finishes, fails half-way, or is stopped."""

from __future__ import annotations

import json
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import BATCH, STEPS, TIMEOUT, Given, Run, call, finish, start
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import tiny
from transformers import AutoModelForCausalLM, OPTForCausalLM

from tezo_ds.engine.report import StepReport
from tezo_ds.quiet import LOG
from tezo_ds.run.folder import (
    ADAPTER,
    COEFFICIENTS,
    CONFIG,
    CURVE,
    JOURNAL,
    LOCK,
    METRICS,
    REPORT,
    SUMMARY,
    RunFolder,
)

pytest_plugins = ("cli_fixtures",)

LEFT = "results so far are in the run folder, and the same command goes on from there"
FILES = {CONFIG, JOURNAL, METRICS, SUMMARY, COEFFICIENTS, ADAPTER, CURVE, LOCK, REPORT}


def assert_readable_picture(path: Path) -> None:
    with Image.open(path) as picture:
        picture.load()
        assert picture.format == "PNG"
        assert picture.size[0] > 400
        assert len(set(picture.convert("L").getdata())) > 50  # lines and letters, not a blank


def assert_readable_adapter(path: Path) -> None:
    assert len(load_file(path / "adapter_model.safetensors")) == 2 * 16  # A, B; the head is tied
    assert json.loads((path / "adapter_config.json").read_text())["peft_type"] == "LORA"


def test_a_finished_run(given: Given, plain: Run) -> None:
    assert {path.name for path in plain.path.iterdir()} - {LOG} == FILES
    config, summary = plain.config, plain.summary
    assert (config["steps"], config["batch_size"], config["world_size"]) == (STEPS, BATCH, 1)
    assert config["settings"]["model"] == str(given.model)
    assert (summary["status"], summary["steps"]) == ("finished", STEPS)
    assert summary["seconds"] >= summary["seconds_training"] > 0
    assert summary["test_examples"] + summary["train_examples"] == 48
    assert_readable_picture(plain.path / CURVE)
    assert_readable_adapter(plain.path / ADAPTER)


def test_metrics_have_a_line_a_step_and_the_evaluations(plain: Run) -> None:
    order = [("test_loss" in line, line["step"]) for line in plain.lines]
    steps = [(False, step) for step in range(STEPS)]
    assert order == [(True, 0), *steps[:4], (True, 4), *steps[4:], (True, STEPS)]
    for line in plain.steps:
        counted = {"step", "loss", "kappa", "rho", "lr", "seconds", "tokens", "dropped"}
        assert set(line) == counted | {"kappa_mean", "kappa_spread", "gradient_norm", "snr"}
        assert len(line["kappa"]) == 1
        assert line["tokens"] > BATCH
    first, *_, last = (line for line in plain.lines if "test_loss" in line)
    for line, when in ((first, "before"), (last, "after")):
        assert line["test_accuracy"] == plain.summary[f"accuracy_{when}"]
        assert line["test_loss"] == plain.summary[f"test_loss_{when}"]
        assert line["test_examples"] == plain.summary["test_examples"]


def test_coefficients_have_the_models_own_names(given: Given, plain: Run) -> None:
    model = AutoModelForCausalLM.from_pretrained(given.model)
    matrices = {name for name, parameter in model.named_parameters() if parameter.dim() == 2}
    assert plain.coefficients.keys() == matrices
    assert {c.dtype for c in plain.coefficients.values()} == {torch.float64}
    assert {tuple(c.shape) for c in plain.coefficients.values()} == {(4,)}


def assert_failed(run: Run, at: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Asserts that everything up to the failing step is there, in strict JSON."""
    expected = f"step {at}: loss is nan in 2 of 2 branches, the 5th step in a row"
    assert capsys.readouterr().err.startswith(f"tezo-ds: error: {expected}")
    assert run.config["steps"] == STEPS
    assert run.summary["status"] == "failed"
    assert run.summary["error"].startswith(expected)
    assert run.summary["steps"] == at
    assert [line["step"] for line in run.steps] == list(range(at))
    assert run.coefficients
    assert_readable_adapter(run.path / ADAPTER)


def test_weights_that_are_not_numbers(
    given: Given, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(given.model, tmp_path / "model")
    weights = load_file(given.model / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    broken = Given(tmp_path / "model", given.data)
    assert call(*broken.train(tmp_path / "run")) == 2
    run = Run(tmp_path / "run")
    assert_failed(run, 4, capsys)  # in a row, and one more
    assert run.lines[0]["test_loss"] is run.summary["test_loss_before"] is None  # NaN is no JSON
    assert call("evaluate", *broken.task()) == 0
    assert json.loads(capsys.readouterr().out)["loss"] is None


def test_a_run_that_diverges(
    given: Given, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(*given.train(tmp_path / "run", lr=1e300), drawn=True) == 2
    run = Run(tmp_path / "run")
    assert_failed(run, 5, capsys)
    assert all(bool(part.isfinite().all()) for part in run.coefficients.values())
    assert_readable_picture(run.path / CURVE)


def test_a_run_whose_last_evaluation_is_not_a_number(given: Given, tmp_path: Path) -> None:
    assert call(*given.train(tmp_path / "run", lr=1e300, steps=1)) == 0
    summary = Run(tmp_path / "run").summary
    assert (summary["status"], summary["test_loss_after"]) == ("finished", None)


def test_what_has_no_place_in_an_adapter(
    given: Given, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """OPT's positions have no place in an adapter; everything else is there, and summary and terminal say
    what is not."""
    config = tiny("opt").config
    config.vocab_size = AutoModelForCausalLM.from_pretrained(given.model).config.vocab_size
    shutil.copytree(given.model, tmp_path / "model")
    OPTForCausalLM(config).save_pretrained(tmp_path / "model")
    odd = Given(tmp_path / "model", given.data)
    assert call(*odd.train(tmp_path / "run [1]", steps=2)) == 0
    out = capsys.readouterr().out
    run = Run(tmp_path / "run [1]")
    assert "embed_positions" in run.summary["adapter"]
    assert "no adapter" in out
    assert out.endswith(f"{run.path}\n")  # neither cut to the width nor read as markup
    assert {path.name for path in run.path.iterdir()} - {LOG} == FILES - {ADAPTER}


def test_a_signal_between_a_step_and_its_line(
    given: Given,
    tmp_path: Path,
    hearing_again: None,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Hazard: the coefficients have the step, the journal does not."""
    log_step = RunFolder.log_step

    def log_late(folder: RunFolder, report: StepReport, *more: Any) -> None:
        if report.step == 2:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)  # ignored
        log_step(folder, report, *more)

    monkeypatch.setattr(RunFolder, "log_step", log_late)
    assert call(*given.train(tmp_path / "run")) == 130
    stopped = f"tezo-ds: stopped by SIGINT; {LEFT}\n"
    assert capfd.readouterr().err == stopped
    run = Run(tmp_path / "run")
    assert (run.summary["status"], run.summary["error"]) == ("interrupted", "stopped by SIGINT")
    assert run.summary["steps"] == len(run.steps) == 3


@pytest.mark.slow
def test_control_c_leaves_whole_files(given: Given, tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    process = start(sys.executable, "-m", "tezo_ds", *given.train(run.path, steps=10**6, lr=1e-7))
    deadline = time.monotonic() + TIMEOUT
    metrics = run.path / METRICS
    while not (metrics.exists() and metrics.read_text().count("\n") > 20):
        assert process.poll() is None, finish(process)
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    code, _, err = finish(process)
    assert code == 130
    assert err == f"tezo-ds: stopped by SIGINT; {LEFT}\n"
    assert {path.name for path in run.path.iterdir()} - {LOG} == FILES
    summary = run.summary
    assert (summary["status"], summary["error"]) == ("interrupted", "stopped by SIGINT")
    assert summary["steps"] == len(run.steps) > 19
    assert [line["step"] for line in run.steps] == list(range(summary["steps"]))
    assert all(bool(part.all()) for part in run.coefficients.values())
    assert_readable_adapter(run.path / ADAPTER)
    assert_readable_picture(run.path / CURVE)
