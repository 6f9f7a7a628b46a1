"""`tezo-ds doctor`: every check is seen red, or as a warning where it is never more; world_doctor.py has
those that take several ranks."""

from __future__ import annotations

import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from command_line import Given, call, free_port, strict_json
from tiny import tiny

from tezo_ds.config import TezoConfig
from tezo_ds.doctor import hostfile, machine, network, room, selftest, verdicts
from tezo_ds.doctor.examination import examine
from tezo_ds.doctor.hostfile import Host, check_hostfile, read_hostfile
from tezo_ds.doctor.machine import Accelerator, Space
from tezo_ds.doctor.meeting import THREAD, Meeting, meet, within
from tezo_ds.doctor.network import Address, Listener, Reached
from tezo_ds.doctor.plan import Plan
from tezo_ds.doctor.report import Failed, Row, exit_code, row_of, show
from tezo_ds.doctor.verdicts import GIB, Asked, Who
from tezo_ds.needs import RECORDS, Layout, Needs, factor_numel, needs, on_skeleton
from tezo_ds.session import Settings

pytest_plugins = ("cli_fixtures",)

FOUR = Asked({rank: Who("ab"[rank // 2], rank % 2) for rank in range(4)})  # on hosts a and b
ONE = Asked({0: Who("a", 0)})
GPU = Accelerator("cuda", 2, "H100", 80 * GIB, 79 * GIB, True, 16, 8, None)
CPU = Accelerator("cpu", 0, "x86_64", 0, 0, True, 2, 1, None)
NEEDS = Needs(shard=6 * GIB, gathered=GIB, probe=GIB, state=0, disk=5 * GIB, sent=10**9)


def all_four(value: Any, **others: Any) -> dict[int, Any]:
    """The same on four ranks, but for those that are named: r1=…"""
    return {rank: others.get(f"r{rank}", value) for rank in range(4)}


def assert_row(row: Row, status: str, *telling: str) -> None:
    assert row.status == status, row
    for words in telling:
        assert words in f"{row.found} | {row.advice}", row


# What the machines are


def test_ranks_that_are_missing_are_named() -> None:
    assert_row(verdicts.ranks(FOUR, 4), "green", "4 of 4 on 2 host(s) (a: 2, b: 2)")
    assert_row(verdicts.ranks(FOUR, 6), "red", "ranks 4, 5 did not report", "MASTER_ADDR")


def test_versions() -> None:
    here = machine.versions()
    assert_row(verdicts.versions(FOUR, all_four(here)), "green", here["torch"], here["tezo_ds"])
    other = verdicts.versions(FOUR, all_four(here, r3={**here, "torch": "2.12.1"}))
    assert_row(other, "red", "torch is", "2.12.1 on rank 3 (b)", "install the same")
    code = verdicts.versions(FOUR, all_four(here, r2={**here, "tezo_ds": "0.1.0 (00000000)"}))
    assert_row(code, "red", "0.1.0 (00000000) on rank 2 (b)")
    old = verdicts.versions(FOUR, all_four({**here, "deepspeed": "0.19.6"}))
    assert_row(old, "red", "deepspeed is 0.19.6, supported is >=0.19.8")
    assert_row(verdicts.versions(ONE, {0: {**here, "transformers": machine.ABSENT}}), "red")
    assert_row(verdicts.versions(ONE, {0: {**here, "python": "3.9.1"}}), "red", ">=3.10")
    vendors = {**here, "torch": "2.8.0a0+5228986c39.nv25.05"}
    assert_row(verdicts.versions(ONE, {0: vendors}), "green")


def test_accelerators() -> None:
    judge = verdicts.accelerators
    assert_row(judge(FOUR, all_four(GPU), True), "green", "4 x H100, 80 GiB (cuda)")
    smaller = replace(GPU, name="A100", total=40 * GIB)
    assert_row(judge(FOUR, all_four(GPU, r3=smaller), True), "yellow", "A100, 40 GiB on rank 3 (b)")
    assert_row(judge(FOUR, all_four(GPU, r1=CPU), True), "red", "on rank 1 (a)", "the same kind")
    too_few = judge(FOUR, all_four(GPU, r1=replace(GPU, count=1)), True)
    assert_row(too_few, "red", "rank 1 (a) is number 2 of its host, which shows 1")
    narrow = all_four(GPU, r2=replace(GPU, bf16=False))
    assert_row(judge(FOUR, narrow, True), "red", "no bfloat16 on rank 2")
    assert_row(judge(FOUR, narrow, False), "green")
    elsewhere = replace(GPU, deepspeed="cpu")
    assert_row(judge(FOUR, all_four(elsewhere), True), "red", "DS_ACCELERATOR=cuda")
    assert_row(judge(FOUR, all_four(CPU), True), "green", "none: forwards run on the CPU, 2 cores")
    crowded = judge(FOUR, all_four(CPU, r2=replace(CPU, threads=2)), True)
    assert_row(crowded, "yellow", "more threads than cores on b", "OMP_NUM_THREADS")


def test_backend_shared_memory_and_open_files() -> None:
    assert_row(verdicts.backend("nccl", False), "red", "built without nccl")
    roomy, docker = Space(2 * GIB, 2 * GIB), Space(64 << 20, 64 << 20)
    assert_row(
        verdicts.shared_memory(FOUR, all_four(roomy, r3=docker), True), "yellow", "of b", "--shm"
    )
    assert_row(verdicts.shared_memory(FOUR, all_four(roomy), True), "green")
    assert_row(verdicts.shared_memory(FOUR, all_four(docker), False), "unchecked", "gloo")
    assert_row(
        verdicts.open_files(FOUR, all_four(-1, r2=256), 4), "yellow", "256 on b", "ulimit -n"
    )
    assert_row(verdicts.open_files(FOUR, all_four(-1), 4), "green", "no limit")


def test_a_rank_that_could_not_look_is_red_and_named() -> None:
    def judge(found: dict[int, int]) -> Row:
        return verdicts.open_files(FOUR, found, 4)

    row = verdicts.settled("open files", FOUR, all_four(9999, r3=Failed("OSError: no")), judge)
    assert_row(row, "red", "rank 3 (b): OSError: no")
    assert_row(verdicts.settled("open files", FOUR, {0: 1, 1: 1, 2: 1}, judge), "red", "no answer")

    def fails() -> Row:
        raise KeyError("a bug")

    assert_row(row_of("bugs", fails), "red", "KeyError: 'a bug'")


def test_memory_of_a_container_is_its_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    whole = machine.memory()
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("1000\n")
    assert machine.memory().total == whole.total
    (tmp_path / "memory.max").write_text("5000\n")
    assert machine.memory() == Space(5000, 4000)


# The network


def reached(**others: Any) -> dict[int, dict[int, Any]]:
    """Of four ranks all ways, but for those that are named: r0_3=…"""
    fine = Reached(0.001, 0.0)
    return {a: {b: others.get(f"r{a}_{b}", fine) for b in range(4) if b != a} for a in range(4)}


def test_reachability() -> None:
    judge = verdicts.reachability
    slow = judge(FOUR, reached(r3_1=Reached(0.2, 0.0)), [])
    assert_row(slow, "green", "all 12 ways", "200.00 ms, rank 3 (b) to rank 1 (a)")
    dead = judge(FOUR, reached(r0_3=Failed("TimeoutError: timed out")), [])
    assert_row(dead, "red", "rank 0 (a) to rank 3 (b): TimeoutError: timed out", "firewall")
    local = judge(FOUR, reached(r0_3=Failed("refused")), [2, 3])
    assert_row(local, "red", "loopback", "GLOO_SOCKET_IFNAME")
    assert_row(judge(FOUR, reached(), [2, 3]), "red", "ranks 2, 3 listen(s) at a loopback address")
    assert_row(judge(ONE, {0: {}}, []), "unchecked", "one rank")


def test_bandwidth_and_clocks() -> None:
    rates = {0: (2, 125e6), 2: (0, 12.5e6)}
    row = verdicts.bandwidth(FOUR, rates, 10**9)
    assert_row(row, "yellow", "100 Mbit/s", "rank 2 (b) to rank 0 (a)", "80.0 s", "--fsdp-replicas")
    assert_row(verdicts.bandwidth(FOUR, rates, None), "green")
    assert_row(verdicts.bandwidth(FOUR, {0: (2, Failed("reset"))}, None), "red", "reset")
    late = reached(r0_2=Reached(0.001, -7.5), r0_1=Reached(0.001, 99.0))[0]  # 1 is on 0's host
    assert_row(verdicts.clocks(FOUR, late), "yellow", "rank 2 (b) is -7.500 s", "0.5 ms", "ntp")
    assert_row(verdicts.clocks(FOUR, reached()[0]), "green")
    assert_row(verdicts.clocks(ONE, {}), "unchecked")


def test_a_listener_says_who_it_is_and_takes_what_comes() -> None:
    with Listener(3, "127.0.0.1") as listener:
        found = network.ping(3, listener.address)
        assert 0 < found.round_trip < 1 and abs(found.ahead) < 0.5
        assert network.rate(3, listener.address) > 1e6
        with pytest.raises(
            OSError, match=r"rank 3 answers at 127\.0\.0\.1, where rank 2 should be"
        ):
            network.ping(2, listener.address)
    with pytest.raises(OSError):
        network.ping(3, listener.address)


def test_a_listener_that_never_answers_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "CONNECT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = Address(*silent.getsockname())
        found = network.reach_all(0, {0: address, 1: address})
    assert isinstance(found[1], Failed) and "timed out" in found[1].why and len(found) == 1


def test_the_interface_of_collectives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    assert network.own_address("gloo") == "127.0.0.1"
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "=nowhere0")
    with pytest.raises(OSError, match="NCCL_SOCKET_IFNAME is =nowhere0, and there is no such"):
        network.own_address("nccl")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    monkeypatch.setattr(socket, "gethostname", lambda: "no-such-host.invalid")
    with pytest.raises(OSError, match="does not resolve, which gloo needs"):
        network.own_address("gloo")


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
    here = room.Model("LlamaForCausalLM", "d1", True)
    assert_row(room.model(FOUR, all_four(here)), "green", "LlamaForCausalLM")
    other = room.model(FOUR, all_four(here, r2=here._replace(what="Bert", digest="d2")))
    assert_row(other, "red", "rank 2 (b) has Bert")
    bare = room.model(FOUR, all_four(here, r3=here._replace(weights=False)))
    assert_row(bare, "red", "rank 3 (b): no .safetensors")


def test_memory() -> None:
    free, whole = all_four(Space(64 * GIB, 32 * GIB)), Layout()
    assert_row(room.memory(FOUR, NEEDS, whole, all_four(GPU), free), "green", "8.00 GiB a rank")
    full = all_four(GPU, r1=replace(GPU, free=7 * GIB))
    assert_row(room.memory(FOUR, NEEDS, whole, full, free), "red", "rank 1 (a)'s accelerator")
    tight = all_four(GPU, r1=replace(GPU, free=9 * GIB))
    assert_row(room.memory(FOUR, NEEDS, whole, tight, free), "yellow", "89% of 9.0 GiB")
    offloaded = Layout(offloaded=True)  # the shards of two ranks in their host's memory
    assert_row(room.memory(FOUR, NEEDS, offloaded, full, free), "green", "38% of 32.0 GiB")
    little = all_four(Space(64 * GIB, 32 * GIB), r3=Space(64 * GIB, 11 * GIB))
    assert_row(room.memory(FOUR, NEEDS, offloaded, full, little), "red", "b's memory")
    assert_row(room.memory(FOUR, NEEDS, whole, all_four(CPU), little), "red", "b's memory")


def test_disk(tmp_path: Path) -> None:
    def judge(seen: dict[int, bool], needed: int | None, writes: bool, free: int = 9 * GIB) -> Row:
        return room.disk(FOUR, Space(10 * GIB, free), seen, tmp_path / "run", needed, writes)

    assert_row(judge(all_four(True), GIB, True), "green", "9.0 GiB free", "all hosts share it")
    assert_row(judge(all_four(True), GIB, True, GIB // 2), "red", "1.00 GiB needed", "--snapshots")
    assert_row(judge(all_four(True), GIB, True, GIB + 1), "yellow", "make room")
    apart = all_four(True, r2=False, r3=False)
    assert_row(judge(apart, GIB, True), "red", "rank 2 (b) sees another folder", "all hosts share")
    assert_row(judge(apart, GIB, False), "green", "rank 2 (b) sees another folder, where nothing")


def test_tokens_and_folders_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = room.leave_token(tmp_path / "not" / "there")
    assert token.path.parent == tmp_path and room.sees(token)
    monkeypatch.setattr(room, "SEEING", 0.1)
    assert not room.sees(token._replace(text="of another host"))
    token.path.unlink()
    assert not room.sees(token)
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="is a file"):
        machine.disk(tmp_path / "file" / "run")


# What a run needs


def test_needs_of_a_tiny_model() -> None:
    with torch.device("meta"):
        model = tiny()
    numel = sum(p.numel() for p in model.parameters())
    matrices = {n: p for n, p in model.named_parameters() if p.dim() == 2}
    trained = sum(p.numel() for p in matrices.values())

    def of(layout: Layout, **fields: Any) -> Needs:
        run = on_skeleton(model, TezoConfig(**{"rank": 3, **fields}))
        return needs(run, layout, None, snapshots=2, model=False)

    factors = 3 * sum(sum(p.shape) for p in matrices.values())
    whole = of(Layout())
    assert (whole.shard, whole.gathered, whole.probe) == (4 * numel, 0, 4 * factors)
    assert whole.state == 8 * 3 * len(matrices)
    assert whole.disk == RECORDS + 3 * whole.state + 4 * factors
    assert of(Layout(), probe="inplace").probe == 4 * (factors + trained)
    lozo = of(Layout(), method="lozo", queries=2)
    left = sum(p.shape[0] for p in matrices.values())
    assert lozo.probe == 4 * (factors + 2 * 3 * left)
    assert lozo.disk > RECORDS + 3 * 4 * trained
    adam = of(Layout(2), method="mezo-adam")
    assert adam.probe == 0 and adam.state > 8 * trained // 2
    auto = on_skeleton(model, TezoConfig(rank="auto", rank_max=5))
    assert factor_numel(auto.method, auto.config, auto.space.matrices) == 5 * factors // 3
    three = of(Layout(3, gathers=True))
    assert 4 * numel / 3 <= three.shard < 4 * numel / 3 + 4 * 2 * len(list(model.parameters()))
    block = 4 * sum(p.numel() for p in model.model.layers[0].parameters())
    assert three.gathered == 4 * numel  # two blocks are all that there are
    assert three.sent == 4 * numel > 2 * block
    assert of(Layout(4, second=2, gathers=True)).shard > 0.74 * 4 * numel


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


def plain_plan(**fields: Any) -> Plan:
    return Plan(Settings(model="", task=""), TezoConfig(rank=3), **fields)


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
    assert call("doctor", "--hostfile", tmp_path / "hosts", "--model", tmp_path / "no-model") == 1
    out = capfd.readouterr().out
    assert (
        "a is there twice" in out and "cannot load a model from" in out and "Traceback" not in out
    )
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
