"""The benchmark of late layers' accuracy at equal processor seconds, at toy size."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trunk_accuracy
from deep import deep
from parts.methods.data import read_splits
from parts.methods.training import Settings, Weights
from task_files import WORDS, reviews, write
from tiny_tokenizer import save_tiny_llama
from trunk_accuracy import LateTrainer, Way, rates_of, ways_of

import tezo_ds

TASK = "rotten-tomatoes"
LAYERS = 4
WAYS = ["all", "2", "1", "1-cached"]
NAMES = ["all", "last 2", "last 1", "last 1, cached"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Makes a folder with a tiny model of four layers, its tokenizer, and reviews split in three."""
    made = tmp_path_factory.mktemp("benchmark")
    rows = reviews(60)
    (made / TASK).mkdir()
    for name, part in (("train", slice(0, 40)), ("valid", slice(40, 48)), ("test", slice(48, 60))):
        write(made / TASK / f"{name}.jsonl", rows[part])
    texts = [f"{row['text']} It was {word}" for row in rows for word in WORDS.values()]
    save_tiny_llama(made / "model", texts, num_hidden_layers=LAYERS)
    return made


class Clock:
    """Clock by which each step takes a second."""

    def __init__(self) -> None:
        self.readings = 0

    def process_time(self) -> float:
        """Returns 0, 1, 1, 2, 2, …"""
        self.readings += 1
        return float(self.readings // 2)


@pytest.fixture
def words(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Makes the command line of few short runs, on data that is there."""
    monkeypatch.setattr(
        trunk_accuracy, "load_splits", lambda task, cache, *n: read_splits(task, cache / task, *n)
    )
    clock = SimpleNamespace(process_time=Clock().process_time, time=lambda: 0.0)
    monkeypatch.setattr(trunk_accuracy, "time", clock)
    given = ["--tasks", TASK, "--ways", *WAYS, "--layers", str(LAYERS), "--budget", "2"]
    given += ["--seeds", "2", "--rates", "2", "--batch-size", "3", "--train-examples", "3"]
    given += ["--valid-examples", "6", "--test-examples", "8", "--dtype", "float32"]
    given += ["--model", str(folder / "model"), "--cache", str(folder)]
    return [*given, "--out", str(tmp_path / "runs.jsonl")]


def test_runs_are_kept_and_go_on(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trunk_accuracy.main([*words, "--seeds", "1"])
    kept = (tmp_path / "runs.jsonl").read_text()
    lines = [json.loads(line) for line in kept.splitlines()]
    expected = [("tune", 0, name) for _ in range(2) for name in NAMES]
    expected += [("final", 1, name) for name in NAMES]
    assert [(line["role"], line["seed"], line["way"]) for line in lines] == expected
    assert {line["steps"] for line in lines} == {2} and {line["seconds"] for line in lines} == {2.0}
    assert {line["n"] for line in lines} == {6, 8}
    for name in NAMES:
        best = min((r for r in lines[:8] if r["way"] == name), key=lambda r: r["loss"])
        assert next(r for r in lines[8:] if r["way"] == name)["lr"] == best["lr"]
    (tmp_path / "runs.jsonl").write_text(kept + '{"cut": ')
    trunk_accuracy.main(words)
    assert (tmp_path / "runs.jsonl").read_text().startswith(kept)
    lines = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert [(line["seed"], line["way"]) for line in lines[12:]] == [(2, name) for name in NAMES]
    capsys.readouterr()
    trunk_accuracy.main([*words, "--report"])
    printed = capsys.readouterr().out
    cells = [
        [c.strip() for c in row.split("│")[1:-1]] for row in printed.splitlines() if "│" in row
    ]
    for name, row in zip(NAMES, cells, strict=True):
        mean = sum(r["accuracy"] for r in lines[8:] if r["way"] == name) / 2
        assert row[0] == name and row[2] == f"{100 * mean:.1f}" and row[7:] == ["2", "2", "2.0"]
    assert cells[0][6] == "" and all(" ± " in row[6] for row in cells[1:])


def test_the_cached_way_learns_what_the_shared_one_does(folder: Path) -> None:
    """Cached and shared steps are the same steps: only their number in a budget differs."""
    settings = Settings(2.0, 3, 3, 6, 8, include=("*v_proj*",))
    splits = read_splits(TASK, folder / TASK, 6, 8)
    tokenizer = trunk_accuracy.AutoTokenizer.from_pretrained(folder / "model")
    model = trunk_accuracy.AutoModelForCausalLM.from_pretrained(folder / "model")
    trainer = LateTrainer(model, tokenizer, splits, settings, Weights(model))
    found = []
    with pytest.MonkeyPatch.context() as patch:
        for way in (Way(1), Way(1, cached=True), Way(2)):
            patch.setattr(trunk_accuracy, "time", Clock())
            found.append(trainer.train("tezo-adam-coef", way, 1e-1, 1, "final").loss)
    assert found[0] == pytest.approx(found[1], rel=1e-5) and found[0] != pytest.approx(found[2])


def test_ways_freeze_early_layers() -> None:
    ways = ways_of(WAYS)
    assert [way.name for way in ways] == NAMES
    for way, late in zip(ways, (4, 2, 1, 1), strict=True):
        fields: dict[str, Any] = {"rank": 2, "include": ["*v_proj*"], **way.fields(LAYERS)}
        names = [m.name for m in tezo_ds.initialize(deep(), fields).space.matrices]
        assert [int(name.split(".")[2]) for name in names] == list(range(LAYERS - late, LAYERS))


def test_rates_grow_with_the_root_of_fewer_layers() -> None:
    everything = rates_of("tezo-adam-coef", Way(), 30, 3)
    assert everything == pytest.approx([3.2e-4, 1e-3, 3.2e-3], rel=0.02)
    late = rates_of("tezo-adam-coef", Way(6), 30, 3)
    assert late == pytest.approx([rate * math.sqrt(5) for rate in everything], rel=0.03)
