"""What a check found: rows, each with a try of its own, written as they come."""

from __future__ import annotations

import argparse
import json
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tezo_ds.errors import one_line

PASSED, FAILED, MEASURED, SKIPPED = "passed", "FAILED", "measured", "skipped"
Found = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One check or measurement.

    Attributes:
        part: bits, speed, forward, learning, generation or quantised.
        name: what was checked, the same on every machine.
        status: PASSED, FAILED, MEASURED or SKIPPED.
        told: a phrase for the table: what was found, or why there is nothing.
        found: numbers, for gpu.json.
        seconds: what it took.
    """

    part: str
    name: str
    status: str
    told: str
    found: Found = field(default_factory=dict)
    seconds: float = 0.0


class Skip(Exception):
    """Reason why a check cannot be made here."""


class Rows:
    """Writer of one part's rows, a JSON line each, so that a part that is ended loses none.

    Args:
        part: the part's name.
        path: file to append to.
    """

    def __init__(self, part: str, path: Path) -> None:
        self._part, self._path = part, path

    def check(self, name: str, run: Callable[[], str]) -> None:
        """Adds a row that passes unless `run`, which returns a phrase, raises."""
        self._attempt(name, PASSED, lambda: (run(), {}))

    def measure(self, name: str, run: Callable[[], tuple[str, Found]]) -> None:
        """Adds a row of what `run` returns: a phrase and numbers."""
        self._attempt(name, MEASURED, run)

    def _attempt(self, name: str, status: str, run: Callable[[], tuple[str, Found]]) -> None:
        start = time.perf_counter()
        try:
            told, found = run()
        except Skip as reason:
            status, told, found = SKIPPED, str(reason), {}
        except Exception as error:
            status, told = FAILED, one_line(error)
            found = {"traceback": traceback.format_exc()}
        row = Row(self._part, name, status, told, found, round(time.perf_counter() - start, 2))
        with self._path.open("a") as file:
            print(json.dumps(asdict(row)), file=file)


def read(path: Path) -> list[Row]:
    """Returns the rows of a part's file; none of a part that wrote none."""
    return (
        [Row(**json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []
    )


@dataclass(frozen=True)
class Options:
    """What the parts go by.

    Attributes:
        toy: sizes that a CPU takes a second for, in rows of the same names.
        model: folder of the small model; may be absent.
        data: folder of its task's train.jsonl and test.jsonl.
        work: folder for files of the check's own.
        seconds: of training of each method.
    """

    toy: bool
    model: Path
    data: Path
    work: Path
    seconds: float

    @classmethod
    def of(cls, args: argparse.Namespace) -> Options:
        """Returns the options that a command line gives."""
        return cls(args.toy, args.model, args.data, args.out, args.seconds)

    def small_model(self) -> str:
        """Returns the small model's folder.

        Raises:
            Skip: it is not there.
        """
        if not (self.model / "config.json").exists():
            raise Skip(f"no model in {self.model.name}; launch/prepare_quickstart.py makes it")
        return str(self.model)
