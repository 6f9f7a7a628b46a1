"""Weights under a run that changed though their name did not: refused wherever they would be used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from command_line import Given, call
from transformers import AutoModelForCausalLM

from tezo_ds.run.folder import CONFIG

pytest_plugins = ("cli_fixtures",)

OTHER = "are not those that the run began with"
Captured = pytest.CaptureFixture[str]


@pytest.fixture
def linked(given: Given, tmp_path: Path) -> Given:
    """A model that is a link."""
    (tmp_path / "current").symlink_to(given.model)
    return Given(tmp_path / "current", given.data)


def move(linked: Given, given: Given) -> None:
    """Lets the link point to a copy of the model with other weights."""
    other = linked.model.with_name("other")
    model = AutoModelForCausalLM.from_pretrained(given.model)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.01)
    for file in given.model.iterdir():
        (other.mkdir(exist_ok=True), (other / file.name).write_bytes(file.read_bytes()))
    model.save_pretrained(other)
    linked.model.unlink()
    linked.model.symlink_to(other)


def test_a_run_does_not_go_on_over_other_weights(
    given: Given, linked: Given, tmp_path: Path, capfd: Captured
) -> None:
    run = tmp_path / "run"
    assert call(*linked.train(run, steps=2)) == 0
    assert call(*linked.train(run, steps=3)) == 0, "the same weights"
    move(linked, given)
    before = (run / "journal.jsonl").read_bytes()
    assert call(*linked.train(run, steps=4)) == 2
    err = capfd.readouterr().err
    assert f"the weights in {linked.model} {OTHER}" in err
    assert (run / "journal.jsonl").read_bytes() == before
    config = json.loads((run / CONFIG).read_text())
    del config["weights"]  # as of older code
    (run / CONFIG).write_text(json.dumps(config))
    assert call(*linked.train(run, steps=4)) == 0


@pytest.mark.parametrize("method", ["tezo", "mezo"])
def test_results_over_other_weights_are_refused(
    method: str, given: Given, linked: Given, tmp_path: Path, capfd: Captured
) -> None:
    run = tmp_path / "run"
    rank = {"rank": None} if method == "mezo" else {}
    assert call(*linked.train(run, method=method, steps=2, save_model=False, **rank)) == 0
    move(linked, given)
    commands: list[tuple[object, ...]] = [
        ("evaluate", "--run", run),
        ("export", "--run", run, "--merged", tmp_path / "merged"),
        ("replay", run, "--merged", tmp_path / "merged"),
    ]
    for command in commands:
        capfd.readouterr()
        assert call(*command) == 2, command
        assert OTHER in capfd.readouterr().err
    assert not (tmp_path / "merged").exists()
    assert call("evaluate", "--run", run, "--model", linked.model) == 0, "asked for by name"


def test_other_test_examples_are_refused(given: Given, tmp_path: Path, capfd: Captured) -> None:
    tests, run = tmp_path / "tests.jsonl", tmp_path / "run"
    tests.write_text(given.data.read_text().replace("film", "play"))
    options = {"test_data": tests}
    assert call(*given.train(run, steps=2, **options)) == 0
    assert call(*given.train(run, steps=3, **options)) == 0
    assert "3, of them 1 now, in" in capfd.readouterr().out
    tests.write_text(tests.read_text().replace("play 1 ", "song 1 "))
    assert call(*given.train(run, steps=4, **options)) == 2
    assert f"the test examples in {tests} {OTHER}" in capfd.readouterr().err


@pytest.mark.parametrize("name", ["config.json", "model", "summary.json", "samples.jsonl"])
def test_a_run_does_not_replace_what_is_no_runs(
    name: str, given: Given, tmp_path: Path, capfd: Captured
) -> None:
    """Hazard: a model's own folder as --output."""
    folder = tmp_path / "mine"
    (folder / "model").mkdir(parents=True) if name == "model" else folder.mkdir()
    file = folder / name / "weights" if name == "model" else folder / name
    file.write_text("{}")
    assert call(*given.train(folder, steps=1)) == 2
    assert f"{folder / name} is no run's" in capfd.readouterr().err
    assert file.read_text() == "{}"


def test_other_files_beside_a_run_are_said_to_stay(
    given: Given, tmp_path: Path, capfd: Captured
) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    assert call(*given.train(tmp_path, steps=1)) == 0
    assert "holds 1 other files or folders, e.g. notes.txt; they stay" in capfd.readouterr().out
    assert (tmp_path / "notes.txt").read_text() == "mine"
