"""`tezo-ds doctor` on the hostfile, and on room for a run: every check is seen to fail, or to warn where
it can only warn."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from doctors import CPU, FOUR, GPU, NEEDS, all_four, assert_row

from tezo_ds.doctor import hostfile, machine, resources
from tezo_ds.doctor.hostfile import Host, check_hostfile, read_hostfile
from tezo_ds.doctor.machine import Space
from tezo_ds.doctor.report import Row
from tezo_ds.doctor.verdicts import GIB
from tezo_ds.plan.needs import Layout

# The hostfile


@pytest.mark.parametrize(
    ("text", "telling"),
    [
        ("a slots=2\nb slot=2\n", "line 2 is no 'host slots=N': 'b slot=2'"),
        ("a slots=2\n\na slots=4\n", "line 3: a is there twice"),
        ("a slots=0\n", "line 1: a has no slots"),
        ("# nothing\n", "there is no line"),
    ],
)
def test_a_hostfile_that_is_wrong(tmp_path: Path, text: str, telling: str) -> None:
    (tmp_path / "hosts").write_text(text)
    assert_row(check_hostfile(tmp_path / "hosts", 1), "red", telling)
    assert_row(check_hostfile(tmp_path / "none", 1), "red", "cannot be read")


def test_hosts_that_do_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "# two\na slots=2\nb slots=2 # and a note\n"
    assert read_hostfile(text) == ({"a": 2, "b": 2}, [])
    (tmp_path / "hosts").write_text(text)
    found = {"a": Host(gpus=2), "b": Host("Permission denied (publickey).")}
    row = check_hostfile(tmp_path / "hosts", 1, found.__getitem__)
    assert_row(row, "red", "b: Permission denied", "ssh -o BatchMode=yes")
    assert_row(check_hostfile(None, 1), "unchecked")
    assert "does not resolve" in hostfile.ask("no-such-host.invalid").wrong
    monkeypatch.setenv("PATH", str(tmp_path))
    assert hostfile.ask("localhost").wrong == "ssh is not installed here"
    (tmp_path / "ssh").write_text("#!/bin/sh\necho 'ssh: connect to host: refused' >&2; exit 255\n")
    (tmp_path / "ssh").chmod(0o755)
    assert hostfile.ask("localhost").wrong == "ssh: connect to host: refused"
    (tmp_path / "ssh").write_text("#!/bin/sh\necho 'GPU 0: H100'; echo 'GPU 1: H100'\n")
    assert hostfile.ask("localhost") == Host(gpus=2)
    (tmp_path / "ssh").write_text("#!/bin/sh\nexit 127\n")
    assert hostfile.ask("localhost") == Host()


def test_slots_against_gpus_and_ranks() -> None:
    slots, two = {"a": 2, "b": 2}, Host(gpus=2)
    assert_row(hostfile.judge(slots, {"a": two, "b": two}, 4, True), "green", "2 hosts, 4 slots")
    few = hostfile.judge(slots, {"a": two, "b": Host(gpus=1)}, 4, True)
    assert_row(few, "red", "b: 2 slots, 1 GPUs")
    more = hostfile.judge(slots, {"a": two, "b": Host(gpus=8)}, 4, True)
    assert_row(more, "yellow", "b: 2 slots, 8 GPUs")
    assert_row(
        hostfile.judge(slots, {"a": two, "b": Host()}, 3, True), "yellow", "3 ranks were started"
    )
    assert_row(hostfile.judge(slots, {"a": Host(), "b": Host()}, 4, False), "yellow", "pdsh is not")


# Room


def test_the_model_is_the_same_everywhere() -> None:
    here = resources.Model("LlamaForCausalLM", "d1", True)
    assert_row(resources.model(FOUR, all_four(here)), "green", "LlamaForCausalLM")
    other = resources.model(FOUR, all_four(here, r2=here._replace(what="Bert", digest="d2")))
    assert_row(other, "red", "rank 2 (b) has Bert")
    bare = resources.model(FOUR, all_four(here, r3=here._replace(weights=False)))
    assert_row(bare, "red", "rank 3 (b): no .safetensors")


def test_memory() -> None:
    free, whole = all_four(Space(64 * GIB, 32 * GIB)), Layout()
    assert_row(
        resources.memory(FOUR, NEEDS, whole, all_four(GPU), free), "green", "8.00 GiB a rank"
    )
    full = all_four(GPU, r1=replace(GPU, free=7 * GIB))
    assert_row(resources.memory(FOUR, NEEDS, whole, full, free), "red", "rank 1 (a)'s accelerator")
    tight = all_four(GPU, r1=replace(GPU, free=9 * GIB))
    assert_row(resources.memory(FOUR, NEEDS, whole, tight, free), "yellow", "89% of 9.0 GiB")
    offloaded = Layout(offloaded=True)  # the shards of two ranks in their host's memory
    assert_row(resources.memory(FOUR, NEEDS, offloaded, full, free), "green", "38% of 32.0 GiB")
    little = all_four(Space(64 * GIB, 32 * GIB), r3=Space(64 * GIB, 11 * GIB))
    assert_row(resources.memory(FOUR, NEEDS, offloaded, full, little), "red", "b's memory")
    assert_row(resources.memory(FOUR, NEEDS, whole, all_four(CPU), little), "red", "b's memory")


def test_disk(tmp_path: Path) -> None:
    def judge(seen: dict[int, bool], needed: int | None, writes: bool, free: int = 9 * GIB) -> Row:
        return resources.disk(FOUR, Space(10 * GIB, free), seen, tmp_path / "run", needed, writes)

    assert_row(judge(all_four(True), GIB, True), "green", "9.0 GiB free", "all hosts share it")
    assert_row(judge(all_four(True), GIB, True, GIB // 2), "red", "1.00 GiB needed", "--snapshots")
    assert_row(judge(all_four(True), GIB, True, GIB + 1), "yellow", "make room")
    apart = all_four(True, r2=False, r3=False)
    assert_row(judge(apart, GIB, True), "red", "rank 2 (b) sees another folder", "all hosts share")
    assert_row(judge(apart, GIB, False), "green", "rank 2 (b) sees another folder, where nothing")


def test_tokens_and_folders_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = resources.leave_token(tmp_path / "not" / "there")
    assert token.path.parent == tmp_path and resources.sees(token)
    monkeypatch.setattr(resources, "SEEING", 0.1)
    assert not resources.sees(token._replace(text="of another host"))
    token.path.unlink()
    assert not resources.sees(token)
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="is a file"):
        machine.disk(tmp_path / "file" / "run")
