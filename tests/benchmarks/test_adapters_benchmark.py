"""The benchmark of adapters' steps, on a toy."""

from __future__ import annotations

import sys

import adapters
import pytest


def test_every_step_is_timed_and_its_tensors_counted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["adapters.py", "--hidden", "128", "--shapes", "2x8", "--queries", "2", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", words)
    adapters.main()
    printed = capsys.readouterr().out
    assert "2x8 tokens, Q = 2" in printed
    for name in (adapters.PLAIN, *adapters.STEPS):
        (row,) = [line for line in printed.splitlines() if line.startswith(f"│ {name} ")]
        ratio, inference = (float(row.split("│")[column]) for column in (5, 8))
        assert ratio > 0 and inference >= 1, row
