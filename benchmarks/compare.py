"""Comparison of two CSVs of benchmarks/scaling.py, row by row: have steps become slower or larger?

    python benchmarks/compare.py OLD.csv NEW.csv

A time has changed where the 10–90 % ranges of its steps do not meet, since within them the machine's own
noise may be all there is; a step's parts are compared like the step. Bytes and calls have no noise: of
traffic any change counts, of memory one beyond --memory. Exits with 1 if anything is slower or larger, or
if a row is gone; with 2 if a file cannot be read.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parts.methods.report import Record
from parts.scaling.report import KEYS, key, read
from parts.scaling.split import PARTS
from rich.console import Console
from rich.table import Table

SECONDS = tuple(f"{part}_s" for part in ("step", *PARTS))
BYTES = ("peak_bytes", "gather_bytes", "gather_calls", "our_bytes", "our_calls")
SHORTEST = 1e-4  # seconds: parts that take less in both are not compared


@dataclass(frozen=True)
class Change:
    """Change of one number of one row.

    Attributes:
        row: the row's key, by KEYS.
        name: name of the column.
        old, new: medians, or counts.
        verdict: "slower", "faster", "larger", "smaller"; "" within the spread.
    """

    row: tuple[Any, ...]
    name: str
    old: float
    new: float
    verdict: str

    @property
    def worse(self) -> bool:
        """Whether the change is a regression."""
        return self.verdict in ("slower", "larger")


def changes(old: Record, new: Record, memory: float) -> Iterator[Change]:
    """Yields the changes between two measurements of one thing.

    Args:
        old, new: rows of the same key.
        memory: fraction by which peak memory may differ.
    """
    for name in SECONDS:
        if max(old[name], new[name]) < SHORTEST:
            continue
        verdict = ""
        if new[f"{name}_low"] > old[f"{name}_high"]:
            verdict = "slower"
        elif new[f"{name}_high"] < old[f"{name}_low"]:
            verdict = "faster"
        yield Change(key(new), name, old[name], new[name], verdict)
    for name in BYTES:
        free = memory * old[name] if name == "peak_bytes" else 0
        more = new[name] - old[name]
        verdict = "" if abs(more) <= free else "larger" if more > 0 else "smaller"
        yield Change(key(new), name, old[name], new[name], verdict)


def compare(
    old: Sequence[Record], new: Sequence[Record], memory: float
) -> tuple[list[Change], list[tuple[Any, ...]], list[tuple[Any, ...]]]:
    """Returns changes of the rows that both have, keys that only `old` has, and keys that only `new` has."""
    before, after = {key(r): r for r in old}, {key(r): r for r in new}
    found = [
        change
        for row, record in after.items()
        if row in before
        for change in changes(before[row], record, memory)
    ]
    gone = [row for row in before if row not in after]
    return found, gone, [row for row in after if row not in before]


def report(found: Sequence[Change], every: bool) -> Table:
    """Makes a table: steps of all rows, and of everything else what has changed."""
    table = Table("row", "what", "old", "new", "ratio", "")
    for change in found:
        if change.verdict or change.name == "step_s" or every:
            ratio = f"{change.new / change.old:.3f}" if change.old else "from nothing"
            row = " ".join(map(str, change.row))
            table.add_row(
                row, change.name, f"{change.old:.4g}", f"{change.new:.4g}", ratio, change.verdict
            )
    return table


def main(words: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    description, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--memory", type=float, default=0.01, help="change of memory that is none")
    parser.add_argument("--every", action="store_true", help="print what has not changed, too")
    args, console = parser.parse_args(words), Console(soft_wrap=True, highlight=False)
    try:
        old, new = read(args.old), read(args.new)
    except (OSError, ValueError) as error:
        console.print(f"compare: error: {error}", markup=False)
        return 2
    for name, rows in (("old", old), ("new", new)):
        for machine in dict.fromkeys(row["machine"] for row in rows):
            console.print(f"{name}: {machine}", markup=False)
    found, gone, added = compare(old, new, args.memory)
    console.print(f"rows are named by {', '.join(KEYS)}")
    console.print(report(found, args.every))
    for alone, path in ((gone, args.old), (added, args.new)):
        for row in alone:
            console.print(f"only in {path}: {' '.join(map(str, row))}", markup=False)
    worse = sum(change.worse for change in found)
    better = sum(bool(change.verdict) for change in found) - worse
    console.print(
        f"{len(found)} numbers compared: {worse} slower or larger, {better} faster or smaller, "
        f"{len(gone)} rows gone, {len(added)} new"
    )
    if not found:
        console.print("no row is in both: were they measured with the same settings?")
    return int(bool(worse or gone or not found))


if __name__ == "__main__":
    raise SystemExit(main())
