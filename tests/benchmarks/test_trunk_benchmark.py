"""The benchmark of a shared and a cached trunk, at toy size."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
import trunk
from deep import deep
from step_overhead import measure

LATE = {1: "last 1 layers", 2: "last 2 layers"}


def test_rows_have_what_their_names_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    deep(layers=4).save_pretrained(tmp_path / "model")
    words = ["--model", str(tmp_path / "model"), "--shapes", "3x7", "--late", "1", "2"]
    words += ["--queries", "3", "--rank", "2", "--rounds", "2", "--json", str(tmp_path / "j")]
    trunk.main(words)
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "j").read_text())
    assert found["command"].endswith(words[-1]) and all(title in printed for title in LATE.values())
    settings = [(late, 3) for late in LATE]
    ways = [trunk.PLAIN, "plain step", "shared", "cached"]
    rows = {(row["late"], row["queries"], row["way"]): row for row in found["rows"]}
    assert list(rows) == [(*setting, way) for setting in settings for way in ways]
    for (late, queries, way), row in rows.items():
        assert len(row["seconds"]) == len(row["ratios"]) == 2 and min(row["seconds"]) > 0
        assert row["ratio"] == pytest.approx(sum(row["ratios"]) / 2)
        assert row["gathered"] == 0 and row["peak"] > 0 and row["aim"] is None
        # float32 states of 7 tokens of the tiny model
        assert row["cache"] == (7 * 22 * 4 if way == "cached" else 0)
        branches = 2 * queries
        early = {"shared": 4 - late, "cached": 0}.get(way, branches * (4 - late))
        assert row["blocks_alone"] == pytest.approx((early + branches * late) / (branches * 4))
        assert row["ratios"][0] == 1 or way != trunk.PLAIN


def test_the_ways_of_a_step_measure_the_same_slopes() -> None:
    args = trunk.arguments().parse_args(["--rank", "2"])
    batch = trunk.make_batch("3x7", 61, "all")
    steps, _ = trunk.contestants(deep(), trunk.fields_of(args, 2, 2), batch)
    reports = [steps[way]() for way in ("plain step", "shared", "cached", "cached")]
    losses = [report.loss for report in reports]  # type: ignore[attr-defined]
    torch.testing.assert_close(losses[1:], [losses[0]] * 3, rtol=1e-5, atol=0)


def test_steps_before_a_timed_one_are_not_timed() -> None:
    calls: list[str] = []
    steps = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    found = measure(steps, 1, "label", quiet=True, clock=time.process_time, before=2)
    assert calls == ["a", "a", "a", "b", "b", "b"] * 3
    assert {name: len(seconds) for name, seconds in found.items()} == {"a": 1, "b": 1}
