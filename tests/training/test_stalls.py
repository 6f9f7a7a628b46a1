"""Steps that solve and move nothing are said once, in a run, over resumes and never for a few."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import Given, call

from tezo_ds.run.folder import JOURNAL
from tezo_ds.run.journal import read_journal
from tezo_ds.training.stalls import WINDOW, Stalls

pytest_plugins = ["cli_fixtures"]

MOVED, STILL = [0.0, 0.1], [-0.0, 0.0]


def said(before: list[list[float]], after: list[list[float]]) -> list[str]:
    watch = Stalls(before)
    return [warning for solved in after if (warning := watch.step(solved))]


def test_a_warning_comes_once_and_not_for_a_few() -> None:
    assert not said([], [STILL] * (WINDOW - 1)), "too few steps to tell"
    assert not said([], [STILL, MOVED, MOVED] * WINDOW)
    (warning,) = said([], [MOVED] * WINDOW + [STILL, MOVED] * WINDOW)
    assert f"{WINDOW // 2} of the last {WINDOW} steps moved nothing" in warning
    assert len(said([STILL] * (WINDOW - 1), [STILL] * 2)) == 1, "over a resume"
    assert not said([STILL] * WINDOW, [STILL] * WINDOW), "said by the process before"


def test_a_run_whose_batch_is_too_small(
    given: Given, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"method": "tezo-gn", "rank": 2, "queries": 16, "rho": 1e-2, "lr": 1.0}
    more = {"objective": "choices", "batch_size": 1, "steps": WINDOW + 5, "test_examples": 2}
    assert call(*given.train(tmp_path / "run", **options, **more)) == 0
    assert capsys.readouterr().out.count("steps moved nothing") == 1
    still = [not any(line["solved"]) for line in read_journal(tmp_path / "run" / JOURNAL).steps]
    assert sum(still) >= WINDOW // 2
