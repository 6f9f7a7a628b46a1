"""Two hosts with a slow link between them: real launchers across both; one host goes away and comes back."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from cli_fixtures import make_given
from command_line import Given, Run, assert_near, call
from fault_runs import done_in, start_ranks
from two_hosts import Host, TwoHosts, two_hosts, why_not

from tezo_ds.run.folder import JOURNAL
from tezo_ds.run.journal import read_journal

REASON = why_not()
pytestmark = [
    pytest.mark.skipif(REASON is not None, reason=REASON or ""),
    pytest.mark.launches,
    pytest.mark.waits,
]
ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tests" / "helpers" / "two_hosts.py"
RATE = 100e6  # bits a second, of the link
PATIENCE = 240  # seconds, with a start of four ranks
LIMIT = 6  # seconds of --timeout
PLAN = {"steps": 16, "lr": 1e-4}
# Sharded, it is most of what crosses the link.
SIZES = {"hidden_size": 122, "intermediate_size": 777}


@pytest.fixture(scope="module")
def hosts() -> Iterator[TwoHosts]:
    with two_hosts(f"{RATE:.0f}bit") as made:
        yield made


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Given:
    return make_given(tmp_path_factory.mktemp("given"), **SIZES)


@pytest.fixture(scope="module")
def alone(given: Given, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Trains the run of one process that the others are compared with."""
    run = Run(tmp_path_factory.mktemp("alone") / "run")
    assert call(*given.train(run.path, **PLAN)) == 0
    return run


def launch(
    host: Host, script: str, arguments: list[str], log: Path, **own: object
) -> subprocess.Popen[str]:
    """Starts a script of launch/ on a host, with variables of its own."""
    quiet = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": 1, "HF_HUB_OFFLINE": 1, **own}
    env = {**os.environ, **{key: str(value) for key, value in quiet.items()}}
    words = [ROOT / "launch" / script, *arguments[1:]]
    with log.open("w") as out:
        return host.start(*words, env=env, stdout=out, stderr=subprocess.STDOUT)


def seconds_to_send(host: Host, count: int) -> float:
    started = time.monotonic()
    host.run("bash", "-c", f"head -c {count} /dev/zero | ssh node2 'cat >/dev/null'")
    return time.monotonic() - started


def test_hosts_know_each_other_and_nothing_else(hosts: TwoHosts) -> None:
    first, second = hosts.first, hosts.second
    assert first.run("hostname", "-I").split() == [first.address]
    assert first.run("ssh", second.name, "hostname; hostname -I").split() == [
        second.name, second.address,
    ]  # fmt: skip
    assert first.run("pdsh", "-R", "ssh", "-w", "node1,node2", "echo %n").count("node") == 2
    with pytest.raises(RuntimeError, match=r"on node2: .*unreachable"):
        second.run("bash", "-c", "echo >/dev/tcp/192.0.2.1/22")
    assert str(os.getpid()) not in second.run("ps", "-eo", "pid=").split()
    with two_hosts() as others:  # at the same time, with the same names
        before = hosts.first.bytes()
        assert others.first.run("ssh", "node2", "hostname") == "node2\n"
        assert hosts.first.bytes() == before


def test_the_link_has_a_rate_and_counts(hosts: TwoHosts) -> None:
    before, count = [host.bytes() for host in hosts[:2]], 1_000_000
    try:
        hosts.limit("4mbit")
        slow = seconds_to_send(hosts.first, count)
    finally:
        hosts.limit(f"{RATE:.0f}bit")
    after = [host.bytes() for host in hosts[:2]]
    assert count < after[0].sent - before[0].sent < 1.2 * count
    assert after[0].sent - before[0].sent == after[1].received - before[1].received
    assert slow > 1.6 and slow > 2 * seconds_to_send(hosts.first, count)


def all_of(process: subprocess.Popen[bytes], names: set[str]) -> list[psutil.Process]:
    """Returns the processes that a process has started, once `names` are among them."""
    for _ in range(100):
        found = psutil.Process(process.pid).children(recursive=True)
        if names <= {each.name() for each in found}:
            return found
        time.sleep(0.1)
    raise AssertionError(f"no {names}")


def test_nothing_is_left_of_them(tmp_path: Path) -> None:
    numbers, started = (signal.SIGTERM, signal.SIGINT, signal.SIGKILL), []
    for number in numbers:
        (tmp_path / number.name).mkdir()
        started.append(subprocess.Popen(
            [sys.executable, SCRIPT, "--", "ssh", "node2", "sleep 999 & echo on; wait"],
            env={**os.environ, "TMPDIR": str(tmp_path / number.name)}, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, start_new_session=True,
        ))  # fmt: skip
    for process, number in zip(started, numbers, strict=True):
        assert process.stdout is not None and process.stdout.readline() == b"on\n"
        left = all_of(process, {"sshd", "sleep"})
        process.send_signal(number)
        assert not psutil.wait_procs(left, timeout=10)[1]
        assert process.wait(10) == (-9 if number == signal.SIGKILL else 128 + number)
        assert number == signal.SIGKILL or not list((tmp_path / number.name).iterdir())


def test_deepspeed_with_a_hostfile(
    hosts: TwoHosts, given: Given, alone: Run, tmp_path: Path
) -> None:
    config = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
    (tmp_path / "zero3.json").write_text(json.dumps({**config, "tezo": {}}))
    run, log = Run(tmp_path / "run"), tmp_path / "output"
    arguments = given.train(run.path, **PLAN, deepspeed=tmp_path / "zero3.json")
    before, started = hosts.first.bytes(), time.monotonic()
    process = launch(hosts.first, "hostfile.sh", arguments, log, HOSTFILE=hosts.hostfile(1))
    assert process.wait(PATIENCE) == 0, log.read_text()
    assert "Zero3 on 2 rank(s)" in log.read_text()
    assert_near(run, alone)
    after = hosts.first.bytes()
    crossed = [now - then for now, then in zip(after, before, strict=True)]
    weights = (given.model / "model.safetensors").stat().st_size
    assert min(crossed) > PLAN["steps"] * weights / 2  # each host has half of them
    assert 8 * max(crossed) / (time.monotonic() - started) < RATE


def until(happened: Callable[[], bool], log: Path, patience: float) -> None:
    """Waits for an event; shows a log if the event does not come."""
    deadline = time.monotonic() + patience
    while not happened():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)


def told(log: Path) -> re.Match[str] | None:
    """Finds the line in which the ranks of a host name the rank that they miss."""
    line = (
        r"tezo-ds: error: rank (?P<rank>\d) \(host (?P<host>\S+), .*(for (?P<gone>\d+) s|no answer)"
    )
    return re.search(line, log.read_text())


def test_a_host_that_goes_away_and_comes_back(
    hosts: TwoHosts, given: Given, alone: Run, tmp_path: Path
) -> None:
    """Ranks do nothing while the link is cut, so a run without a cut has the processors meanwhile."""
    run, whole = Run(tmp_path / "run"), Run(tmp_path / "whole")
    plan = {**PLAN, "fsdp": True, "timeout": LIMIT, "check_every": 1}
    same = {"NNODES": "2:2", "NPROC_PER_NODE": 2, "MASTER_ADDR": "node1", "RESTART_PAUSE": 2}
    logs, arguments = [tmp_path / host.name for host in hosts[:2]], given.train(run.path, **plan)
    first, second = (
        launch(host, "elastic.sh", arguments, log, **same)
        for host, log in zip(hosts[:2], logs, strict=True)
    )
    until(lambda: done_in(run.path) >= 4, logs[0], PATIENCE)
    hosts.cut()
    undisturbed = start_ranks(given.train(whole.path, **plan), tmp_path / "undisturbed", size=4)
    until(lambda: all(map(told, logs)), logs[0], PATIENCE)
    done = done_in(run.path)
    hosts.mend()  # soon, as TCP tries again after as long as it has waited so far
    missing, keeper = map(told, logs)
    assert missing is not None and missing.group("rank", "host") == ("2", "node2")
    assert keeper is not None and keeper.group("rank", "host") == ("0", "node1")
    assert "and 1 more have" in missing[0] and LIMIT <= int(missing["gone"]) < LIMIT + 10
    assert first.wait(PATIENCE) == second.wait(PATIENCE) == 0, logs[0].read_text()
    assert f"{run.path} goes on after {done} steps" in logs[0].read_text() and done >= 4
    assert undisturbed.wait(PATIENCE) and undisturbed.codes == [0] * 4
    steps = [read_journal(each.path / JOURNAL).steps for each in (run, whole)]
    assert steps[0] == steps[1] and len(steps[0]) == PLAN["steps"] > done
    assert_near(run, alone)
