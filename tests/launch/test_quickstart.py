"""The README's first command, on its real model and data, cut short."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.launches
def test_quickstart_fine_tunes_the_real_model_under_zero3(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    output = tmp_path / "run"
    flags = ["--steps", "1", "--eval-every", "0", "--test-examples", "2"]
    flags += ["--batch-size", "2", "--queries", "1", "--output-layer-examples", "6"]
    flags += ["--output", str(output)]
    done = subprocess.run(
        [ROOT / "launch" / "quickstart.sh", *flags],
        env={**os.environ, "RANKS": "2", "MASTER_PORT": port, "DS_ACCELERATOR": "cpu"},
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Zero3 on 2 rank(s)" in done.stdout and "accuracy after" in done.stdout
    summary = json.loads((output / "summary.json").read_text())
    assert (summary["status"], summary["steps"], summary["world_size"]) == ("finished", 1, 2)
    assert summary["test_examples"] == 2 and summary["train_examples"] == 4381
    assert summary["test_loss_after"] != summary["test_loss_before"]
    assert summary["output_layer"]["examples"] == 6 and "output layer: fit to" in done.stdout
    assert (output / "adapter" / "adapter_model.safetensors").exists()
