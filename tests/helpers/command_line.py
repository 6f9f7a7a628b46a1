"""Calls of the command line, and readers of what it leaves; cli_fixtures.py has the fixtures."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main
from safetensors.torch import load_file

from tezo_ds.cli import main
from tezo_ds.run.folder import ADAPTER, COEFFICIENTS, CONFIG, METRICS, SUMMARY, read_metrics
from tezo_ds.training import records

TEMPLATE = "{text} It was"
WORDS = {"bad": "terrible", "good": "great", "mixed": "okay"}
STEPS, BATCH = 6, 4
BLOCK = {"rank": 4, "lr": 0.002, "seed": 3}
TIMEOUT = 120  # seconds, of a process
command = cache(typer.main.get_command)  # of the app, as a process makes it once, too


@dataclass(frozen=True)
class Given:
    """What a user has before the first run: a model and data."""

    model: Path
    data: Path

    def task(self) -> list[str]:
        """Returns the options that name the model and the task."""
        words = json.dumps(WORDS)
        named = {"model": self.model, "task": self.data, "template": TEMPLATE, "verbalizers": words}
        return flags({**named, "test_fraction": 0.4})

    def train(self, output: Path, **options: Any) -> list[str]:
        """Returns the arguments of a short run; `options` come on top of BLOCK, STEPS and BATCH."""
        chosen = {"output": output, "steps": STEPS, "batch_size": BATCH, **BLOCK, **options}
        return ["train", *self.task(), *flags(chosen)]


def flags(options: dict[str, Any]) -> list[str]:
    """Writes options as words: `--name value`, for a bool `--name` or `--no-name`; None leaves one out."""
    words: list[str] = []
    for key, value in options.items():
        name = key.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        elif value is not None:
            values = value if isinstance(value, tuple) else (value,)
            words += [f"--{name}", *map(str, values)]
    return words


def not_drawn(metrics: Path, picture: Path) -> None:
    """Stands in for `draw_curve`, which takes as long as all the rest of a run of few steps."""
    picture.write_bytes(b"no picture")


def call(*arguments: object, drawn: bool = False) -> int:
    """Runs `tezo-ds ARGUMENTS` in this process and returns its exit code; `drawn`: with a run's picture."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(sys, "argv", ["tezo-ds", *map(str, arguments)])
        patch.setattr(typer.main, "get_command", command)
        if not drawn:
            patch.setattr(records, "draw_curve", not_drawn)
        main()
    code = stopped.value.code
    assert code is None or isinstance(code, int), code
    return code or 0


def start(*command: object, **env: object) -> subprocess.Popen[str]:
    """Starts a process on the CPU with one thread, its output piped."""
    quiet = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [str(word) for word in command],
        env={**os.environ, **quiet, **{key: str(value) for key, value in env.items()}},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Waits for a process and returns its exit code, stdout and stderr; ends it where it does not end by
    itself."""
    try:
        out, err = process.communicate(timeout=TIMEOUT)
    finally:
        process.kill()
    return process.returncode, out, err


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def strict_json(text: str) -> Any:
    """Reads JSON as other languages do: without NaN and Infinity."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


@dataclass(frozen=True)
class Run:
    """The files of a run folder."""

    path: Path

    @property
    def config(self) -> dict[str, Any]:
        return dict(strict_json((self.path / CONFIG).read_text()))

    @property
    def summary(self) -> dict[str, Any]:
        return dict(strict_json((self.path / SUMMARY).read_text()))

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [strict_json(line) for line in (self.path / METRICS).read_text().splitlines()]

    @property
    def steps(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl that are of steps."""
        return read_metrics(self.path / METRICS)[0]

    @property
    def coefficients(self) -> dict[str, torch.Tensor]:
        return load_file(self.path / COEFFICIENTS)


def assert_near(run: Run, other: Run) -> None:
    """Asserts equal coefficients, up to float32's rounding in the losses, which κ divides by ρ."""
    found, expected = run.coefficients, other.coefficients
    assert found.keys() == expected.keys()
    largest = max(float(part.abs().max()) for part in expected.values())
    for name, part in expected.items():
        torch.testing.assert_close(found[name], part, rtol=0, atol=1e-3 * largest)


def assert_stopped(run: Run, out: str) -> None:
    """Asserts that a stopped run has all its files as of one step, but nothing that follows a run's last
    step."""
    steps = run.summary["steps"]
    assert run.summary["status"] == "stopped"
    assert f"stopped by SIGTERM after step {steps}; the same command goes on from there" in out
    assert [line["step"] for line in run.steps] == list(range(steps))
    assert "accuracy_after" not in run.summary
    assert bool(run.coefficients) and (run.path / ADAPTER).is_dir()


def assert_found_again(run: Run, capsys: pytest.CaptureFixture[str], tolerance: float) -> None:
    """Asserts that one process evaluates a result as the run itself did, up to a relative tolerance of the
    loss."""
    capsys.readouterr()
    assert call("evaluate", "--run", run.path) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["accuracy"] == run.summary["accuracy_after"]
    assert result["loss"] == pytest.approx(run.summary["test_loss_after"], rel=tolerance)
