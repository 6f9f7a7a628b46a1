"""SIGTERM: the step finishes, and files are whole; tests/launch/test_elastic.py has it under real
launchers. Also the end of a launcher's world."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from command_line import Given, Run, assert_stopped, call
from torch import distributed as dist

from tezo_ds import cli
from tezo_ds.run.folder import COEFFICIENTS, RunFolder
from tezo_ds.training.interrupts import Interrupted, turned_into_exceptions

pytest_plugins = ("cli_fixtures",)


def test_one_process_stops_and_leaves_the_last_evaluation(
    given: Given, tmp_path: Path, hearing_again: None, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    log_step = RunFolder.log_step

    def log_and_signal(folder: RunFolder, report: Any, *more: Any) -> None:
        log_step(folder, report, *more)
        if report.step == 2:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(RunFolder, "log_step", log_and_signal)
    assert call(*given.train(tmp_path / "run", save_model=True)) == 0
    run = Run(tmp_path / "run")
    assert run.summary["steps"] == 4  # the next step tells all ranks
    assert_stopped(run, capsys.readouterr().out)
    assert not (run.path / "model").exists() and (run.path / COEFFICIENTS).exists()


def test_term_calls_once_and_int_still_raises(hearing_again: None) -> None:
    calls: list[str] = []
    with (
        pytest.raises(Interrupted, match="SIGINT"),
        turned_into_exceptions(on_term=lambda: calls.append("term")),
    ):
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert calls == ["term"]
        signal.raise_signal(signal.SIGINT)
    assert calls == ["term"]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN  # deaf while it writes


def test_term_raises_where_nothing_is_to_be_called(hearing_again: None) -> None:
    with pytest.raises(Interrupted, match="SIGTERM"), turned_into_exceptions():
        signal.raise_signal(signal.SIGTERM)


def test_a_rank_that_stops_because_others_were_told_is_deaf_too(hearing_again: None) -> None:
    for ending in (False, True):
        with turned_into_exceptions(ending=lambda ending=ending: ending):
            pass
        assert (signal.getsignal(signal.SIGTERM) == signal.SIG_IGN) == ending


@pytest.mark.parametrize(
    ("joined", "code", "left"),
    [((False, True), 0, 1), ((False, True), 2, 0), ((False, False), 0, 0), ((True, True), 0, 0)],
)
def test_a_launchers_world_is_left_after_a_good_end(
    monkeypatch: pytest.MonkeyPatch, joined: tuple[bool, bool], code: int, left: int
) -> None:
    """The world is left if it was joined after main began; a world joined before is not ours to leave."""
    monkeypatch.setenv("RANK", "0")
    with (
        mock.patch.object(cli, "app", lambda: sys.exit(code)),
        mock.patch.object(dist, "is_initialized", side_effect=joined),
        mock.patch.object(dist, "destroy_process_group") as leave,
        pytest.raises(SystemExit) as ended,
    ):
        cli.main()
    assert leave.call_count == left
    assert (ended.type is cli.Left) == (joined == (False, True))
