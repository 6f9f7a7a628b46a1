"""Templates from a shell, where newlines and tabs are written as escapes."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_fixtures import make_given
from command_line import Run, call, flags

from tezo_ds.cli.options import settings_from, unescaped
from tezo_ds.run.about import read_run
from tezo_ds.settings import Settings


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (r"Q: {text}\nA:", "Q: {text}\nA:"),
        (r"{text}\n\n\tA:", "{text}\n\n\tA:"),
        (r"{text} \\nu is:", r"{text} \nu is:"),
        (r"{text} \\tau is:", r"{text} \tau is:"),
        (r"{text} \alpha \\ \d C:\dir:", r"{text} \alpha \\ \d C:\dir:"),
        ("Q: {text}\nA:", "Q: {text}\nA:"),
        ("{text} It was", "{text} It was"),
    ],
)
def test_escapes_of_a_shell(typed: str, meant: str) -> None:
    assert unescaped(typed) == meant
    given = {"model": "m", "task": "a.jsonl", "template": typed}
    assert settings_from(given, {}).template == meant


def test_templates_from_python_and_of_earlier_runs_are_as_they_stand() -> None:
    raw = r"Q: {text}\nA:"
    assert Settings(model="m", task="a.jsonl", template=raw).template == raw
    before = {"model": "m", "task": "a.jsonl", "template": raw}
    assert settings_from({"template": None}, before).template == raw


def test_a_run_keeps_the_template_that_it_used(tmp_path: Path) -> None:
    given = make_given(tmp_path)
    typed = {"model": given.model, "task": given.data, "template": r"Q: {text}\nA:"}
    more = {"output": tmp_path / "run", "steps": 1, "batch_size": 2, "rank": 2}
    assert call("train", *flags({**typed, **more})) == 0
    assert read_run(tmp_path / "run")[0].template == "Q: {text}\nA:"
    more["steps"] = 2
    assert call("train", *flags({**typed, **more})) == 0  # the same command resumes
    assert Run(tmp_path / "run").summary["steps"] == 2
    assert call("evaluate", "--run", tmp_path / "run") == 0
