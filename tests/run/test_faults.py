"""Faults that lose nothing and pass no damage: processes that are killed, full and read-only disks, two
runs in one folder, bits that flip. benchmarks/faults.py does the same at length."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command_line import Given, call
from fault_damage import Subject
from fault_runs import (
    Ranks,
    arguments_of,
    differences,
    done_in,
    left_by,
    start_ranks,
)

from tezo_ds.run import folder
from tezo_ds.run.folder import JOURNAL, SNAPSHOTS
from tezo_ds.run.journal import Journal
from tezo_ds.training import loop

pytest_plugins = ("cli_fixtures",)

Captured = pytest.CaptureFixture[str]
SECONDS = 100  # that a run may take
SHORT = {"steps": 11, "snapshot_every": 4, "eval_every": 0}
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")


def until_done(ranks: Ranks, run: Path, steps: int) -> None:
    """Waits until `steps` steps are on disk."""
    deadline = time.monotonic() + SECONDS
    while done_in(run) < steps:
        assert None in ranks.codes and time.monotonic() < deadline, ranks.log.read_text()
        time.sleep(0.01)


@pytest.mark.launches
@pytest.mark.waits
def test_a_rank_that_is_killed_loses_nothing(given: Given, tmp_path: Path) -> None:
    """A killed run resumes and loses nothing; another run in a folder that is in use is refused and harms
    nothing. The benchmark kills runs of all methods under ZeRO-3 and FSDP2."""
    sharding, method, victim = "zero3", "lozo-m", 0
    whole, run = tmp_path / "whole", tmp_path / "run"

    def start(path: Path, log: str) -> Ranks:
        arguments = arguments_of(given, path, sharding, method, timeout=120, **SHORT)
        return start_ranks(arguments, tmp_path / log)

    first = start(whole, "whole.log")
    until_done(first, whole, 1)
    first.signal(signal.SIGSTOP)  # or it might end before the second begins
    second = start(whole, "second.log")
    assert second.wait(SECONDS)
    first.signal(signal.SIGCONT)
    killed = start(run, "killed.log")
    until_done(killed, run, 6)
    killed.kill(victim)
    killed.end(patience=0)
    done = done_in(run)
    assert 6 <= done < SHORT["steps"]
    again = start(run, "again.log")
    for ranks, codes in ((first, [0, 0]), (second, [2, 2]), (again, [0, 0])):
        assert ranks.wait(SECONDS) and ranks.codes == codes, ranks.log.read_text()
    assert second.log.read_text().count("trains in it; wait for it to end") == 1
    log = again.log.read_text()
    assert f"goes on after {done} steps" in log
    assert f"replaying {done % 4} steps" in log or done % 4 == 0  # from the newest snapshot
    assert differences(left_by(whole), left_by(run)) == []


class Disk:
    """A file system of a few MiB."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._filler = path / "filler"

    def fill(self, left: int = 0) -> None:
        """Fills the disk up to `left` bytes."""
        space = os.statvfs(self.path)
        with self._filler.open("ab") as filler:
            filler.write(bytes(max(space.f_bavail * space.f_frsize - left, 0)))

    def clear(self) -> None:
        """Makes room on the disk."""
        self._filler.unlink(missing_ok=True)

    def remount(self, how: str) -> None:
        """Mounts the disk again, `how`: ro or rw."""
        subprocess.run(["mount", "-o", f"remount,{how}", str(self.path)], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(path)]
    if mounted := subprocess.run(mount, capture_output=True, text=True, check=False).returncode:
        pytest.skip(f"mount gives {mounted}: no small disk can be had here")
    try:
        yield Disk(path)
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


PLAIN: dict[str, dict[str, Any]] = {
    "tezo": {"steps": 14, "snapshot_every": 4, "queries": 8},  # so long lines fill pages soon
    "mezo-adam": {
        "steps": 6, "snapshot_every": 2, "rank": None, "lr": 2e-4, "include": "*v_proj*",
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def wholes(given: Given, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Trains, by each method of `PLAIN`, a run that nothing happens to."""
    runs = {method: tmp_path_factory.mktemp("wholes") / "run" for method in PLAIN}
    for method, options in PLAIN.items():
        assert call(*given.train(runs[method], method=method, **options)) == 0
    return runs


def one_line(captured: Captured) -> str:
    """Returns the error that a command printed, and asserts that nothing else went to stderr."""
    err = captured.readouterr().err
    lines = [line for line in err.splitlines() if "Writing model shards" not in line]
    assert len(lines) == 1 and lines[0].startswith("tezo-ds: error: "), err
    return lines[0]


def full_before(where: Any, name: str, disk: Disk, patch: pytest.MonkeyPatch, nth: int = 1) -> None:
    """Fills a disk before the nth call of a function."""
    function, calls = getattr(where, name), 0

    def filled(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == nth:
            disk.fill()
        return function(*arguments, **named)

    patch.setattr(where, name, filled)


@needs_root
@pytest.mark.parametrize(
    ("method", "where", "name", "nth", "named"),
    [
        ("tezo", folder.RunFolder, "_take_lock", 1, ""),
        ("tezo", folder.RunFolder, "log_step", 2, ""),
        ("tezo", loop, "snapshot", 2, SNAPSHOTS),
        ("tezo", loop, "write_results", 1, ""),
        ("mezo-adam", loop, "snapshot", 2, SNAPSHOTS),
        ("mezo-adam", loop._Training, "_save_model", 1, "model"),
    ],
    ids=("lock", "journal", "state", "results", "shards", "model"),
)
def test_a_full_disk(
    given: Given, wholes: dict[str, Path], disk: Disk, method: str, where: Any, name: str, nth: int,
    named: str, monkeypatch: pytest.MonkeyPatch, capfd: Captured,
) -> None:  # fmt: skip
    run = disk.path / "run"
    arguments = given.train(run, method=method, **PLAIN[method])
    capfd.readouterr()
    with monkeypatch.context() as patch:
        full_before(where, name, disk, patch, nth)
        assert call(*arguments) == 2
    error = one_line(capfd)
    assert str(run / named) in error and "No space left on device" in error, error
    done = done_in(run)
    disk.clear()
    assert call(*arguments) == 0
    assert not done or f"goes on after {done} steps" in capfd.readouterr().out
    assert differences(left_by(wholes[method]), left_by(run)) == []


@needs_root
@pytest.mark.parametrize("merged", [True, False])
def test_an_export_to_a_full_disk(
    wholes: dict[str, Path], disk: Disk, merged: bool, capfd: Captured
) -> None:
    disk.fill(left=16384)
    way = "--merged" if merged else "--adapter"
    command = ("export", "--run", wholes["tezo"], way, disk.path / "out")
    capfd.readouterr()
    assert call(*command) == 2
    assert "No space left on device" in one_line(capfd)
    disk.clear()
    assert call(*command) == 0


@needs_root
def test_a_read_only_folder(
    given: Given, wholes: dict[str, Path], disk: Disk, capfd: Captured
) -> None:
    run = disk.path / "run"
    shutil.copytree(wholes["tezo"], run)
    disk.remount("ro")
    for path in (run, disk.path / "new"):
        capfd.readouterr()
        assert call(*given.train(path, method="tezo", **{**PLAIN["tezo"], "steps": 15})) == 2
        error = one_line(capfd)
        assert f"{path}: cannot be written (Read-only file system)" in error
    assert call("evaluate", "--run", run) == 0  # which only reads
    disk.remount("rw")
    assert differences(left_by(wholes["tezo"]), left_by(run)) == []


@pytest.mark.parametrize("method", PLAIN)
def test_damage_is_refused_or_made_up_for(
    given: Given, wholes: dict[str, Path], method: str, tmp_path: Path
) -> None:
    subject, drawn = Subject(wholes[method]), random.Random(method)
    assert subject.goes_on(wholes[method]) == "identical"
    came = {}
    for _ in range(5):
        for part in subject.parts():
            case, what = subject.try_one(part, drawn, tmp_path / "copy")
            came[part, what] = case
    assert {what for _, what in came} == {"identical", "refused"}, came
    assert all(part == "journal" for part, what in came if what == "refused"), came


def test_damage_that_checksums_did_not_show_would_be_taken(
    wholes: dict[str, Path], tmp_path: Path
) -> None:
    """Hazard: a slope of which a digit has changed is taken, if its line has the checksum for it."""
    subject, run = Subject(wholes["tezo"]), tmp_path / "run"
    shutil.copytree(wholes["tezo"], run)
    lines = [json.loads(line) for line in (run / JOURNAL).read_text().splitlines()]
    lines[3]["kappa"][0] *= 1.1
    (run / JOURNAL).write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert subject.goes_on(run) == "refused"
    (run / JOURNAL).unlink()
    header, *steps = ({k: v for k, v in line.items() if k != "sum"} for line in lines)
    journal = Journal(run / JOURNAL, header)
    for step in steps:
        journal.append(step)
    journal.close()
    assert subject.goes_on(run).startswith("wrong")
