"""Runs whose rows stay on disk: bit for bit those in memory, and little memory of their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import streamed_memory
from cli_fixtures import with_ragged_films
from command_line import TEMPLATE, TIMEOUT, WORDS, Given, Run, call
from fault_runs import server
from test_resume import kappas, killed_after, same

from tezo_ds.tasks import load_task

pytest_plugins = ("cli_fixtures",)
Captured = pytest.CaptureFixture[str]
MEGABYTES = 60


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keeps what `datasets` caches in the test's folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


@pytest.mark.parametrize(
    "options",
    [
        {"eval_every": 4, "validation_examples": 5, "keep": "best"},
        {"objective": "choices", "output_layer": "fit", "eval_every": 3, "method": "tezo-m"},
    ],
)
def test_steps_are_those_without_streaming(
    given: Given, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: Captured,
) -> None:  # fmt: skip
    plain, run = tmp_path / "plain", tmp_path / "run"
    films = with_ragged_films(given, tmp_path / "films.jsonl")
    assert call(*films.train(plain, **options)) == 0
    arguments = films.train(run, streaming=True, **options)
    killed_after(3, arguments, monkeypatch)
    capfd.readouterr()
    assert call(*arguments) == 0
    assert "streaming: examples are tokenised when a step takes them" in capfd.readouterr().out
    assert kappas(run) == kappas(plain) and same(run, plain)
    left = ("seconds", "seconds_training", "output_layer")
    found, expected = Run(run).summary, Run(plain).summary
    assert expected["padding_share"] > 0.1
    assert {k: v for k, v in found.items() if k not in left} == {
        k: v for k, v in expected.items() if k not in left
    }
    assert call("evaluate", "--run", run) == 0
    assert json.loads(capfd.readouterr().out)["accuracy"] == expected["accuracy_after"]


def test_other_rows_and_other_ways_are_another_run(
    given: Given, tmp_path: Path, capfd: Captured
) -> None:
    data, run = tmp_path / "films.jsonl", tmp_path / "run"
    data.write_text(given.data.read_text())
    films = Given(given.model, data)
    assert call(*films.train(run, steps=2, streaming=True)) == 0
    assert call(*films.train(run, steps=3)) == 2
    assert "holds a run of streaming True, not False" in capfd.readouterr().err
    rows = data.read_text().splitlines()
    train = load_task(str(data), template=TEMPLATE, verbalizers=WORDS, test_fraction=0.4).train
    last = next(i for i, row in enumerate(rows) if json.loads(row)["text"] in train[-1].prompt)
    assert '"good"' not in rows[last] and len(train) > 16, "no label of those looked at as tokens"
    rows[last] = json.dumps({**json.loads(rows[last]), "label": "good"})
    data.write_text("\n".join(rows))
    assert call(*films.train(run, steps=3, streaming=True)) == 2
    assert "are not those that the run began with" in capfd.readouterr().err


def test_what_is_cut_is_said_in_the_end(given: Given, tmp_path: Path, capfd: Captured) -> None:
    few = {"max_length": 6, "steps": 2, "batch_size": 3}
    assert call(*given.train(tmp_path / "run", streaming=True, **few)) == 0
    assert Run(tmp_path / "run").summary["cut_prompts"] == 6
    assert "6 prompts, 0 answers; see --max-length" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"group_by_length": True}, "--group-by-length: needs all lengths before the first step"),
        ({"trunk_cache": "memory"}, "--streaming: trunk_cache keeps hidden states, far more than"),
        ({"shots": 2}, "shots chooses among the examples of a label; leave it or streaming out"),
    ],
)
def test_what_does_not_go_together(
    given: Given, options: dict[str, Any], words: str, tmp_path: Path, capfd: Captured
) -> None:
    assert call(*given.train(tmp_path / "run", streaming=True, **options)) == 2
    assert words in capfd.readouterr().err


@pytest.mark.launches
def test_a_large_file_takes_little_memory(given: Given, tmp_path: Path, cache: Path) -> None:
    data, size = tmp_path / "large.jsonl", 6000
    with data.open("w") as file:
        for number in range(MEGABYTES * 10**6 // size):
            file.write(json.dumps({"text": f"film {number} " + "x" * (size - 40)}) + "\n")
    assert data.stat().st_size > 0.99 * MEGABYTES * 10**6
    arguments = [
        "train", "--model", given.model, "--task", data, "--output", tmp_path / "run", "--steps", "2",
        "--batch-size", "2", "--max-length", "64", "--test-examples", "2", "--rank", "2", "--streaming",
    ]  # fmt: skip
    words, found = [str(word) for word in arguments], tmp_path / "found.json"
    process = server().Process(target=streamed_memory.measure, args=(words, cache, found))
    process.start()
    process.join(TIMEOUT)
    process.kill()
    measured = json.loads(found.read_text())
    assert measured["code"] in (0, None), (tmp_path / "out").read_text()
    print(f"{measured['bytes'] / 10**6:.0f} MB for rows of {MEGABYTES} MB")
    # In memory the rows alone take twice their size, and their token ids many times that.
    assert measured["bytes"] < MEGABYTES * 10**6
