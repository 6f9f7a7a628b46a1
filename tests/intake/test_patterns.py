"""Include and exclude as users write them: comma lists and bare names get an answer with globs."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from command_line import Given, call
from tiny import tiny

import tezo_ds

pytest_plugins = ("cli_fixtures",)


@pytest.mark.parametrize(
    ("include", "globs"),
    [
        (("q_proj,v_proj",), "--include '*q_proj*' --include '*v_proj*'"),
        (("q_proj, v_proj",), "--include '*q_proj*' --include '*v_proj*'"),
        (("q_proj",), "--include '*q_proj*'"),
        (("*q_proj",), "--include '*q_proj*'"),
        (("q_proj", "v_proj"), "--include '*q_proj*' --include '*v_proj*'"),
        (("['q_proj']", "layers.0"), "--include '*q_proj*' --include '*layers.0*'"),
    ],
)
def test_include_that_matches_nothing(include: tuple[str, ...], globs: str) -> None:
    with pytest.raises(tezo_ds.ConfigError) as caught:
        tezo_ds.initialize(tiny(), {"rank": 2, "include": include})
    assert f"use {globs} (in" in str(caught.value) and "\n" not in str(caught.value)
    answer = [word.strip("'") for word in globs.split() if "*" in word]
    assert tezo_ds.initialize(tiny(), {"rank": 2, "include": answer}).selection.matrices


def test_words_of_no_name_stay_as_they_were() -> None:
    with pytest.raises(tezo_ds.ConfigError, match="no parameter trains"):
        tezo_ds.initialize(tiny(), {"rank": 2, "include": ["attention_of_bert"]})


@pytest.mark.parametrize(
    ("field", "patterns"),
    [("include", ("*v_proj*", "q_proj")), ("exclude", ("embed_tokens",)), ("exclude", ("q_proj,o",))],
)  # fmt: skip
def test_where_others_match_it_is_a_notice(
    field: str, patterns: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "tezo_ds"):
        tezo_ds.initialize(tiny(), {"rank": 2, field: patterns})
    (said,) = [r.getMessage() for r in caplog.records if "a glob of a whole name" in r.getMessage()]
    assert said.startswith(f"{field}: {patterns[-1]!r} matches no parameter")


@pytest.mark.parametrize("exclude", [("*embed*",), ("nothing_here",), ()])
def test_patterns_that_are_fine_are_not_spoken_of(
    exclude: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    tezo_ds.initialize(tiny(), {"rank": 2, "include": ["*proj*"], "exclude": exclude})
    assert "a glob of a whole name" not in caplog.text


def test_on_the_command_line(
    given: Given, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = given.train(tmp_path / "run", include="q_proj,v_proj")
    capsys.readouterr()
    assert call(*arguments) == 2
    error = capsys.readouterr().err
    assert (
        "--include '*q_proj*' --include '*v_proj*'" in error and error.count("tezo-ds: error") == 1
    )
