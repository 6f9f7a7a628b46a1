"""Helpers of the tests of `tezo-ds doctor`: four ranks on two hosts, and assertions about a row."""

from __future__ import annotations

from typing import Any

from tezo_ds.doctor.machine import Accelerator
from tezo_ds.doctor.report import Row
from tezo_ds.doctor.verdicts import GIB, Asked, Who
from tezo_ds.plan.needs import Needs

FOUR = Asked({rank: Who("ab"[rank // 2], rank % 2) for rank in range(4)})  # on hosts a and b
ONE = Asked({0: Who("a", 0)})
GPU = Accelerator("cuda", 2, "H100", 80 * GIB, 79 * GIB, True, 16, 8, None)
CPU = Accelerator("cpu", 0, "x86_64", 0, 0, True, 2, 1, None)
NEEDS = Needs(shard=6 * GIB, gathered=GIB, probe=GIB, state=0, disk=5 * GIB, sent=10**9)


def all_four(value: Any, **others: Any) -> dict[int, Any]:
    """Gives four ranks the same value, except for those named in `others`: r1=…"""
    return {rank: others.get(f"r{rank}", value) for rank in range(4)}


def assert_row(row: Row, status: str, *telling: str) -> None:
    assert row.status == status, row
    for words in telling:
        assert words in f"{row.found} | {row.advice}", row
