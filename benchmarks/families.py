"""Families of models beside the features that work with them, tried on tiny models with random weights.

A cell is `yes` where the feature ran and gave the numbers of another way to compute them: one forward for
all branches those of one branch at a time, frozen blocks that run once those of whole forwards, a step that
solves those of a model that was run before; of a fit that it ran and is finite. Elsewhere it is what the
package says of it, which is listed below the table.

    python benchmarks/families.py                     all, a minute or two
    python benchmarks/families.py --families Llama "Gemma 3"
    python benchmarks/families.py --page docs/models.md
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from parts.common.machine import describe
from parts.families.models import FAMILIES, make
from parts.families.tried import FEATURES, tried
from parts.methods.report import put_between_markers
from rich.console import Console

MARKERS = "<!-- benchmarks/families.py: begin -->", "<!-- benchmarks/families.py: end -->"
Rows = Mapping[str, Mapping[str, str]]  # by family and feature why it does not work, or ""


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table, and writes it into a page if asked to; returns 1 where a number is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--families", nargs="+", choices=FAMILIES, default=list(FAMILIES), metavar="FAMILY"
    )
    parser.add_argument("--page", type=Path, help="to write the table into, between its markers")
    args = parser.parse_args(argv)
    console, rows = Console(stderr=True), dict[str, Mapping[str, str]]()
    for family in args.families:
        found = {name: tried(run, partial(make, family)) for name, run in FEATURES.items()}
        rows[family] = found
        console.print(f"{family}: {', '.join(name for name, why in found.items() if not why)}")
    table = markdown(rows)
    print(table)
    if args.page is not None:
        put_between_markers(args.page, table, MARKERS)
    return int(any(why.startswith("WRONG") for row in rows.values() for why in row.values()))


def markdown(rows: Rows) -> str:
    """Returns the table, and reasons below it."""
    reasons = list(dict.fromkeys(why for row in rows.values() for why in row.values() if why))
    lines = [
        f"`python benchmarks/families.py`\n\nMachine: {describe()}.\n",
        f"| family | {' | '.join(FEATURES)} |",
        f"| --- |{' --- |' * len(FEATURES)}",
    ]
    for family, row in rows.items():
        cells = (f"no ({reasons.index(why) + 1})" if why else "yes" for why in row.values())
        lines.append(f"| {family} | {' | '.join(cells)} |")
    lines += ["", *(f"{i}. {why}" for i, why in enumerate(reasons, 1))]
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
