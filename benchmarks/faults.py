"""Fault injection: kills real runs at random moments, damages what they leave, and counts the outcomes.

    python benchmarks/faults.py --kills 8 --launched 1 --damage 1000
    python benchmarks/faults.py --kills 1000 --minutes 12

A run has two gloo ranks and a tiny model. SIGKILL takes a rank, or both as when the launcher's node is gone,
at any moment from the start of the processes to their end, also in snapshots, evaluations and results;
the same command is started again, and killed again, until it has come to its end. Then all that it
left is compared with a run that was never killed, bit for bit. After each kill the journal must be the
beginning of that run's. Most ranks are forked from a server that has imported everything; `--launched`
counts kills under deepspeed and torchrun themselves. Ctrl-C prints what there is so far.

What this does not show is power that fails: what a killed process wrote is in the page cache, synced or not.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from parts.common.machine import describe
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "helpers")]
from cli_fixtures import make_given  # noqa: E402
from command_line import Given  # noqa: E402
from fault_damage import Subject, adapter_case  # noqa: E402
from fault_launchers import VICTIMS, Forked, Launched, World  # noqa: E402
from fault_runs import (  # noqa: E402
    METHODS,
    SHARDINGS,
    STEPS,
    arguments_of,
    differences,
    done_in,
    fresh,
    left_by,
    phase,
    start_ranks,
)

from tezo_ds.run.folder import JOURNAL  # noqa: E402
from tezo_ds.run.journal import read_journal  # noqa: E402

PHASES = ("loading", "step", "snapshot", "evaluation", "results", "over")
HANGS = 180  # seconds without a word after which a run that was not killed counts as hung
TRAINED_ON = 25  # of so many damaged runs one trains on to its end


@dataclass
class Tally:
    """Counts of kills and damage, by outcome."""

    kills: Counter[tuple[str, str]] = field(default_factory=Counter)  # by victim and phase
    launched: int = 0  # of the kills, under real launchers
    resumes: int = 0
    finished: Counter[str] = field(default_factory=Counter)  # runs, by way
    by_way: Counter[str] = field(default_factory=Counter)  # kills
    identical: Counter[str] = field(default_factory=Counter)
    damage: Counter[tuple[str, str]] = field(default_factory=Counter)  # by part and what came of it
    adapters: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


@dataclass
class Faults:
    """Kills and damage that are tried, and their outcomes.

    Attributes:
        given: model and data.
        work: folder for runs.
        kept: folder of what went wrong.
        drawn: random numbers that choose moments, victims and damage.
        until: Unix time to end at.
        tally: outcomes so far.
    """

    given: Given
    work: Path
    kept: Path
    drawn: random.Random
    until: float
    tally: Tally = field(default_factory=Tally)
    wholes: dict[tuple[str, str], tuple[Path, float]] = field(default_factory=dict)

    def whole(self, sharding: str, method: str) -> tuple[Path, float]:
        """Makes a run that is never killed, once; returns its folder and seconds."""
        if (sharding, method) not in self.wholes:
            run = fresh(self.work / f"{sharding}-{method}-whole")
            log, begun = run.with_suffix(".log"), time.time()
            world = Forked(arguments_of(self.given, run, sharding, method), log)
            if not world.wait(HANGS) or world.code:
                raise SystemExit(f"{run}: a run that nobody killed failed; see {log}")
            self.wholes[sharding, method] = run, time.time() - begun
        return self.wholes[sharding, method]

    def fail(self, what: str, run: Path) -> None:
        """Notes what went wrong, and keeps a run's folder and logs."""
        kept = self.kept / f"{len(self.tally.wrong):03d}"
        fresh(kept)
        for path in run.parent.glob(f"{run.name}*"):
            shutil.copytree(path, kept / path.name) if path.is_dir() else shutil.copy(path, kept)
        self.tally.wrong.append(f"{run.name}: {what} (kept in {kept})")

    def killed_until_done(
        self, sharding: str, method: str, kills: int, start: Callable[..., World], patient: float
    ) -> int:
        """Makes one run to its end with at most `kills` kills; returns how many it took."""
        whole, seconds = self.whole(sharding, method)
        expected, way = left_by(whole), f"{sharding} {method}"
        run = fresh(self.work / f"{sharding}-{method}-killed")
        for log in run.parent.glob(f"{run.name}.*.log"):
            log.unlink()
        done, killed = 0, 0
        while time.time() < self.until:
            log, begun = run.with_name(f"{run.name}.{killed:03d}.log"), time.time()
            world = start(arguments_of(self.given, run, sharding, method), log)
            last = killed == kills
            if not (_over(world, log) if last else self._ended(world, run, seconds + patient)):
                if last:
                    world.kill("launcher", 0)
                    self.fail("hangs", run)
                    return killed
                victim = self.drawn.choice(VICTIMS)
                world.kill(victim, self.drawn.choice([0, 0.5, 0.5, 20 + patient]))
                killed += 1
                self.tally.kills[victim, phase(run, begun)] += 1
                self.tally.by_way[way] += 1
                self._check_killed(run, log, done, expected["journal"])
                done = done_in(run)
                continue
            self.tally.resumes += killed
            self.tally.finished[way] += 1
            wrong = differences(expected, left_by(run)) if world.code == 0 else []
            if world.code or wrong:
                self.fail(f"exit code {world.code}, other {', '.join(wrong)}", run)
            else:
                self.tally.identical[way] += 1
            return killed
        return killed

    def _ended(self, world: World, run: Path, seconds: float) -> bool:
        """Waits for a random moment of a run's time, or of its steps, as others use this machine as well;
        returns whether the run has ended before."""
        if self.drawn.random() < 0.4:
            return world.wait(self.drawn.uniform(0, seconds))
        step, deadline = self.drawn.randint(0, STEPS), time.time() + HANGS
        while done_in(run) < step and time.time() < deadline:
            if world.wait(0.01):
                return True
        return world.wait(self.drawn.uniform(0, 1.5 if step == STEPS else 0.3))

    def _check_killed(self, run: Path, log: Path, before: int, expected: list[object]) -> None:
        """Checks after a kill that no step is lost, and none is there that a whole run has not."""
        steps = read_journal(run / JOURNAL).steps if (run / JOURNAL).exists() else []
        if len(steps) < before or steps != expected[: len(steps)]:
            self.fail(f"{len(steps)} steps after a kill, {before} before; or others", run)
        text = log.read_text()
        if "goes on after" in text and f"goes on after {before} steps" not in text:
            self.fail(f"goes on, but not after {before} steps", run)

    def damage(self, methods: list[str], cases: int) -> None:
        """Tries damaged copies of one run of each method."""
        each = cases // len(methods)
        for method in methods:
            runs = {}
            for steps in (7, 9):  # of which the second goes where the first may go on to
                run = fresh(self.work / f"damage-{method}-{steps}")
                arguments = self._plain(run, method, steps)
                start_ranks(arguments, run.with_suffix(".log"), size=1).wait(HANGS)
                runs[steps] = run
            subject, copy = Subject(runs[7]), self.work / "damage-copy"
            if subject.goes_on(runs[7]) != "identical":
                self.fail("goes on elsewhere without damage", runs[7])
            for number in range(each):
                if time.time() > self.until:
                    return
                parts = subject.parts()
                case, came = subject.try_one(parts[number % len(parts)], self.drawn, copy)
                if not number % TRAINED_ON and not came.startswith("wrong"):
                    came = self._trained_on(copy, method, runs[9], came)
                self.tally.damage[case.part, came.split(":")[0]] += 1
                if came.startswith("wrong"):
                    self.fail(f"{method}: {case.file.name} {case.what}: {came}", copy)
                if (copy / "adapter").exists():
                    read = adapter_case(runs[7], self.drawn, self.work / "adapter")
                    self.tally.adapters[read] += 1
                    if read.startswith("wrong"):
                        self.fail(f"{method}: adapter {read}", self.work / "adapter")

    def _plain(self, run: Path, method: str, steps: int) -> list[str]:
        short = {"steps": steps, "snapshot_every": 3, "eval_every": 0}
        return arguments_of(self.given, run, "none", method, **short)

    def _trained_on(self, run: Path, method: str, whole: Path, came: str) -> str:
        """Runs the same command in a damaged folder; returns what came of it."""
        log = run.with_suffix(".log")
        log.unlink(missing_ok=True)
        ranks = start_ranks(self._plain(run, method, 9), log, size=1)
        if not ranks.wait(HANGS):
            ranks.kill(0)
            return "wrong: hangs"
        errors = [line for line in log.read_text().splitlines() if "tezo-ds: error:" in line]
        if came == "refused":
            right = ranks.codes == [2] and len(errors) == 1 and "Traceback" not in log.read_text()
            return "refused (and by the command)" if right else f"wrong: exit code {ranks.codes}"
        if ranks.codes != [0]:
            return f"wrong: exit code {ranks.codes}"
        wrong = differences(left_by(whole), left_by(run))
        wrong = [name for name in wrong if name in ("journal", "coefficients", "adapter", "model")]
        return f"wrong: other {wrong}" if wrong else "identical (and trained on to the end)"


def _over(world: World, log: Path) -> bool:
    """Waits for a run that nobody kills, as long as its log grows; returns whether the run ended."""
    written = -1
    while (size := log.stat().st_size) > written:
        written = size
        if world.wait(HANGS):
            return True
    return False


def report(tally: Tally, console: Console) -> None:
    """Prints a tally."""
    table = Table("killed", *PHASES, "all", title="kills by victim and by what the run was doing")
    for victim in VICTIMS:
        row = [tally.kills[victim, name] for name in PHASES]
        table.add_row(victim, *map(str, row), str(sum(row)))
    console.print(table)
    ways = Table("way", "kills", "runs finished", "of them identical", title="runs")
    for way in sorted(tally.by_way):
        counts = (tally.by_way[way], tally.finished[way], tally.identical[way])
        ways.add_row(way, *map(str, counts))
    console.print(ways)
    damage = Table("damaged", "what came of it", "cases", title="damage")
    for (part, came), count in sorted(tally.damage.items()):
        damage.add_row(part, came, str(count))
    for came, count in sorted(tally.adapters.items()):
        damage.add_row("adapter, by peft", came, str(count))
    console.print(damage)
    console.print(
        f"{tally.kills.total()} kills ({tally.launched} under real launchers), {tally.resumes} resumes of "
        f"{tally.finished.total()} finished runs, {tally.identical.total()} identical; "
        f"{tally.damage.total()} damaged runs; {len(tally.wrong)} wrong"
    )
    for line in tally.wrong:
        console.print(line, soft_wrap=True)


def main() -> None:
    description, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sharding", nargs="+", choices=SHARDINGS, default=list(SHARDINGS))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--kills", type=int, default=8, help="of each sharding and method")
    parser.add_argument("--launched", type=int, default=0, help="likewise, under real launchers")
    parser.add_argument("--damage", type=int, default=1000, help="damaged copies, over all methods")
    parser.add_argument("--minutes", type=float, default=10**6, help="to stop after")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("/tmp/tezo-faults"))
    parser.add_argument("--kept", type=Path, help="of what went wrong; WORK/wrong")
    args = parser.parse_args()
    os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    paths = [
        str(ROOT),
        str(ROOT / "tests" / "helpers"),
        *filter(None, [os.environ.get("PYTHONPATH")]),
    ]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    console, work = Console(), fresh(args.work)
    console.print(describe())
    faults = Faults(
        make_given(work), work, args.kept or work / "wrong", random.Random(args.seed),
        time.time() + 60 * args.minutes,
    )  # fmt: skip
    start_ranks(["--help"], work / "help.log").wait(HANGS)  # the server imports before it forks
    try:
        kill_all(faults, args, console)
        if args.damage:
            faults.damage(args.methods, args.damage)
    except KeyboardInterrupt:
        console.print("stopped")
    report(faults.tally, console)
    sys.exit(1 if faults.tally.wrong else 0)


def kill_all(faults: Faults, args: argparse.Namespace, console: Console) -> None:
    """Kills runs of all ways in turn, until each has had its kills."""
    ways = [(sharding, method) for sharding in args.sharding for method in args.methods]
    launchers = (("forked", Forked, args.kills, 0.0), ("launched", Launched, args.launched, 15.0))
    for name, start, kills, patient in launchers:
        left = dict.fromkeys(ways, kills)
        while any(left.values()) and time.time() < faults.until:
            for way in (way for way in ways if left[way] > 0):
                killed = faults.killed_until_done(*way, min(left[way], 8), start, patient)
                left[way] -= max(killed, 1)
                faults.tally.launched += killed if name == "launched" else 0
                console.print(f"{name} {' '.join(way)}: {killed} kills, {left[way]} left")


if __name__ == "__main__":
    main()
