"""RANK, LOCAL_RANK and WORLD_SIZE that are empty, or no number."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from command_line import Given, call

from tezo_ds import ConfigError
from tezo_ds.launched import env_local_rank, env_rank, env_world_size

pytest_plugins = ("cli_fixtures",)
READERS = {"RANK": env_rank, "LOCAL_RANK": env_local_rank, "WORLD_SIZE": env_world_size}


@pytest.mark.parametrize("variable", READERS)
def test_empty_is_unset(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(variable, raising=False)
    unset = READERS[variable]()
    for empty in ("", " "):
        monkeypatch.setenv(variable, empty)
        assert READERS[variable]() == unset
    monkeypatch.setenv(variable, " 3 ")
    assert READERS[variable]() == 3


@pytest.mark.parametrize("text", ["two", "1.5", "0x1", "$SLURM_PROCID"])
@pytest.mark.parametrize("variable", READERS)
def test_other_text_is_one_line(
    variable: str, text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(variable, text)
    with pytest.raises(ConfigError, match=variable):
        READERS[variable]()
    capsys.readouterr()
    assert call("export", "--run", "none") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"tezo-ds: error: {variable} is {text!r}") and error.count("\n") == 1


def test_a_run_with_empty_variables(
    given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in READERS:
        monkeypatch.setenv(variable, "")
    assert call(*given.train(tmp_path / "run", steps=1)) == 0
    assert not READERS.keys() & os.environ.keys()
    assert (tmp_path / "run" / "summary.json").is_file()
