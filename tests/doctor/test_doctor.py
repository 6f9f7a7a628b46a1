"""`tezo-ds doctor` as a whole, and its self-test; world_doctor.py has the checks that take several ranks."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from command_line import Given, call, free_port, strict_json
from doctors import all_four, assert_row

from tezo_ds.config import TezoConfig
from tezo_ds.doctor import selftest
from tezo_ds.doctor.checks import examine
from tezo_ds.doctor.flags import RunFlags
from tezo_ds.doctor.meeting import THREAD, Meeting, meet, within
from tezo_ds.doctor.report import Failed, Row, exit_code, show
from tezo_ds.settings import Settings

pytest_plugins = ("cli_fixtures",)

# The self-test


def test_the_tiny_model_has_slopes_and_equal_bits() -> None:
    first, again = selftest.tiny_model(), selftest.tiny_model()
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name))
    learnt = selftest.expected(2)
    assert learnt.keys() == {"fused", "inplace"}
    for found in learnt.values():
        assert found.abs().max() > 1e-4
    torch.testing.assert_close(learnt["fused"], learnt["inplace"], rtol=1e-2, atol=1e-6)


def test_the_self_test_judges() -> None:
    wanted = {"fused": torch.tensor([1.0, -2.0], dtype=torch.float64)}

    def judge(**others: Any) -> Row:
        return selftest.judge(all_four(wanted, **others), wanted, "FSDP2")

    assert_row(judge(), "green", "FSDP2, fused probe: 3 steps")
    assert_row(judge(r2={"fused": wanted["fused"] + 1e-12}), "red", "rank 2 learnt something else")
    assert_row(judge(r3=Failed("ShardingError: no")), "red", "rank 3: ShardingError: no")
    assert_row(judge(r0="weights are quantised"), "unchecked", "quantised")
    off = {rank: {"fused": wanted["fused"] * 1.01} for rank in range(4)}
    assert_row(selftest.judge(off, wanted, "FSDP2"), "red", "within 1.0e-02", "do not train")
    for nothing in (torch.zeros(2), torch.full((2,), torch.nan)):
        none = {rank: {"fused": nothing.double()} for rank in range(4)}
        assert_row(selftest.judge(none, {"fused": nothing.double()}, "FSDP2"), "red")


# The whole of it


def plain_plan(**fields: Any) -> RunFlags:
    return RunFlags(Settings(model="", task=""), TezoConfig(rank=3), **fields)


def test_a_rank_that_never_comes_is_no_hang() -> None:
    rows = {
        row.check: row for row in examine(plain_plan(), Meeting(dist.HashStore(), 0, 2, wait=0.3))
    }
    assert_row(rows["ranks"], "red", "rank 1 did not report")
    for check in ("collectives", "self-test"):
        assert_row(rows[check], "unchecked", "see ranks")
    assert exit_code(list(rows.values())) == 1


def test_what_hangs_is_left_behind() -> None:
    release = threading.Event()
    with pytest.raises(TimeoutError, match=r"no end within 0 s"):
        within(0.05, release.wait)
    release.set()
    for thread in threading.enumerate():
        if thread.name == THREAD:
            thread.join()
    with pytest.raises(KeyError):
        within(5, lambda: {}["nothing"])


def test_the_table_has_all_words(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        Row("a", "green", "fine"),
        Row("b", "red", "not [so] fine", "mend it"),
        Row("c", "unchecked", ""),
    ]
    show(rows, as_json=False)
    out = capsys.readouterr().out
    assert (
        "not [so] fine" in out
        and "mend it" in out
        and out.endswith("1 ok, 1 FAILED, 1 not checked\n")
    )


def test_one_process_with_the_flags_of_train(
    given: Given, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = given.train(tmp_path / "runs" / "one", method="lozo-m", betas=(0.8, 0.9))
    assert call("doctor", *arguments[1:], "--exclude", "*head*", "--json") == 0
    said = strict_json(capsys.readouterr().out)
    rows = {row["check"]: row for row in said["rows"]}
    assert said["ok"] and rows["self-test"]["status"] == "green"
    assert {rows[check]["status"] for check in ("versions", "model", "memory", "run folder")} == {
        "green"
    }
    assert list(tmp_path.iterdir()) == []


def test_exit_codes(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "hosts").write_text("a slots=2\na slots=2\n")
    asked = ["--hostfile", tmp_path / "hosts", "--model", tmp_path / "no-model", "--json"]
    assert call("doctor", *asked) == 1
    rows = {row["check"]: row for row in strict_json(capfd.readouterr().out)["rows"]}
    assert "a is there twice" in rows["hostfile"]["found"]
    assert "cannot load a model from" in rows["model"]["found"]
    assert (rows["memory"]["status"], rows["memory"]["found"]) == ("unchecked", "see model")
    for wrong in (["--stepps", "3"], ["--steps", "x"], ["--rho", "-1"], ["--fsdp-replicas", "2"]):
        assert call("doctor", *wrong) == 2
        assert capfd.readouterr().err


def test_ranks_meet_at_the_port_at_which_their_world_is_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    for name, value in world.items():
        monkeypatch.setenv(name, str(value))
    meetings = []
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        meetings.append(meet(wait=5))
    first, second = meetings
    assert second.gather("names", "b") == {} and first.gather("names", "a") == {0: "a", 1: "b"}
    assert first.tell("word", 7) == second.tell("word", None) == 7

    def join(rank: int) -> dist.Store:
        store: dist.Store = next(dist.rendezvous(f"env://?rank={rank}&world_size=2"))[0]
        return store

    with ThreadPoolExecutor(2) as pool:  # the same port of rank 0
        a, b = pool.map(join, range(2))
    a.set("key", "value")
    assert b.get("key") == b"value"
    second.leave()
    first.leave()


def test_a_store_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {
        "RANK": 1,
        "WORLD_SIZE": 2,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_port(),
    }.items():
        monkeypatch.setenv(name, str(value))
    assert call("doctor", "--wait", 1) == 1
    err = capsys.readouterr().err
    assert "rank 1 cannot reach the store at 127.0.0.1:" in err and err.count("\n") == 1
