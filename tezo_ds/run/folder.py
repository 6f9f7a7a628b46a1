"""A run's folder on disk; rank 0 alone writes, and one process at a time."""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
import socket
import statistics
from collections.abc import Mapping, Sequence
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Any

from tezo_ds.engine.report import StepReport
from tezo_ds.errors import ConfigError, StorageError
from tezo_ds.files.text import to_json
from tezo_ds.run.journal import Contents, Journal, packed, read_journal

CONFIG, METRICS, SUMMARY, JOURNAL = "config.json", "metrics.jsonl", "summary.json", "journal.jsonl"
COEFFICIENTS, ADAPTER, CURVE = "coefficients.safetensors", "adapter", "curve.png"
REPORT = "report.html"
MODEL, SNAPSHOTS, LOCK = "model", "snapshots", ".lock"
TRUNK_CACHE, OUTPUT_LAYER = "trunk_cache", "output_layer"
TEST, VALIDATION = PARTS = ("test", "validation")  # parts that evaluations score
SAMPLES = "samples.jsonl"
LAYERS, LAYERS_PICTURE = "layers.json", "layers.png"
TRACKERS, TENSORBOARD = "trackers.json", "tensorboard"


class RunFolder:
    """The files of one run, new or resumed.

    Attributes:
        path: the folder's path.
        contents: the journal as it was found; None for a new run.

    Raises:
        StorageError: the folder cannot be made or read, another process trains in it, or its journal is
            damaged.
        ConfigError: the folder holds a run without a journal.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._journal: Journal | None = None
        self._metrics: FileIO | None = None
        self._made = not os.path.exists(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = (path / LOCK).open("a+")
            self._take_lock()
        except OSError as error:
            raise StorageError(f"{path}: cannot be written ({error.strerror})") from None
        self.contents: Contents | None = None
        if (path / JOURNAL).exists():
            found = read_journal(path / JOURNAL)
            self.contents = found if found.header else None
        elif (path / METRICS).exists():
            raise ConfigError(
                f"{path} holds a run without {JOURNAL}, so it cannot go on; choose another --output, or "
                "remove it"
            )

    def _take_lock(self) -> None:
        """Locks the folder; the system releases the lock when this process ends, however it ends."""
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.seek(0)
            holder = self._lock.read().strip() or "another process"
            raise StorageError(
                f"{self.path}: {holder} trains in it; wait for it to end, or choose another --output"
            ) from None
        self._lock.truncate(0)
        note = f"process {os.getpid()} on {socket.gethostname()}"
        try:
            os.write(self._lock.fileno(), note.encode())
        except OSError:
            self._lock.close()
            raise

    def open(self, config: Mapping[str, Any], header: Mapping[str, Any]) -> None:
        """Opens the folder for writing further steps, after those that are there.

        Args:
            config: content of config.json.
            header: header of a new journal.

        Raises:
            StorageError: a file cannot be written.
        """
        self.write_json(CONFIG, config)
        self._clear()
        done = len(self.contents.steps) if self.contents else 0
        # First, as metrics without a journal are those of a run that cannot go on.
        self._journal = Journal(self.path / JOURNAL, header, self.contents)
        self._keep_metrics(done, config.get("steps"))

    def _clear(self) -> None:
        """Removes results, which are of fewer steps, and files that a killed run did not rename."""
        for name in (SUMMARY, COEFFICIENTS, CURVE, REPORT):
            try:
                (self.path / name).unlink(missing_ok=True)
            except OSError as error:  # a folder of that name, a disk that can only be read
                raise StorageError(
                    f"{self.path / name}: cannot be removed ({error.strerror})"
                ) from None
        for path in (self.path / ADAPTER, self.path / MODEL, *self.path.glob(f".{ADAPTER}.*")):
            shutil.rmtree(path, ignore_errors=True)
        for name in (CONFIG, METRICS, SUMMARY, COEFFICIENTS):
            for path in self.path.glob(f".{name}.*"):
                path.unlink()

    def _keep_metrics(self, done: int, steps: int | None) -> None:
        """Keeps the lines of metrics.jsonl that belong to the steps that are done: they come before the
        journal's, and a killed run may have left half of one. The evaluation at the end is made again."""
        path = self.path / METRICS
        try:
            texts = path.read_text(errors="replace").splitlines() if path.exists() else []
            lines = [line for line in map(_parsed, texts) if line and _done(line, done, steps)]
            partial = path.with_name(f".{METRICS}.{os.getpid()}")
            partial.write_text("".join(f"{to_json(line)}\n" for line in lines))
            partial.replace(path)
            # Unbuffered: a line is on its way at once, and one that found no room is not tried again.
            self._metrics = path.open("ab", buffering=0)
        except OSError as error:
            raise StorageError(f"{path}: cannot be written ({error.strerror})") from None

    @property
    def sum(self) -> str:
        """Checksum of the journal's last line."""
        assert self._journal is not None, "opened before"
        return self._journal.sum

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Writes a JSON file through a temporary name, so that the file is never half there.

        Raises:
            StorageError: the file cannot be written.
        """
        partial = self.path / f".{name}.{os.getpid()}"
        try:
            with partial.open("w") as file:
                file.write(to_json(content, indent=2) + "\n")
                file.flush()
                os.fsync(
                    file.fileno()
                )  # else power that fails could leave the name without content
            partial.replace(self.path / name)
        except OSError as error:
            with suppress(OSError):  # a disk that can only be read
                partial.unlink(missing_ok=True)
            raise StorageError(
                f"{self.path / name}: cannot be written ({error.strerror}); make room, then start the "
                "same command to go on"
            ) from None

    def log_step(
        self, report: StepReport, seen: int, more: Mapping[str, Any] | None = None
    ) -> None:
        """Writes a step's lines in metrics.jsonl and in the journal, on disk when this returns. A step counts
        by its journal line; one without is made again, with both lines.

        Args:
            report: the step's report.
            seen: examples that the run has trained on since it began, over all ranks.
            more: fields for the journal alone: "state", a digest of what is equal on all ranks after the
                step, and "cost", the cost of a forward.

        Raises:
            StorageError: a line cannot be written.
        """
        journal = self._journal
        assert journal is not None, "opened before"
        slopes = {"step": report.step, "kappa": report.kappa, "rho": report.rho, "lr": report.lr}
        if report.solved is not None:
            slopes["solved"] = report.solved
        if report.rewards is not None:
            slopes["rewards"] = report.rewards
        self._log({**packed(slopes), **measured(report)})
        journal.append({**slopes, "loss": report.loss, "seen": seen, **(more or {})})

    def log_score(
        self,
        step: int,
        accuracy: float | None,
        loss: float,
        examples: int,
        after: str | None = None,
        metric: float | None = None,
        part: str = TEST,
        answers: Sequence[str] = (),
    ) -> None:
        """Writes one line for an evaluation after `step` steps, and `after` what else, if anything; with the
        `metric` of generated answers and some of them, if there are any, and of which part the examples
        are."""
        line = {"step": step, f"{part}_accuracy": accuracy, f"{part}_loss": loss}
        more = {"after": after, f"{part}_metric": metric, f"{part}_answers": list(answers) or None}
        known = {name: value for name, value in more.items() if value is not None}
        self._log({**line, f"{part}_examples": examples, **known})

    def _log(self, line: dict[str, Any]) -> None:
        assert self._metrics is not None, "opened before"
        try:
            text = f"{to_json(line)}\n".encode()
            if self._metrics.write(text) < len(text):
                raise OSError(28, "No space left on device")
        except OSError as error:
            raise StorageError(
                f"{self.path / METRICS}: cannot be written ({error.strerror}); make room, then start the "
                "same command to go on"
            ) from None

    def close(self) -> None:
        """Closes all files and releases the lock. Removes a folder made here in which no run began."""
        for file in (self._journal, self._metrics, self._lock):
            if file is not None:
                file.close()
        self._journal = self._metrics = None
        if self._made and [path.name for path in self.path.glob("*")] == [LOCK]:
            with suppress(OSError):
                (self.path / LOCK).unlink()
                self.path.rmdir()


def measured(report: StepReport) -> dict[str, Any]:
    """Returns fields of a step's line in metrics.jsonl that nothing is rebuilt from."""
    found = report.quality
    return {
        "loss": report.loss, "seconds": round(report.seconds, 4), "tokens": report.tokens,
        "dropped": report.dropped, "kappa_mean": found.mean, "kappa_spread": found.spread,
        "gradient_norm": found.gradient_norm, "snr": found.snr, **_gained(report),
    }  # fmt: skip


def _gained(report: StepReport) -> dict[str, float | None]:
    """Returns what a step's branches gained, where they gain anything: mean, best and standard deviation."""
    known = [reward for reward in report.rewards or () if math.isfinite(reward)]
    if not known:
        return {}
    spread = statistics.pstdev(known)
    return {"reward": statistics.fmean(known), "reward_best": max(known), "reward_spread": spread}


def _parsed(text: str) -> dict[str, Any] | None:
    """Parses a line of metrics.jsonl; None where a field that is read is missing or no number."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict):
        return None
    part = _part(line)
    counts = [line.get(name) for name in (("step", f"{part}_examples") if part else ("step",))]
    numbers = [line.get(name) for name in ("loss", f"{part}_loss", f"{part}_accuracy")]
    if part and f"{part}_accuracy" not in line:
        return None
    if not all(isinstance(count, int) and 0 <= count < 2**53 for count in counts):
        return None
    # null where it was not finite, or there is none; far from where a plot's arithmetic ends
    fine = (x is None or (isinstance(x, (int, float)) and abs(x) < 1e100) for x in numbers)
    return line if all(fine) else None


def _part(line: Mapping[str, Any]) -> str | None:
    """Returns what an evaluation's line is of; None of a step's line."""
    return next((part for part in PARTS if f"{part}_loss" in line), None)


def _done(line: dict[str, Any], done: int, steps: int | None) -> bool:
    """Returns whether a line is of steps that are done: an evaluation counts the steps before it, a step's
    line those before the step."""
    if _part(line):
        return bool(line["step"] <= done and line["step"] != steps)
    return bool(line["step"] < done)


def read_metrics(path: Path, part: str = TEST) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Reads the step lines of a metrics.jsonl, and the lines of one part's evaluations, less what is no whole
    line.

    Raises:
        StorageError: the file cannot be read.
    """
    try:
        texts = path.read_text(errors="replace").splitlines()
    except OSError as error:
        raise StorageError(f"{path}: cannot be read ({error.strerror})") from None
    lines = [line for line in map(_parsed, texts) if line]
    return [x for x in lines if "loss" in x], [x for x in lines if _part(x) == part]
