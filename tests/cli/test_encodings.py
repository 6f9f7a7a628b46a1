"""Terminals and pipes of any encoding: what they lack is replaced, and nothing raises."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from command_line import Given, Run, finish, start

pytest_plugins = ("cli_fixtures",)

PLAIN = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
STREAMS = {
    "latin-1": {"PYTHONIOENCODING": "latin-1"},
    "ascii": {"PYTHONIOENCODING": "ascii:strict"},
    "C": PLAIN,
}


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.slow
def test_progress_and_help_are_shown(stream: str, given: Given, tmp_path: Path) -> None:
    command = (sys.executable, "-m", "tezo_ds")
    options = given.train(tmp_path / "run", steps=2, log_every=1)
    code, out, err = finish(start(*command, *options, **STREAMS[stream]))
    assert code == 0, err
    assert "step 2/2" in out and "|?|" in out and "Traceback" not in err
    assert Run(tmp_path / "run").summary["status"] == "finished"
    code, out, err = finish(start(*command, "train", "--help", **STREAMS[stream]))
    assert code == 0 and "--momentum" in out, err
