"""The doctor's row on `trunk_cache`: room in host memory and beside the run, and whether there is a trunk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from command_line import Given, call, strict_json
from doctors import FOUR, all_four, assert_row
from tiny import tiny

from tezo_ds.config import TezoConfig
from tezo_ds.doctor.flags import RunFlags
from tezo_ds.doctor.machine import Space
from tezo_ds.doctor.report import Row
from tezo_ds.doctor.trunk_cache import Wanted, in_memory, nothing_to_keep, on_disk
from tezo_ds.plan.needs import GIB
from tezo_ds.plan.trunk import Kept
from tezo_ds.settings import Settings

pytest_plugins = ("cli_fixtures",)

MIB = 1 << 20


def wanted(examples: int | None = None, bound: int | None = None) -> Wanted:
    return Wanted(3, Kept(4 * MIB, examples, bound))


def test_room_in_memory() -> None:
    hosts = all_four(Space(64 * GIB, 10 * GIB), r3=Space(64 * GIB, 6 * GIB))  # 3 GiB a rank of b
    assert_row(
        in_memory(FOUR, wanted(512), hosts, 0), "green", "at most 4 MiB an example",
        "512 of a rank's 512 examples take 2.00 GiB, of 3.00 GiB for a rank of b",
    )  # fmt: skip
    assert_row(in_memory(FOUR, wanted(700), hosts, 0), "yellow", "2.73 GiB, of 3.00", "make room")
    assert_row(in_memory(FOUR, wanted(1000), hosts, 0), "red", "3.91 GiB", "trunk_cache disk")
    assert_row(in_memory(FOUR, wanted(512), hosts, 2 * GIB), "red", "of 1.00 GiB")
    assert_row(in_memory(FOUR, wanted(512), hosts, 9 * GIB), "red", "of 0.00 GiB")
    assert_row(in_memory(FOUR, wanted(1000, GIB), hosts, 0), "green", "256 of a rank's 1,000")
    assert_row(in_memory(FOUR, wanted(None, GIB), hosts, 0), "green", "takes at most 1.00 GiB")
    unknown = in_memory(FOUR, wanted(), hosts, 0)
    assert_row(unknown, "yellow", "768 examples fill the 3.00 GiB", "trunk_cache_gib")


def test_room_on_disk(tmp_path: Path) -> None:
    def judge(free: int, examples: int | None) -> Row:
        return on_disk(FOUR, wanted(examples), Space(99 * GIB, free), tmp_path / "run", GIB)

    assert_row(judge(13 * GIB, 512), "green", f"2.00 GiB, of 3.00 GiB for a rank at {tmp_path}")
    assert_row(judge(9 * GIB, 512), "yellow", "of 2.00 GiB")
    assert_row(judge(8 * GIB, 512), "red", "another --output")
    assert_row(judge(13 * GIB, None), "yellow", "768 examples fill")


def test_nothing_to_keep() -> None:
    kept = Kept(1, 1, None)
    row = nothing_to_keep(Wanted(0, kept))
    assert row is not None
    assert_row(row, "red", "no trunk to keep", "--include last:6")
    assert nothing_to_keep(Wanted(3, kept)) is None


def flags(**settings: Any) -> RunFlags:
    config = TezoConfig(rank=2, include=("last:1",), trunk_cache="memory", trunk_cache_gib=0.5)
    return RunFlags(Settings(model="m", task="", **settings), config)


def test_what_a_run_wants() -> None:
    found = flags(max_length=100).trunk_cache(tiny(), 4)
    assert found == Wanted(1, Kept(100 * 22 * 4, None, GIB // 2))
    few = flags(max_length=100, train_examples=9, fsdp=True, compute_dtype="bfloat16")
    assert few.trunk_cache(tiny("gpt2"), 4).kept == Kept(100 * 22 * 2, 3, GIB // 2)
    tested = flags(max_length=100, train_examples=9, test_examples=5)
    assert tested.trunk_cache(tiny(), 4).kept == Kept(100 * 22 * 4, 3 + 2, GIB // 2)


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_with_the_flags_of_train(
    kind: str, given: Given, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def row_of(code: int, *more: str, **options: Any) -> dict[str, str] | None:
        options = {"include": "last:1", "trunk_cache": kind, **options}
        arguments = given.train(tmp_path / "runs", **options)
        assert call("doctor", *arguments[1:], *more, "--json") == code
        rows = {row["check"]: row for row in strict_json(capsys.readouterr().out)["rows"]}
        return rows.get("trunk cache")

    assert row_of(0, trunk_cache=None) is None
    row = row_of(0, train_examples=20)
    assert row is not None and row["status"] == "green"
    assert "20 of a rank's 20 examples take 0.00 GiB" in row["found"]
    row = row_of(1, trunk_cache_gib=10**9)
    assert row is not None and row["status"] == "red" and "trunk_cache_gib" in row["advice"]
    row = row_of(1, include="*")
    assert row is not None and "no trunk to keep" in row["found"]
    assert list(tmp_path.iterdir()) == []
