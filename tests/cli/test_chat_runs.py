"""Runs on conversations and completions, from a file to what evaluates: trained, gone on with, refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from command_line import Run, call, flags
from task_files import write
from tiny_tokenizer import save_tiny_llama, with_chat_template

from tezo_ds.cli.options import settings_from

NAMES = ("Ann", "Bob", "Cid", "Dot", "Eve", "Fay", "Gus", "Hal")
CHATS = [
    [
        {"role": "user", "content": f"I am {name}. Who am I?"},
        {"role": "assistant", "content": f"You are {name}."},
    ]
    for name in NAMES
]


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("chats")
    texts = [message["content"] for chat in CHATS for message in chat]
    save_tiny_llama(folder / "model", texts, max_position_embeddings=256)
    with_chat_template(folder / "model")
    path = write(folder / "chats.jsonl", [{"messages": chat} for chat in CHATS])
    return {
        "model": folder / "model", "task": path, "steps": 8, "batch_size": 4, "rank": 4, "lr": 2e-2,
        "method": "tezo-adam-coef",
    }  # fmt: skip


def test_a_run_on_conversations(
    given: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(tmp_path / "run")
    assert call("train", *flags({**given, "output": run.path, "steps": 4})) == 0
    out = capsys.readouterr().out
    assert "conversations of column 'messages'" in out and "accuracy" not in out
    # Goes on, with what trains unchanged alone.
    assert call("train", *flags({**given, "output": run.path, "loss_on": "all"})) == 2
    assert "loss_on" in capsys.readouterr().err
    assert call("train", *flags({**given, "output": run.path})) == 0
    whole = Run(tmp_path / "whole")
    assert call("train", *flags({**given, "output": whole.path})) == 0
    assert all(bool((run.coefficients[k] == part).all()) for k, part in whole.coefficients.items())
    summary = whole.summary
    assert (
        summary["test_loss_after"] < summary["test_loss_before"]
        and summary["accuracy_after"] is None
    )
    capsys.readouterr()
    assert call("evaluate", "--run", whole.path) == 0
    found = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert found["loss"] == pytest.approx(summary["test_loss_after"], rel=1e-6)


def test_the_same_as_prompts_with_completions(given: dict[str, Any], tmp_path: Path) -> None:
    """Messages parted into prompt and completion are the very same run."""
    rows = [{"prompt": chat[:1], "completion": chat[1:]} for chat in CHATS]
    parted = write(tmp_path / "parted.jsonl", rows)
    runs = [Run(tmp_path / name) for name in ("whole", "parted")]
    for run, path in zip(runs, (given["task"], parted), strict=True):
        more = {"task": path, "output": run.path, "test_fraction": 0.0, "steps": 2}
        assert call("train", *flags({**given, **more})) == 0
    kappas = [[line["kappa"] for line in run.steps] for run in runs]
    assert kappas[0] == kappas[1]


def test_answers_that_are_cut_are_said(
    given: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": f"I am {name}.", "completion": " So you are." * 9} for name in NAMES]
    path = write(tmp_path / "long.jsonl", rows)
    more = {
        "task": path,
        "output": tmp_path / "run",
        "max_length": 20,
        "steps": 1,
        "test_fraction": 0.0,
    }
    assert call("train", *flags({**given, **more})) == 0
    out = capsys.readouterr().out
    assert "warning: 8 training examples are longer than 20 tokens by their answers" in out


def test_answers_are_generated_shown_and_measured(
    given: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(tmp_path / "run")
    more = {"output": run.path, "metric": "f1", "max_new_tokens": 5, "steps": 3, "eval_every": 2}
    assert call("train", *flags({**given, **more})) == 0
    out = capsys.readouterr().out
    assert out.count("f1 0.") == 3 and "  answers, e.g. '" in out
    summary = run.summary
    assert summary["metric"] == "f1" and 0 <= summary["metric_after"] <= 1
    scores = [line["test_metric"] for line in run.lines if "test_metric" in line]
    assert len(scores) == 3 and scores[-1] == summary["metric_after"]
    assert call("evaluate", "--run", run.path) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["metric"], found["value"]) == ("f1", summary["metric_after"]) and found["answers"]
    shown = (
        "generate",
        "--run",
        run.path,
        "--prompt",
        "Who am I?",
        "--prompt",
        "one\\ntwo",
        "--chat",
    )
    assert call(*shown, "--max-new-tokens", 4) == 0
    lines = capsys.readouterr().out
    assert settings_from({"model": "m", "task": "t", "stop": ["\\n", "###"]}, {}).stop == (
        "\n",
        "###",
    )
    assert lines.startswith("> Who am I?\n") and "> one\ntwo\n" in lines
    assert (
        call("generate", "--model", given["model"], "--prompt", "I am Ann", "--max-new-tokens", 4)
        == 0
    )
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--model", "m"], "--prompt is missing; add it"),
        (["--prompt", "x"], "--run or --model is missing"),
        (["--prompt", "x", "--model", "nowhere"], "nowhere"),
    ],
)
def test_what_generate_cannot_do(
    words: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("generate", *words) == 2
    assert expected in capsys.readouterr().err
