"""Runs whose examples lie one after another in a row, without padding."""

from __future__ import annotations

from pathlib import Path

import pytest
from architectures import save
from cli_fixtures import with_ragged_films
from command_line import Given, Run, assert_near, call
from test_resume import killed_after, same

pytest_plugins = ("cli_fixtures",)
Captured = pytest.CaptureFixture[str]


@pytest.mark.parametrize(
    "options",
    [
        {"objective": "choices", "output_layer": "fit", "lr": 1e-5},
        {"include": "last:1", "queries": 3},
        {"method": "tezo-gn", "objective": "choices"},
        {"probe": "inplace"},
    ],
)
def test_a_run_learns_what_it_learns_of_padded_rows(
    given: Given, options: dict[str, object], tmp_path: Path
) -> None:
    films = with_ragged_films(given, tmp_path / "films.jsonl")
    padded, flat = Run(tmp_path / "padded"), Run(tmp_path / "flat")
    assert call(*films.train(padded.path, **options)) == 0
    assert call(*films.train(flat.path, padding_free=True, **options)) == 0
    assert padded.summary["padding_share"] > 0.1 and flat.summary["padding_share"] == 0
    assert [line["loss"] for line in flat.steps] == pytest.approx(
        [line["loss"] for line in padded.steps], rel=1e-4
    )
    assert_near(flat, padded)


def test_a_killed_run_goes_on_to_the_same_bits(
    given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    films, whole, run = (
        with_ragged_films(given, tmp_path / "films.jsonl"),
        tmp_path / "whole",
        tmp_path / "run",
    )
    assert call(*films.train(whole, padding_free=True)) == 0
    killed_after(3, films.train(run, padding_free=True), monkeypatch)
    assert call(*films.train(run, padding_free=True)) == 0
    assert same(run, whole)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"include": "last:1", "trunk_cache": "memory"}, "trunk_cache"),
        ({"micro_batch": 2}, "micro_batch"),
        ({"placement": "per_example"}, "placement per_example"),
        ({"reward": "exact"}, "--reward"),
    ],
)
def test_what_needs_a_row_for_each_example_is_refused(
    given: Given, options: dict[str, object], named: str, tmp_path: Path, capfd: Captured
) -> None:
    assert call(*given.train(tmp_path / "run", padding_free=True, **options)) == 2
    error = capfd.readouterr().err
    assert f"--padding-free: a row holds several examples, and {named} needs a row" in error


def test_other_kinds_of_models_are_refused(given: Given, tmp_path: Path, capfd: Captured) -> None:
    masked = Given(save(tmp_path / "model", "BertForMaskedLM", ["film It was"]), given.data)
    assert call(*masked.train(tmp_path / "run", padding_free=True)) == 2
    assert "--padding-free: is for causal models" in capfd.readouterr().err


def test_attention_is_as_asked(
    given: Given, tmp_path: Path, capfd: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama import modeling_llama

    asked = []
    get = modeling_llama.ALL_ATTENTION_FUNCTIONS.get_interface

    def noting(name: str, *rest: object) -> object:
        asked.append(name)
        return get(name, *rest)

    monkeypatch.setattr(modeling_llama.ALL_ATTENTION_FUNCTIONS, "get_interface", noting)
    run = tmp_path / "run"
    assert call(*given.train(run, attn_implementation="eager")) == 0
    assert set(asked) == {"eager"}
    asked.clear()
    assert call("evaluate", "--run", run) == 0  # as its config.json says
    assert set(asked) == {"eager"}
    assert call(*given.train(tmp_path / "none", attn_implementation="fast")) == 2
    error = capfd.readouterr().err
    assert "fast" in error and len([x for x in error.splitlines() if "error:" in x]) == 1
