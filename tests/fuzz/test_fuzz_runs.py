"""Random and damaged run folders: the right result, or one line that names the file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import Given, Run, call
from fuzzing import VALUES, assert_one_line, changed, damaged, examples, outcome
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from tezo_ds.run.about import read_run
from tezo_ds.run.card import model_card
from tezo_ds.run.curve import draw_curve
from tezo_ds.run.folder import COEFFICIENTS, CONFIG, JOURNAL, METRICS, SUMMARY, RunFolder
from tezo_ds.run.results import read_result
from tezo_ds.run.resuming import look

pytest_plugins = ("cli_fixtures",)

PARTS = [CONFIG, METRICS, SUMMARY, COEFFICIENTS]


@pytest.fixture(scope="module")
def others(given: Given, plain: Run, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Trains other runs of the same model: one that draws new factors every few steps, one with ranks of
    its own."""
    folder = tmp_path_factory.mktemp("others")
    runs = [folder / "other", folder / "auto"]
    for run, options in zip(runs, ({"seed": 9, "refresh_every": 2}, {"rank": "auto"}), strict=True):
        assert call(*given.train(run, **options)) == 0
    return [plain.path, *runs]


def copied(run: Path, tmp_path: Path) -> Path:
    shutil.rmtree(tmp_path / "copy", ignore_errors=True)
    return Path(shutil.copytree(run, tmp_path / "copy"))


def looked_at(run: Path, about: dict[str, Any]) -> None:
    """Runs every reader of a run's small files, one after the other."""
    ways: list[Callable[[], Any]] = [
        lambda: read_result(run, read_run(run)[1]),
        lambda: model_card(run, 6, adapter=True),
        lambda: taken(run, about),
    ]
    for way in ways:
        outcome(way, str(run))


def taken(run: Path, about: dict[str, Any]) -> None:
    folder = RunFolder(run)
    try:
        look(folder, None, about)
    finally:
        folder.close()


@examples(70)
@given(st.data())
def test_a_config_with_another_field(
    others: list[Path], tmp_path: Path, data: st.DataObject
) -> None:
    run = data.draw(st.sampled_from(others))
    about = json.loads((run / CONFIG).read_text())
    copy = copied(run, tmp_path)
    (copy / CONFIG).write_text(json.dumps(data.draw(changed(about))))
    looked_at(copy, about)


@examples(70)
@given(st.data())
def test_damaged_parts_of_runs(others: list[Path], tmp_path: Path, data: st.DataObject) -> None:
    run, part = data.draw(st.sampled_from(others)), data.draw(st.sampled_from(PARTS))
    copy = copied(run, tmp_path)
    content = data.draw(damaged((run / part).read_bytes()))
    (copy / part).write_bytes(content)
    if part == SUMMARY:
        (copy / COEFFICIENTS).unlink()  # else nobody reads it
    looked_at(copy, json.loads((run / CONFIG).read_text()))
    if part == COEFFICIENTS:
        config = read_run(copy)[1]
        found = outcome(lambda: read_result(copy, config).coefficients, str(copy))
        whole = load_file(run / part)
        assert found is None or all(torch.equal(found[name], whole[name]) for name in whole)


@examples(50)
@given(st.data())
def test_lines_of_metrics(others: list[Path], tmp_path: Path, data: st.DataObject) -> None:
    score = {"step": 0, "test_accuracy": 0.5, "test_loss": 1.0, "test_examples": 5}
    lines = data.draw(
        st.lists(changed(score) | changed({"step": 0, "loss": 1.0}) | VALUES, max_size=3)
    )
    copy = copied(others[0], tmp_path)
    (copy / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    looked_at(copy, json.loads((copy / CONFIG).read_text()))


def test_a_curve_of_damaged_lines(tmp_path: Path) -> None:
    lines = [{"step": 0, "loss": 1.0}, {"step": 1, "loss": {}}, {"step": 10**400, "loss": 1}]
    lines += [{"step": 2, "test_loss": 1.0}, {"step": 2, "test_loss": 1.0, "test_accuracy": []}]
    (tmp_path / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    draw_curve(tmp_path / METRICS, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size


@pytest.mark.parametrize("part", [*PARTS, JOURNAL])
@pytest.mark.parametrize("what", ["folder", "empty", "gone"])
def test_no_file_at_all(others: list[Path], tmp_path: Path, part: str, what: str) -> None:
    about = json.loads((others[0] / CONFIG).read_text())
    copy = copied(others[0], tmp_path)
    (copy / part).unlink()
    if what == "folder":
        (copy / part).mkdir()
    elif what == "empty":
        (copy / part).touch()
    looked_at(copy, about)


@pytest.mark.parametrize("part", [CONFIG, JOURNAL, COEFFICIENTS])
def test_parts_of_another_run_are_refused(
    given: Given, others: list[Path], tmp_path: Path, part: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Parts of two runs of the same shapes are told apart: together they would give a result of neither."""
    out = tmp_path / "out"
    commands: dict[str, Callable[[Path], list[object]]] = {
        "evaluate": lambda run: ["evaluate", "--run", run],
        "export": lambda run: ["export", "--run", run, "--merged", out],
        "replay": lambda run: ["replay", run, "--coefficients", tmp_path / "a.safetensors"],
        "train": lambda run: given.train(run, steps=8),
    }
    reads = {COEFFICIENTS: ["evaluate", "export"], JOURNAL: ["export", "replay", "train"]}
    for name in reads.get(part, list(commands)):
        copy = copied(others[0], tmp_path)
        shutil.copy(others[1] / part, copy / part)
        capfd.readouterr()
        assert call(*commands[name](copy)) == 2, name
        assert_one_line(capfd.readouterr().err[:-1], str(copy))
        assert not out.exists() and not (tmp_path / "a.safetensors").exists()
