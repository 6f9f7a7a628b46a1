"""Runs of `tezo-ds train --reward`: what they leave, how they go on, and what a function can do to them."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from command_line import Run, call
from safetensors.torch import load_file
from tiny_tokenizer import save_tiny_llama, with_chat_template

from tezo_ds.run.folder import (
    COEFFICIENTS,
    CURVE,
    JOURNAL,
    METRICS,
    REPORT,
    SAMPLES,
    SUMMARY,
    RunFolder,
)
from tezo_ds.run.journal import read_journal
from tezo_ds.training.display import _gained
from tezo_ds.training.ties import MANY, Ties
from tezo_ds.training.trackers import _past

FUNCTIONS = """
def by_level(prompts, completions, level, **columns):
    assert all(p.startswith("what is") for p in prompts) and set(columns) == {"answer", "question"}
    return [sum(map(ord, said)) % (5 + number) / 7 for said, number in zip(completions, level)]

def broken(completions, calls=[]):
    calls.append(1)
    for said in completions:
        assert len(calls) != 3, "too hard"
    return [len(said) / 3 for said in completions]

def lacking(completions, missing):
    return missing

def constant(completions, **_):
    return [0.5 for _ in completions]
"""
STEPS = 6
OPTIONS = {
    "template": "{question} is", "label_field": "answer", "max_new_tokens": 4, "steps": STEPS,
    "batch_size": 3, "queries": 3, "rho": 0.05, "lr": 2e-3, "rank": 4, "seed": 3, "shape": "zscore",
    "samples_every": 2, "check_every": 2, "snapshot_every": 0, "test_examples": 5, "log_every": 2,
}  # fmt: skip


class Asked:
    """A model, data and functions, and the arguments of a run on them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        rows = [
            {"question": f"what is {a} plus {b}", "answer": str(a + b), "level": a}
            for a in range(5)
            for b in range(5)
        ]
        (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "judges.py").write_text(FUNCTIONS)
        save_tiny_llama(folder / "model", [row["question"] for row in rows])

    def train(self, name: str, function: str = "by_level", **more: Any) -> list[str]:
        given = {
            "model": self.folder / "model", "task": self.folder / "sums.jsonl", **OPTIONS,
            "reward": f"{self.folder / 'judges.py'}:{function}", "output": self.folder / name, **more,
        }  # fmt: skip
        words = ["train"]
        for key, value in given.items():
            for one in value if isinstance(value, tuple) else (value,):
                words += [f"--{key.replace('_', '-')}", str(one)] if one is not None else []
        return words


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Asked:
    return Asked(tmp_path_factory.mktemp("rewards"))


@pytest.fixture(scope="module")
def run(asked: Asked) -> Run:
    """A finished run, with its picture."""
    assert call(*asked.train("plain"), drawn=True) == 0
    return Run(asked.folder / "plain")


@pytest.fixture(autouse=True)
def quiet(capsys: pytest.CaptureFixture[str]) -> Iterator[None]:
    yield


def coefficients(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / COEFFICIENTS)


def test_what_a_run_leaves(run: Run) -> None:
    lines = read_journal(run.path / JOURNAL).steps
    assert len(lines) == STEPS and all(len(line["rewards"]) == 6 for line in lines)
    for line in lines:
        assert line["loss"] == pytest.approx(-sum(line["rewards"]) / 6, abs=1e-9)
    metrics = [json.loads(text) for text in (run.path / METRICS).read_text().splitlines()]
    steps = [line for line in metrics if "reward" in line]
    for line, kept in zip(steps, lines, strict=True):
        assert line["reward"] == pytest.approx(-line["loss"])
        assert line["reward_best"] == max(kept["rewards"]) and line["reward_spread"] > 0
    scores = [line for line in metrics if "test_metric" in line]
    assert [line["step"] for line in scores] == [0, STEPS]
    assert all(line["test_loss"] == -line["test_metric"] for line in scores)
    summary = json.loads((run.path / SUMMARY).read_text())
    assert (summary["metric"], summary["metric_after"]) == ("reward", scores[1]["test_metric"])
    assert (run.path / CURVE).stat().st_size > 10_000
    page = (run.path / REPORT).read_text()
    assert "<figcaption>Reward " in page and "<figcaption>Loss " not in page
    assert "test loss" not in page
    assert f"{scores[0]['test_metric']:.3f} → {scores[1]['test_metric']:.3f}" in page
    samples = [json.loads(text) for text in (run.path / SAMPLES).read_text().splitlines()]
    assert [s["step"] for s in samples] == [step for step in (0, 2, 4, 6) for _ in range(4)]
    assert all(s["prompt"].startswith("what is") and 0 <= s["reward"] <= 9 / 7 for s in samples)
    assert len({s["prompt"] for s in samples}) == 4 and any(s["completion"] for s in samples)


def test_trackers_are_told_of_rewards_and_not_of_their_negatives(run: Run) -> None:
    told: dict[str, list[float]] = {}
    for _, values in _past(SimpleNamespace(path=run.path), rewarded=True):
        for name, value in values.items():
            told.setdefault(name, []).append(value)
    lines = read_journal(run.path / JOURNAL).steps
    assert told["train/reward"] == pytest.approx([-line["loss"] for line in lines])
    assert told["train/reward_best"] == [max(line["rewards"]) for line in lines]
    assert len(told["test/reward"]) == 2 and told["test/reward"][1] == run.summary["metric_after"]
    assert not {"train/loss", "test/loss", "test/metric"} & set(told)


def test_a_replay_needs_no_function(run: Run, asked: Asked, tmp_path: Path) -> None:
    file = asked.folder / "judges.py"
    file.rename(tmp_path / "aside.py")
    try:
        again = tmp_path / "again.safetensors"
        assert call("replay", run.path, "--verify", "--coefficients", again) == 0
    finally:
        (tmp_path / "aside.py").rename(file)
    found, right = load_file(again), coefficients(run.path)
    assert found.keys() == right.keys()
    assert all(torch.equal(part, right[name]) for name, part in found.items())


def test_a_killed_run_goes_on_as_if_it_had_not(
    run: Run, asked: Asked, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The process dies after its fourth step, before the samples of that, of which half a line is there."""
    log_step, cut = RunFolder.log_step, asked.folder / "cut"

    class Killed(BaseException):
        pass

    def log(folder: RunFolder, report: Any, *more: Any) -> None:
        log_step(folder, report, *more)
        if report.step == 3:
            raise Killed

    with monkeypatch.context() as gone, pytest.raises(Killed):
        gone.setattr(RunFolder, "log_step", log)
        gone.setattr("tezo_ds.training.loop.write_results", lambda *_: None)
        call(*asked.train("cut"))
    with (cut / SAMPLES).open("a") as file:
        file.write('{"step": 4, "pro')
    assert call(*asked.train("cut")) == 0
    assert (cut / SAMPLES).read_text() == (run.path / SAMPLES).read_text()
    right = coefficients(run.path)
    assert all(torch.equal(part, right[name]) for name, part in coefficients(cut).items())
    assert "reward 0" in capsys.readouterr().out


def test_a_function_that_raises_is_named_and_nothing_is_lost(
    asked: Asked, capsys: pytest.CaptureFixture[str]
) -> None:
    """The function fails once, at its third call, which is of the third step."""
    arguments = asked.train(
        "broken", "broken", test_fraction=0, test_examples=None, samples_every=0
    )
    assert call(*arguments) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "judges.py:9" in said and "raised AssertionError: too hard, at the completion" in said
    journal = asked.folder / "broken" / JOURNAL
    assert len(read_journal(journal).steps) == 2
    assert call(*arguments) == 0 and len(read_journal(journal).steps) == STEPS


def test_equal_rewards_are_told(asked: Asked, capsys: pytest.CaptureFixture[str]) -> None:
    more = {"steps": MANY + 2, "test_examples": 2, "log_every": MANY + 2, "samples_every": 0}
    assert call(*asked.train("tied", "constant", **more)) == 0
    said = capsys.readouterr().out
    assert f"same in all branches of the last {MANY} steps" in said
    assert f"{MANY + 2} of {MANY + 2} steps tied" in said
    shutil.rmtree(asked.folder / "tied")


def test_ties_are_counted_over_resumes() -> None:
    ties = Ties([[0.0, 0.0]] * (MANY - 1))
    assert ties.step(True, "reward") and not ties.step(True, "reward")
    assert not Ties([[0.0]] * (MANY - 2) + [[1.0]]).step(True, "reward")
    assert not Ties([[0.0]] * (MANY - 2) + [[None]]).step(True, "reward")


def test_built_in_rewards_and_conversations(
    asked: Asked, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """TRL's columns, prompts that are messages and an answer beside them, from rows that stay on disk."""
    shutil.copytree(asked.folder / "model", tmp_path / "model")
    with_chat_template(tmp_path / "model")
    rows = [
        {"prompt": [{"role": "user", "content": f"say {i}"}], "answer": str(i)} for i in range(12)
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = {
        "model": tmp_path / "model", "task": tmp_path / "chats.jsonl", "template": None, "label_field": None,
        "reward": ("f1", "length:2"), "reward_weights": (1.0, 0.5), "steps": 2, "test_examples": 3,
        "stop": "\\n", "temperature": 0.8, "output": tmp_path / "run", "samples_every": 1,
        "micro_batch": 2,
    }  # fmt: skip
    assert call(*asked.train("chats", **more), "--streaming") == 0
    sample = json.loads((tmp_path / "run" / SAMPLES).read_text().splitlines()[0])
    assert sample["prompt"].startswith("<|user|>say ") and sample["prompt"].endswith(
        "<|assistant|>"
    )
    assert "reward" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"objective": "choices"}, "--objective: is for runs that train on a loss"),
        ({"reward": None, "reward_weights": 1.0}, "--reward-weights: there is no --reward"),
        ({"max_new_tokens": 600}, "leaves no room for a prompt"),
        ({"function": "lacking"}, "needs the column 'missing'"),
    ],
)
def test_what_is_refused(
    asked: Asked, tmp_path: Path, more: dict[str, Any], words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert call(*asked.train("no", output=tmp_path / "run", **more)) == 2
    assert words in capsys.readouterr().err


def test_progress_is_shown_of_steps_without_a_reward() -> None:
    """As where every branch of the first step had a logit that is NaN."""
    dropped = SimpleNamespace(rewards=[math.nan, math.nan], tied=False)
    fine = SimpleNamespace(rewards=[0.0, 1.0], tied=False)
    assert _gained([dropped], math.nan) == "reward nan  best nan  spread nan"
    assert _gained([dropped, fine], 0.5) == "reward 0.5000  best 1.0000  spread 0.5000"
