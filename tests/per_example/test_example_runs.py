"""Runs of each example's own directions through the command line: resumed, replayed, judged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from command_line import Given, Run, call
from safetensors.torch import load_file

from tezo_ds.run.folder import JOURNAL, METRICS
from tezo_ds.run.journal import READABLE, read_journal

pytest_plugins = ("cli_fixtures",)
pytestmark = pytest.mark.usefixtures("other_kernels")

OPTIONS = {
    "placement": "per_example", "normalize": "std", "queries": 20, "rank": 2, "check_every": 2, "lr": 1e-6,
}  # fmt: skip


def test_a_run_of_many_slopes_is_resumed_and_replayed_to_the_bit(
    given: Given, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    assert call(*given.train(whole, **OPTIONS)) == 0
    assert "Q = 20 of each example" in capfd.readouterr().out
    steps = read_journal(whole / JOURNAL).steps
    assert all(len(line["kappa"]) > READABLE and len(line["kappa"]) % 20 == 0 for line in steps)
    lines = (whole / JOURNAL).read_text().splitlines()
    assert isinstance(json.loads(lines[1])["kappa"], str)
    metrics = [json.loads(line) for line in (whole / METRICS).read_text().splitlines()]
    assert {type(line["kappa"]) for line in metrics if "kappa" in line} == {str}
    expected = Run(whole).coefficients
    assert any(part.any() for part in expected.values())

    assert call(*given.train(parted, steps=3, **OPTIONS)) == 0
    assert call(*given.train(parted, **OPTIONS)) == 0
    assert (parted / JOURNAL).read_text().splitlines()[1:] == lines[1:]
    assert all(torch.equal(part, expected[name]) for name, part in Run(parted).coefficients.items())

    made = tmp_path / "made.safetensors"
    assert call("replay", whole, "--verify", "--coefficients", made) == 0
    assert "digests agree" in capfd.readouterr().out
    assert all(torch.equal(part, expected[name]) for name, part in load_file(made).items())
