"""`tezo-ds doctor` on machines and the network between them: every check is seen to fail, or to warn where
it can only warn."""

from __future__ import annotations

import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from doctors import CPU, FOUR, GPU, ONE, all_four, assert_row

from tezo_ds.doctor import machine, network, verdicts
from tezo_ds.doctor.machine import Space
from tezo_ds.doctor.network import Address, Listener
from tezo_ds.doctor.report import Failed, Row, row_of
from tezo_ds.doctor.verdicts import GIB

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
    assert_row(verdicts.versions(ONE, {0: {**here, "deepspeed": machine.ABSENT}}), "green")
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

    def fails(error: Exception) -> Row:
        raise error

    assert_row(row_of("disk", lambda: fails(OSError("it is full"))), "red", "it is full")
    row = row_of("bugs", lambda: fails(KeyError("a bug")))
    assert_row(row, "unchecked", "could not be judged: KeyError: 'a bug'", "report")


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
    """Makes reports in which four ranks reach each other, except for the ways named in `others`: r0_3=…"""
    return {a: {b: others.get(f"r{a}_{b}", 0.001) for b in range(4) if b != a} for a in range(4)}


def test_reachability() -> None:
    judge = verdicts.reachability
    slow = judge(FOUR, reached(r3_1=0.2), [])
    assert_row(slow, "green", "all 12 ways", "200.00 ms, rank 3 (b) to rank 1 (a)")
    dead = judge(FOUR, reached(r0_3=Failed("TimeoutError: timed out")), [])
    assert_row(dead, "red", "rank 0 (a) to rank 3 (b): TimeoutError: timed out", "firewall")
    local = judge(FOUR, reached(r0_3=Failed("refused")), [2, 3])
    assert_row(local, "red", "loopback", "GLOO_SOCKET_IFNAME")
    assert_row(judge(FOUR, reached(), [2, 3]), "red", "ranks 2, 3 listen(s) at a loopback address")
    assert_row(judge(ONE, {0: {}}, []), "unchecked", "one rank")


def test_bandwidth() -> None:
    rates = {0: (2, 125e6), 2: (0, 12.5e6)}
    row = verdicts.bandwidth(FOUR, rates, 10**9)
    assert_row(row, "yellow", "100 Mbit/s", "rank 2 (b) to rank 0 (a)", "80.0 s", "--fsdp-replicas")
    assert_row(verdicts.bandwidth(FOUR, rates, None), "green")
    assert_row(verdicts.bandwidth(FOUR, {0: (2, Failed("reset"))}, None), "red", "reset")


def test_a_listener_says_who_it_is_and_takes_what_comes() -> None:
    with Listener(3, "127.0.0.1") as listener:
        found = network.ping(3, listener.address)
        assert 0 < found < 1
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
