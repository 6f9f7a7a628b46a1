"""The picture of a run: whatever matplotlib makes of a user's settings, the run keeps its results."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from command_line import Given, Run, call, finish, start

from tezo_ds.run.folder import ADAPTER, COEFFICIENTS, CURVE
from tezo_ds.training import loop

pytest_plugins = ("cli_fixtures",)


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "nonsense"])
@pytest.mark.slow
def test_a_notebooks_backend_does_not_fail_a_run(
    backend: str, given: Given, tmp_path: Path
) -> None:
    options = given.train(tmp_path / "run", steps=2)
    code, out, err = finish(start(sys.executable, "-m", "tezo_ds", *options, MPLBACKEND=backend))
    assert code == 0 and "Traceback" not in err, err
    run = Run(tmp_path / "run")
    assert run.summary["status"] == "finished" and run.coefficients
    assert (run.path / CURVE).exists() and "no curve.png" not in out


@pytest.mark.parametrize("failing", ["draw_curve", "save_adapter"])
def test_what_fails_after_the_last_step_leaves_the_rest(
    failing: str, given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def fail(*_: Any) -> None:
        raise RuntimeError("of a library")

    monkeypatch.setattr(loop, failing, fail)
    assert call(*given.train(tmp_path / "run", steps=2)) == 0
    assert "of a library" in capsys.readouterr().out
    run = Run(tmp_path / "run")
    assert run.summary["status"] == "finished" and (run.path / COEFFICIENTS).exists()
    assert (run.path / ADAPTER).exists() == (failing == "draw_curve")
    assert (run.path / CURVE).exists() == (failing == "save_adapter")
