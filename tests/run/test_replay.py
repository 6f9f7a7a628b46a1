"""`tezo-ds replay`: a run's result from its journal alone, to any step, held against the run's digests."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import STEPS, Given, Run, call
from safetensors.torch import load_file

from tezo_ds.run.folder import JOURNAL
from tezo_ds.run.journal import Journal, read_journal

pytest_plugins = ("cli_fixtures",)
pytestmark = pytest.mark.usefixtures("other_kernels")

Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def run(given: Given, tmp_path_factory: pytest.TempPathFactory) -> Run:
    path = tmp_path_factory.mktemp("replayed") / "run"
    options = {"method": "tezo-m", "rank": "auto", "rank_max": 3, "check_every": 2}
    assert call(*given.train(path, **options)) == 0
    return Run(path)


def coefficients(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_every_digest_agrees_and_the_coefficients_are_the_runs(
    run: Run, tmp_path: Path, capfd: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tezo_ds.models.loading.load_model", None)  # no weight is read
    made = tmp_path / "made.safetensors"
    assert call("replay", run.path, "--verify", "--coefficients", made) == 0
    out = capfd.readouterr().out
    assert "3 digests agree" in out and f"replaying {STEPS} steps of {JOURNAL}" in out
    assert same(coefficients(made), run.coefficients)


def test_an_earlier_step_is_a_shorter_run(
    given: Given, run: Run, tmp_path: Path, capfd: Captured
) -> None:
    options = {"method": "tezo-m", "rank": "auto", "rank_max": 3, "save_model": True}
    assert call(*given.train(tmp_path / "short", steps=4, **options)) == 0
    made, merged = tmp_path / "made.safetensors", tmp_path / "merged"
    arguments = ("replay", run.path, "--to-step", 4, "--coefficients", made, "--merged", merged)
    assert call(*arguments) == 0
    assert same(coefficients(made), Run(tmp_path / "short").coefficients)
    for file in merged.glob("*.safetensors"):
        assert same(load_file(file), load_file(tmp_path / "short" / "model" / file.name))
    assert not same(coefficients(made), run.coefficients)


@pytest.mark.parametrize("method", ["tezo-adam", "lozo", "mezo"])
def test_weights_of_methods_that_write_them(
    given: Given, method: str, tmp_path: Path, capfd: Captured
) -> None:
    options = {"method": method, "rank": None if method == "mezo" else 2, "lr": 2e-4, "nu": 2}
    assert call(*given.train(tmp_path / "run", check_every=3, **options)) == 0
    merged = tmp_path / "merged"
    assert call("replay", tmp_path / "run", "--verify", "--merged", merged) == 0
    assert "2 digests agree" in capfd.readouterr().out
    for file in merged.glob("*.safetensors"):
        assert same(load_file(file), load_file(tmp_path / "run" / "model" / file.name))


def refused(capfd: Captured, *arguments: object) -> str:
    capfd.readouterr()
    assert call("replay", *arguments) == 2
    err = capfd.readouterr().err
    assert err.startswith("tezo-ds: error: ") and err.count("\n") == 1
    return err


def test_a_slope_that_was_changed_with_its_checksums_is_found(
    run: Run, tmp_path: Path, capfd: Captured
) -> None:
    """A slope changed along with all checksums is found: whoever writes the whole journal anew cannot make
    its digests."""
    path = tmp_path / "run"
    shutil.copytree(run.path, path)
    found = read_journal(path / JOURNAL)
    assert found.header is not None
    (path / JOURNAL).unlink()
    journal = Journal(path / JOURNAL, {k: v for k, v in found.header.items() if k != "sum"})
    for step in found.steps:
        line: dict[str, Any] = {key: value for key, value in step.items() if key != "sum"}
        if step["step"] == 3:
            line["kappa"] = [value * (1 + 1e-15) for value in line["kappa"]]
        journal.append(line)
    journal.close()
    assert "after step 3 the replay is not what the run had" in refused(capfd, path, "--verify")
    assert call("replay", path, "--verify", "--to-step", 3) == 0


def test_what_cannot_be_done_is_said(
    given: Given, run: Run, plain: Run, tmp_path: Path, capfd: Captured
) -> None:
    assert "nothing to do: add --verify" in refused(capfd, run.path)
    assert "has 6 steps" in refused(capfd, run.path, "--verify", "--to-step", 7)
    assert "has no digest in these 1 steps" in refused(capfd, run.path, "--verify", "--to-step", 1)
    assert "cannot be read" in refused(capfd, tmp_path / "none", "--verify")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert "is not an empty folder" in refused(capfd, run.path, "--merged", tmp_path / "full")
    copied = tmp_path / "copied"
    shutil.copytree(run.path, copied)
    config = json.loads((copied / "config.json").read_text())
    config["settings"]["model"] = str(tmp_path / "no model")
    (copied / "config.json").write_text(json.dumps(config))
    assert "cannot load a model" in refused(capfd, copied, "--verify")
