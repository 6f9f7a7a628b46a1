"""Options of reward functions on the command line: time limits, and leave to run code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import Given, Run, call, flags

pytest_plugins = ("cli_fixtures",)
Captured = pytest.CaptureFixture[str]

SLEEPS = """
import time

def sleeps(completions, **columns):
    for said in completions:
        time.sleep(60)
"""


def test_a_run_ends_with_the_line_of_the_function(
    given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Captured,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    rows = [json.loads(line)["text"] for line in given.data.read_text().splitlines()[:12]]
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"prompt": row}) + "\n" for row in rows)
    )
    (tmp_path / "mine.py").write_text(SLEEPS)
    monkeypatch.chdir(tmp_path)
    common = {
        "model": given.model, "task": "rows.jsonl", "text_field": "prompt", "rank": 2, "steps": 1,
        "batch_size": 2, "max_new_tokens": 2, "max_length": 24, "samples_every": 0, "test_examples": 2,
    }  # fmt: skip
    slow = {**common, "reward": "mine.py:sleeps", "reward_timeout": 0.2, "output": "slow"}
    assert call("train", *flags(slow)) == 2
    err = capfd.readouterr().err
    assert f"reward mine.py:sleeps ({tmp_path}/mine.py:6): did not return within 0.2 s" in err
    code = {**common, "reward": "code", "output": "code"}
    assert call("train", *flags(code)) == 2
    assert "--reward code: runs what a model wrote; add --run-code" in capfd.readouterr().err
    assert call("train", *flags({**code, "run_code": True})) == 0
    assert "--reward code: runs what the model writes, within 3 s" in caplog.text
    assert Run(tmp_path / "code").summary["status"] == "finished"
