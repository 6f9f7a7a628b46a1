"""The doctor's row of a run that fits its output layer."""

from __future__ import annotations

import json
from typing import Any

import pytest
from world_plan import small

from tezo_ds.config import TezoConfig
from tezo_ds.doctor import output_layer
from tezo_ds.doctor.flags import RunFlags
from tezo_ds.doctor.machine import Accelerator, Space
from tezo_ds.doctor.report import Failed, Row
from tezo_ds.doctor.verdicts import Asked, Who
from tezo_ds.plan.needs import Layout, Needs
from tezo_ds.plan.output_layer import fit_of
from tezo_ds.settings import Settings

NEED = Needs(1000, 0, 0, 0, 0, 0)
WIDTH, ITEM = 94, 4


def test_the_doctors_row() -> None:
    found = fit_of(small(), TezoConfig(output_layer="fit"), 1, 1000, 7, 4, 50)
    assert found is not None
    room, status = found.nbytes, {0.9: "red", 1.1: "yellow", 1.5: "green"}
    for share, expected in status.items():
        row = output_layer.judge(found, int(room * share), "host's memory")
        assert row.status == expected and "labels" in row.found
    assert output_layer.judge(found, -5, "host's memory").status == "red"
    assert output_layer.judge(None, room, "host's memory").status == "unchecked"


def row(machines: dict[int, dict[str, Any]], **settings: Any) -> Row:
    flags = RunFlags(
        Settings(model="m", task="t", **settings), TezoConfig(rank=3, output_layer="fit")
    )
    asked = Asked({rank: Who("a", rank) for rank in machines})
    return output_layer.row(flags, asked, Layout(), small(), NEED, machines)


def on(kind: str, of_device: int, of_host: int) -> dict[str, Any]:
    device = Accelerator(kind, 1, "x", of_device, of_device, True, 1, 1, None)
    return {"accelerators": device, "memory": Space(of_host, of_host)}


@pytest.mark.parametrize(("kind", "where"), [("cpu", "a's memory"), ("cuda", "rank 1 (a)'s acc")])
def test_room_is_where_forwards_run(kind: str, where: str) -> None:
    few, much = 10_000, 1 << 40
    machines = {
        0: on(kind, much, few if kind == "cpu" else much),
        1: on(kind, few, few),
    }
    found = row(machines, train_examples=100, max_length=33)
    assert found.status == "red" and where in found.found
    labels = -(-100 // 2) * 32
    assert f"{labels:,} labels" in found.found
    fine = {rank: on(kind, much, much) for rank in (0, 1)}
    assert row(fine, train_examples=100, max_length=33).status == "green"
    choices = {"objective": "choices", "verbalizers": json.loads('{"a": "b", "c": "d"}')}
    assert "50 labels" in row(fine, train_examples=100, **choices).found


def test_what_is_not_known_is_said() -> None:
    fine = {0: on("cpu", 0, 1 << 40)}
    assert "name --train-examples" in row(fine).advice
    broken = {0: {**on("cpu", 0, 1), "memory": Failed("no file")}}
    assert row(broken, train_examples=100).found == "see memory"
