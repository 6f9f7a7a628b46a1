"""Adapters where a model is expected: refused in one line, whether peft is installed or not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from command_line import Given, Run, call

from tezo_ds.intake import adapters
from tezo_ds.intake.adapters import refuse_adapter

pytest_plugins = ("cli_fixtures",)

Captured = pytest.CaptureFixture[str]


def with_adapter(given: Given, plain: Run, folder: Path, beside: bool) -> Given:
    """Makes a model's folder with an adapter in it, or one with an adapter and a tokenizer alone."""
    shutil.copytree(plain.path / "adapter", folder)
    for file in given.model.iterdir():
        if beside or file.name.startswith("tokenizer"):
            shutil.copy(file, folder)
    return Given(folder, given.data)


@pytest.mark.parametrize("beside", [True, False])
def test_commands_refuse_an_adapter(
    beside: bool, given: Given, plain: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: Captured,
) -> None:  # fmt: skip
    odd = with_adapter(given, plain, tmp_path / "odd", beside)
    monkeypatch.setattr("tezo_ds.training.session.load_model", None)  # before that
    told = "an adapter beside the weights" if beside else "is an adapter for "
    for command in (odd.train(tmp_path / "run"), ["evaluate", *odd.task()]):
        capfd.readouterr()
        assert call(*command) == 2
        err = capfd.readouterr().err
        assert told in err and "adapter_config.json" in err and "merge it first" in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["export", "replay"])
def test_an_adapter_that_came_beside_a_runs_base_is_refused(
    command: str, given: Given, plain: Run, tmp_path: Path, capfd: Captured
) -> None:
    shutil.copytree(given.model, tmp_path / "model")
    run = tmp_path / "run"
    assert call(*Given(tmp_path / "model", given.data).train(run, steps=1)) == 0
    shutil.copy(plain.path / "adapter" / "adapter_config.json", tmp_path / "model")
    words = ["--run", run] if command == "export" else [run]
    assert call(command, *words, "--merged", tmp_path / "merged") == 2
    assert "an adapter beside the weights" in capfd.readouterr().err


def test_a_hubs_adapter_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    file = str(tmp_path / "adapter_config.json")
    monkeypatch.setattr(adapters, "find_adapter_config_file", lambda _: file)
    with pytest.raises(adapters.ConfigError, match="owner/lora: is an adapter"):
        refuse_adapter("owner/lora")


def test_models_pass(given: Given) -> None:
    refuse_adapter(str(given.model))
    refuse_adapter("no/such")
    refuse_adapter("no/such/model")
