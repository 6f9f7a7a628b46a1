"""The command probe-layers, and runs of `include: auto`: what they say, leave and take up again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from command_line import Given, Run, assert_found_again, call, flags, strict_json
from test_resume import kappas, killed_after, same
from tiny import tiny

import tezo_ds
from tezo_ds.config import TezoConfig
from tezo_ds.errors import ConfigError
from tezo_ds.patterns import matching
from tezo_ds.probing_layers.choice import Candidate
from tezo_ds.run.folder import ADAPTER, CONFIG, LAYERS, LAYERS_PICTURE, SUMMARY
from tezo_ds.training import include_auto, layers_probe
from tezo_ds.training.layers_probe import refuse_unfit

pytest_plugins = ("cli_fixtures",)

Captured = pytest.CaptureFixture[str]
AUTO = {"include": "auto", "objective": "choices", "output_layer": "bias", "check_every": 2}


def probe(given: Given, **options: Any) -> list[str]:
    chosen = {"rank": 4, "seed": 3, "objective": "choices", "examples": 20, **options}
    return ["probe-layers", *given.task(), *flags(chosen)]


def test_it_says_what_it_found(given: Given, tmp_path: Path, capsys: Captured) -> None:
    assert call(*probe(given, columns=4, out=tmp_path / "out")) == 0
    out = capsys.readouterr().out
    assert "output layer: bias to" in out and "probed 100%  eta 0 s" in out
    for word in ("q_proj", "down_proj", "embed_tokens", "last:2", "s / 2 tr H", "±"):
        assert word in out, word
    assert "recommended: --include '" in out or "are too few to tell" in out
    found = strict_json((tmp_path / "out" / LAYERS).read_text())
    assert found["examples"] == 20 and len(found["groups"]) == 15
    assert (tmp_path / "out" / LAYERS_PICTURE).read_bytes()[:4] == b"\x89PNG"


def test_json_is_all_that_is_on_stdout(given: Given, capsys: Captured) -> None:
    assert call(*probe(given, json=True, include="*layers*", together=2)) == 0
    captured = capsys.readouterr()
    found = strict_json(captured.out)
    assert "probed the layers in" in captured.err
    assert [group["layers"] for group in found["groups"]] == ["0-1"] * 7
    every = [name for group in found["groups"] for name in group["names"]]
    for one in found["sets"]:
        assert matching(one["include"], every)
    assert all(group["S"] > 0 and group["S_error"] > 0 for group in found["groups"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"examples": 3}, "examples"),
        ({"include": "*nothing*"}, "matches no matrix"),
        ({"include": "last:9"}, "last:1 to last:2"),
        ({"rho": 1e-30}, "no loss differs at ρ 1e-30"),
        ({"train_examples": 5, "output_layer_examples": 5, "output_layer": "bias"}, None),
    ],
)
def test_what_is_refused_is_said_in_a_line(
    given: Given, options: dict[str, Any], words: str | None, capsys: Captured
) -> None:
    code = call(*probe(given, **options))
    err = capsys.readouterr().err.strip()
    assert code == (0 if words is None else 2)
    if words is not None:
        assert words in err and "Traceback" not in err


def test_auto_stands_alone(given: Given, tmp_path: Path, capsys: Captured) -> None:
    arguments = given.train(tmp_path / "run", **AUTO)
    for more, words in (
        (("--include", "last:1"), "include: auto stands alone"),
        (("--train-vectors",), "include: auto chooses among matrices"),
    ):
        assert call(*arguments, *more) == 2
        assert words in capsys.readouterr().err


def test_methods_without_factors_that_stay_are_refused(
    given: Given, tmp_path: Path, capsys: Captured
) -> None:
    with pytest.raises(ConfigError, match="method mezo has none that stay; use a tezo method"):
        refuse_unfit(TezoConfig(method="mezo"))
    assert call(*given.train(tmp_path / "run", include="auto", method="lozo", rank=None)) == 2
    assert "include: auto is for tezo, not for method lozo" in capsys.readouterr().err


def test_a_loop_of_ones_own_has_no_examples_to_choose_by() -> None:
    with pytest.raises(ConfigError, match="include: auto measures on a task's examples"):
        tezo_ds.initialize(tiny(), {"include": ["auto"]})


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    """The two best kinds of the last band are chosen, as the figures of tiny models are mostly noise."""
    monkeypatch.setattr(layers_probe, "choose", _second)


def _second(sets: Sequence[Candidate]) -> Candidate:
    return sets[1]


@pytest.fixture(scope="module")
def auto(given: Given, tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = tmp_path_factory.mktemp("auto") / "run"
    with mock.patch.object(layers_probe, "choose", _second):
        assert call(*given.train(run, **AUTO)) == 0
    return Run(run)


def test_a_run_trains_what_it_chose(auto: Run, capsys: Captured) -> None:
    found = strict_json((auto.path / LAYERS).read_text())["recommended"]
    chosen = set(auto.config["ranks"])
    assert chosen == set(auto.coefficients) and len(chosen) == 2
    assert matching(found["include"], [*chosen]) == chosen
    assert (auto.path / LAYERS_PICTURE).exists() and auto.config["tezo"]["include"] == ["auto"]
    assert auto.summary["output_layer"]["examples"] > 0  # fitted once, before the choice
    assert "accuracy_output_layer" in auto.summary


def test_evaluate_export_and_replay_take_what_was_chosen(
    auto: Run, tmp_path: Path, capsys: Captured
) -> None:
    with mock.patch.object(layers_probe, "measure", side_effect=AssertionError("measured again")):
        assert_found_again(auto, capsys, 1e-6)
        assert call("export", "--run", auto.path, "--adapter", tmp_path / "adapter") == 0
        assert call("replay", auto.path, "--verify") == 0
    assert (auto.path / ADAPTER).exists() and (tmp_path / "adapter").exists()


@pytest.mark.usefixtures("late")
def test_a_run_that_was_killed_goes_on_with_its_choice(
    given: Given, auto: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Captured
) -> None:
    arguments = given.train(tmp_path / "run", **AUTO)
    killed_after(3, arguments, monkeypatch)
    assert not (tmp_path / "run" / SUMMARY).exists()
    capfd.readouterr()
    with mock.patch.object(include_auto, "probe_layers", side_effect=AssertionError("again")):
        assert call(*arguments) == 0
    assert "goes on after 3 steps" in capfd.readouterr().out
    assert kappas(tmp_path / "run") == kappas(auto.path) and same(tmp_path / "run", auto.path)
    assert Run(tmp_path / "run").config["ranks"] == auto.config["ranks"]


@pytest.mark.usefixtures("late")
def test_a_choice_that_was_changed_is_another_run(
    given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Captured
) -> None:
    arguments = given.train(tmp_path / "run", **AUTO)
    killed_after(2, arguments, monkeypatch)
    config = Run(tmp_path / "run").config
    config["ranks"].popitem()
    (tmp_path / "run" / CONFIG).write_text(json.dumps(config))
    assert call(*arguments) == 2
    assert "ranks" in capfd.readouterr().err


@pytest.mark.usefixtures("late")
@pytest.mark.parametrize(
    "more", [{"rank": "auto", "rank_max": 3, "rho": "auto"}, {"output_layer": None}]
)
def test_it_goes_with_other_choices(given: Given, tmp_path: Path, more: dict[str, Any]) -> None:
    arguments = given.train(tmp_path / "run", **{**AUTO, **more})
    assert call(*arguments) == 0
    run = Run(tmp_path / "run")
    assert {name: len(a) for name, a in run.coefficients.items()} == run.config["ranks"]


@pytest.mark.usefixtures("late")
def test_a_cache_keeps_what_comes_before_the_choice(given: Given, tmp_path: Path) -> None:
    """ρ is chosen where all may train, which has no trunk; what is chosen has one."""
    assert call(*given.train(tmp_path / "run", **AUTO, trunk_cache="memory", rho="auto")) == 0
    assert all(".1." in name for name in Run(tmp_path / "run").coefficients)


def test_where_all_is_lost_in_noise_everything_trains(
    given: Given, tmp_path: Path, capsys: Captured
) -> None:
    with mock.patch.object(layers_probe, "choose", return_value=None):
        assert call(*given.train(tmp_path / "run", **AUTO)) == 0
    out = capsys.readouterr().out
    assert "warning: include auto: no set of matrices is foreseen" in out
    assert "too few to tell; all 15 matrices train" in out
    assert len(Run(tmp_path / "run").config["ranks"]) == 15
    assert strict_json((tmp_path / "run" / LAYERS).read_text())["recommended"] is None
