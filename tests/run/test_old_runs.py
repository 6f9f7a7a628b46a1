"""Run folders made by the code before it was put into rooms: all commands go on reading them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from command_line import Run, call
from safetensors.torch import load_file

OLD = Path(__file__).resolve().parents[1] / "data" / "runs-ec95d1f"
METHODS = [
    "tezo", "tezo-m", "tezo-adam", "tezo-adam-coef", "lozo", "lozo-m", "mezo", "mezo-m", "mezo-adam"
]  # fmt: skip


@pytest.fixture(params=METHODS)
def old(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A copy of a run's folder, where the paths in its config.json hold."""
    for name in ("model", request.param):
        shutil.copytree(OLD / name, tmp_path / name)
    shutil.copy(OLD / "films.jsonl", tmp_path)
    monkeypatch.chdir(tmp_path)
    return Run(tmp_path / request.param)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def test_commands_read_what_older_code_wrote(old: Run) -> None:
    assert call("replay", old.path, "--verify", "--merged", "replayed") == 0
    assert call("export", "--run", old.path, "--merged", "exported") == 0
    assert call("evaluate", "--run", old.path) == 0
    replayed, exported = weights(Path("replayed")), weights(Path("exported"))
    assert replayed.keys() == exported.keys()
    for name, weight in replayed.items():
        assert torch.equal(weight, exported[name]), name
    base = weights(Path("model"))
    assert any(not torch.equal(weight, base[name]) for name, weight in exported.items())
    for name, weight in weights(
        old.path / "model"
    ).items():  # as merged then, maybe by another maker's
        torch.testing.assert_close(exported[name], weight, rtol=1e-6, atol=1e-7)  # products


def test_runs_of_older_code_go_on(old: Run) -> None:
    before = (old.path / "journal.jsonl").read_text()
    options = json.loads((old.path / "config.json").read_text())
    block, settings = options["tezo"], options["settings"]
    words = json.dumps(settings["verbalizers"])
    given = ["--model", "model", "--task", "films.jsonl", "--template", settings["template"],
             "--verbalizers", words, "--test-fraction", settings["test_fraction"], "--batch-size", 4,
             "--check-every", 2, "--snapshot-every", 2, "--snapshots", 1]  # fmt: skip
    given += [f"--{name}={block[name]}" for name in ("method", "seed", "rank", "lr", "nu")]
    for pattern in block["include"]:
        given += ["--include", pattern]
    assert call("train", *given, "--output", old.path, "--steps", 7, "--resume") == 0
    after = (old.path / "journal.jsonl").read_text()
    assert after.startswith(before)
    assert old.summary["steps"] == 7 and len(old.steps) == 7
    assert call("replay", old.path, "--verify") == 0
