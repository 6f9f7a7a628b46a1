"""Terminals and pipes of any encoding: what they lack is replaced, and nothing raises."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
from command_line import Given, Run, call, finish, start

pytest_plugins = ("cli_fixtures",)

PLAIN = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
STREAMS = {"latin-1": "latin-1", "ascii": "ascii", "C": None}


def told(encoding: str | None, *arguments: object) -> tuple[int, str, str]:
    """Runs `tezo-ds ARGUMENTS` and returns its exit code and what it writes: in this process on streams of
    an encoding as PYTHONIOENCODING makes them, or in one of its own in the locale C."""
    if encoding is None:
        return finish(start(sys.executable, "-m", "tezo_ds", *arguments, **PLAIN))
    sinks = io.BytesIO(), io.BytesIO()
    with pytest.MonkeyPatch.context() as patch:
        for name, sink, errors in zip(
            ("stdout", "stderr"), sinks, ("strict", "backslashreplace"), strict=True
        ):
            stream = io.TextIOWrapper(sink, encoding, errors, line_buffering=True)
            patch.setattr(sys, name, stream)
        code = call(*arguments)
        out, err = (sink.getvalue().decode(encoding) for sink in sinks)
    return code, out, err


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.slow
def test_progress_and_help_are_shown(stream: str, given: Given, tmp_path: Path) -> None:
    options = given.train(tmp_path / "run", steps=2, log_every=1)
    code, out, err = told(STREAMS[stream], *options)
    assert code == 0, err
    assert "step 2/2" in out and "|?|" in out and "Traceback" not in err
    assert Run(tmp_path / "run").summary["status"] == "finished"
    code, out, err = told(STREAMS[stream], "train", "--help")
    assert code == 0 and "--momentum" in out, err
