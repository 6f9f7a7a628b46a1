"""A checkpoint in float64: its run is read again by every command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from command_line import Given, Run, call
from safetensors.torch import load_file

from tezo_ds.run.folder import MODEL

pytest_plugins = ("cli_fixtures",)


@pytest.fixture
def wide(given: Given, tmp_path: Path) -> Given:
    shutil.copytree(given.model, tmp_path / "wide")
    model = transformers.AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float64)
    model.save_pretrained(tmp_path / "wide")
    return Given(tmp_path / "wide", given.data)


@pytest.mark.parametrize("method", ["tezo", "tezo-adam", "mezo", "lozo"])
def test_a_run_in_float64(
    wide: Given, tmp_path: Path, capfd: pytest.CaptureFixture[str], method: str
) -> None:
    run, options = Run(tmp_path / "run"), {"method": method, "check_every": 2}
    assert call(*wide.train(run.path, **options)) == 0
    assert run.config["weights_dtype"] == run.config["factors_dtype"] == "float64"
    capfd.readouterr()
    assert call("evaluate", "--run", run.path) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["loss"] == pytest.approx(run.summary["test_loss_after"], rel=1e-12)
    assert call("replay", run.path, "--verify") == 0
    assert call("export", "--run", run.path, "--merged", tmp_path / "merged") == 0
    for folder in [tmp_path / "merged"] + [run.path / MODEL] * (method != "tezo"):
        parts = [load_file(path) for path in folder.glob("*.safetensors")]
        assert {t.dtype for part in parts for t in part.values()} == {torch.float64}
    assert call(*wide.train(run.path, **options, steps=8)) == 0, capfd.readouterr().err
    assert run.summary["steps"] == 8


def test_float64_is_a_dtype_to_ask_for(given: Given, plain: Run, tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    assert call(*given.train(run.path, dtype="float64")) == 0
    assert run.config["weights_dtype"] == "float64"
    ours, theirs = run.steps[0]["loss"], plain.steps[0]["loss"]
    assert ours == pytest.approx(theirs, rel=1e-5)
