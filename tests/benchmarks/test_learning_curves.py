"""Curves of the learning benchmark: what a step costs, and how the loss fell."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from parts.learning.arms import Arm
from parts.learning.curves import curve_of, draw_curves, per_step
from tiny import tiny

from tezo_ds.config import TezoConfig
from tezo_ds.plan.hardware import GPUS, Cluster
from tezo_ds.plan.job import Job


@pytest.mark.parametrize(
    "fields",
    [
        {"method": "lozo"}, {"method": "mezo", "queries": 3}, {"queries": 5, "difference": "forward"},
        {"method": "tezo-gn", "queries": 4}, {"method": "tezo-gn", "queries": 24, "difference": "forward"},
        {"method": "tezo-gn", "queries": 4, "recall": False, "refresh_every": 1},
    ],
)  # fmt: skip
def test_a_step_costs_what_a_plan_counts(fields: dict[str, Any]) -> None:
    config = TezoConfig(**fields)
    job = Job(tiny("llama"), config, "fsdp2", Cluster(GPUS["h100-80g"], 2, 2), 3, 8, 1)
    sequences, gathers = per_step({"tezo": config.model_dump(), "batch_size": 3})
    scales = 4 if config.method == "tezo-gn" else 0
    assert (sequences, gathers) == (3 * (job.branches + scales), job.forwards)


def test_what_a_new_subspace_forgot_is_not_measured() -> None:
    config = TezoConfig(method="tezo-gn", queries=24, difference="forward", refresh_every=1)
    assert per_step({"tezo": config.model_dump(), "batch_size": 256}) == (256 * (25 + 4), 2)


def test_a_curve_is_what_the_steps_told(tmp_path: Path) -> None:
    """Steps of 1 s in a run that had 200 s of the processor: seconds are stretched, spans grow."""
    config = {"tezo": TezoConfig(method="lozo").model_dump(), "batch_size": 16}
    (tmp_path / "config.json").write_text(json.dumps(config))
    lines: list[dict[str, Any]] = [{"step": 0, "test_loss": 9.0}]
    lines += [{"step": i, "kappa": [1.0], "loss": 3 - i / 50, "seconds": 1.0} for i in range(100)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    curve = curve_of(tmp_path, 200.0)
    assert curve[0] == [2.0, 32, 1, 3.0] and curve[-1][:3] == [200.0, 3200, 100]
    assert 10 < len(curve) <= 25 and all(a[3] > b[3] for a, b in pairwise(curve))
    ends = [0, *(point[2] for point in curve)]
    spans = [b - a for a, b in pairwise(ends)]
    means = [point[3] * span for point, span in zip(curve, spans, strict=True)]
    assert sum(means) == pytest.approx(sum(3 - i / 50 for i in range(100)), abs=0.01)
    arm, picture = Arm("frozen", "lozo"), tmp_path / "curves.png"
    assert not draw_curves([("sms", arm, [{"seed": 1}])], picture) and not picture.exists()
    assert draw_curves([("sms", arm, [{"seed": 1}, {"seed": 2, "curve": curve}])], picture)
    assert picture.stat().st_size > 1000
