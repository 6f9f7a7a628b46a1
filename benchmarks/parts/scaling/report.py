"""Report of what `benchmarks/scaling.py` has found so far: a CSV, from it Markdown tables and pictures."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from parts.common.pictures import load_pyplot
from parts.common.tables import markdown_table
from parts.methods.report import Record
from parts.scaling.split import PARTS

MARKERS = ("<!-- benchmarks/scaling.py: begin -->", "<!-- benchmarks/scaling.py: end -->")
# What a row is of; two rows with the same are two measurements of one thing.
KEYS = (
    "model", "dtype", "backend", "length", "queries", "rank", "mode", "sharding", "probe", "nodes",
    "world", "examples",
)  # fmt: skip
TIMES = tuple(f"{part}_s{end}" for part in ("step", *PARTS) for end in ("", "_low", "_high"))
COUNTS = ("peak_bytes", "gather_ranks", "gather_calls", "gather_bytes", "our_calls", "our_bytes")
RATES = ("tokens_per_s", "tokens_per_s_rank", "efficiency")
COLUMNS = (
    *KEYS, "workers", "steps", *RATES, *TIMES, "gathers_alone_s", *COUNTS, "collectives", "machine",
    "command",
)  # fmt: skip
WHOLE = {"length", "queries", "rank", "nodes", "world", "examples", "workers", "steps", *COUNTS}
NAMES = {
    "zero3": "ZeRO-3", "zero3-hpz": "ZeRO-3, hpZ", "fsdp2": "FSDP2", "fsdp2-hybrid": "FSDP2, hybrid",
}  # fmt: skip
PLAIN = {"zero3-hpz": "zero3", "fsdp2-hybrid": "fsdp2"}  # what a hybrid is compared with


def read(path: Path) -> list[Record]:
    """Reads the rows of a CSV, with numbers as numbers.

    Raises:
        ValueError: a column is missing, or a number is none; names the file and the line.
    """
    with path.open(newline="", encoding="utf-8") as file:
        lines = csv.DictReader(file)
        if missing := [name for name in COLUMNS if name not in (lines.fieldnames or ())]:
            raise ValueError(f"{path}: has no column {missing[0]}; is it of benchmarks/scaling.py?")
        return [_parsed(line, f"{path}, line {lines.line_num}") for line in lines]


def _parsed(line: dict[str, Any], where: str) -> Record:
    found: Record = {}
    for name in COLUMNS:
        try:
            numeric = name in (*TIMES, *RATES, "gathers_alone_s")
            kind = int if name in WHOLE else float if numeric else str
            found[name] = kind(line[name])
            if line[name] is None:
                raise ValueError
        except (ValueError, TypeError):
            raise ValueError(f"{where}: {name} is {line[name]!r}; the line is damaged") from None
    return found


def key(record: Record) -> tuple[Any, ...]:
    """Returns a record's key, by KEYS."""
    return tuple(record[name] for name in KEYS)


def save(path: Path, old: Sequence[Record], new: Sequence[Record]) -> list[Record]:
    """Writes all rows, new ones in place of old ones of the same key, with their rates; returns the rows."""
    rows = list({key(record): record for record in (*old, *new)}.values())
    rates(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    with beside.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: _text(record[name]) for name in COLUMNS} for record in rows)
    beside.replace(path)
    return rows


def _text(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def rates(records: Sequence[Record]) -> None:
    """Sets tokens_per_s, tokens_per_s_rank and efficiency. Tokens are those of the data: each goes through
    the model in 2Q branches.

    Efficiency is tokens per second and worker, over those of the smallest world of the same mode and probe;
    of a hybrid, over those of the smallest world of what it is a hybrid of. Workers are the ranks that have
    a processor: at most as many as there are accelerators, or cores. So ranks beyond that are not
    expected to be any faster, and what they cost shows.
    """
    for record in records:
        tokens = record["world"] * record["examples"] * record["length"]
        record["tokens_per_s"] = tokens / record["step_s"]
        record["tokens_per_s_rank"] = record["tokens_per_s"] / record["world"]
    for record in records:
        plain = PLAIN.get(record["sharding"]) or str(record["sharding"])
        peers = [other for other in records if _comparable(record, other, plain)]
        first = min(peers or [record], key=lambda other: other["world"])
        record["efficiency"] = _each(record) / _each(first)


def _each(record: Record) -> float:
    return float(record["tokens_per_s"] / record["workers"])


def _comparable(record: Record, other: Record, sharding: str) -> bool:
    free = ("sharding", "nodes", "world", "examples")
    same = all(record[name] == other[name] for name in KEYS if name not in free)
    return same and other["sharding"] == sharding and _work(record) == _work(other)


def _work(record: Record) -> int:
    """Returns what stays the same in all worlds: examples of a rank (weak) or of all ranks (strong)."""
    return int(record["examples"] * (1 if record["mode"] == "weak" else record["world"]))


def markdown(records: Sequence[Record]) -> str:
    """Returns the text between the page's markers."""
    if not records:
        return "Nothing was measured yet."
    parts = [f"`{command}`" for command in dict.fromkeys(r["command"] for r in records)]
    parts += [f"Machine: {machine}." for machine in dict.fromkeys(r["machine"] for r in records)]
    for setting in dict.fromkeys(_setting(record) for record in records):
        rows = sorted((r for r in records if _setting(r) == setting), key=_order)
        parts += [f"### {setting}", _throughput(rows), _split(rows), _traffic(rows)]
    return "\n\n".join(parts)


def _setting(record: Record) -> str:
    return (
        f"{record['model']} in {record['dtype']}, {record['length']} tokens, Q = {record['queries']}, "
        f"r = {record['rank']}, {record['backend']}"
    )


def _order(record: Record) -> tuple[Any, ...]:
    shardings = list(NAMES)
    place = shardings.index(record["sharding"])
    return record["mode"] != "weak", place, record["probe"], record["world"], record["examples"]


def _label(record: Record) -> tuple[str, ...]:
    ranks = f"{record['world']}" + (f" on {record['nodes']}" if record["nodes"] > 1 else "")
    return record["mode"], NAMES[record["sharding"]], record["probe"], ranks


def _throughput(records: Sequence[Record]) -> str:
    columns = (
        "scaling", "sharding", "probe", "ranks", "workers", "examples a rank", "s/step", "10–90 %",
        "tokens/s", "a rank", "efficiency", "peak MB a rank",
    )  # fmt: skip
    rows = [
        (
            *_label(r), str(r["workers"]), str(r["examples"]), f"{r['step_s']:.3g}",
            f"{r['step_s_low']:.3g}–{r['step_s_high']:.3g}", f"{r['tokens_per_s']:.4g}",
            f"{r['tokens_per_s_rank']:.3g}", f"{100 * r['efficiency']:.0f} %",
            f"{r['peak_bytes'] / 1e6:.0f}",
        )
        for r in records
    ]  # fmt: skip
    return markdown_table(columns, rows)


def _split(records: Sequence[Record]) -> str:
    columns = (
        "scaling",
        "sharding",
        "probe",
        "ranks",
        *(f"{p}, ms" for p in PARTS),
        "gathers alone, ms",
    )
    rows = [
        (
            *_label(r),
            *(f"{1e3 * r[f'{p}_s']:.1f}" for p in PARTS),
            f"{1e3 * r['gathers_alone_s']:.1f}",
        )
        for r in records
    ]
    return markdown_table(columns, rows)


def _traffic(records: Sequence[Record]) -> str:
    """Makes the table of traffic, of one mode: bytes do not depend on the examples."""
    columns = (
        "sharding",
        "probe",
        "ranks",
        "of a gather",
        "gathers",
        "gathered MB",
        "our calls",
        "our bytes",
    )
    rows = {
        _label(r)[1:]: (
            *_label(r)[1:], str(r["gather_ranks"]), str(r["gather_calls"]),
            f"{r['gather_bytes'] / 1e6:.1f}", str(r["our_calls"]), str(r["our_bytes"]),
        )
        for r in records
    }  # fmt: skip
    return markdown_table(columns, list(rows.values()))


def draw(records: Sequence[Record], page: Path) -> None:
    """Draws two pictures beside the page: efficiency against ranks, and the parts of a step."""
    if not records:
        return
    pyplot = load_pyplot()
    modes = list(dict.fromkeys(record["mode"] for record in records))
    settings = {_setting(record) for record in records}
    figure, axes = pyplot.subplots(
        1, len(modes), figsize=(5 * len(modes), 4), layout="constrained", squeeze=False, sharey=True
    )
    for axis, mode in zip(axes[0], modes, strict=True):
        lines: dict[str, list[Record]] = {}
        for record in sorted((r for r in records if r["mode"] == mode), key=lambda r: r["world"]):
            name = f"{NAMES[record['sharding']]}, {record['probe']}"
            name += f", {_setting(record)}" if len(settings) > 1 else ""
            lines.setdefault(name, []).append(record)
        for name, line in lines.items():
            style = "o--" if line[0]["probe"] == "inplace" else "o-"
            percent = [100 * record["efficiency"] for record in line]
            axis.plot([record["world"] for record in line], percent, style, label=name)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.set_xlabel("ranks")
        axis.set_title(f"{mode} scaling")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("efficiency, % of the smallest world's, a worker")
    axes[0][0].set_ylim(bottom=0)
    axes[0][-1].legend(frameon=False, fontsize=8)
    figure.savefig(page.with_name(f"{page.stem}-efficiency.png"), dpi=100)
    pyplot.close(figure)

    rows = sorted(records, key=_order)
    figure, one = pyplot.subplots(figsize=(9, 1.5 + 0.22 * len(rows)), layout="constrained")
    places, left = range(len(rows)), [0.0] * len(rows)
    for part in PARTS:
        widths = [record[f"{part}_s"] for record in rows]
        one.barh(places, widths, left=left, label=part)
        left = [before + width for before, width in zip(left, widths, strict=True)]
    one.set_yticks(places, [" ".join(_label(record)) for record in rows], fontsize=7)
    one.invert_yaxis()
    one.set_xlabel("seconds of a step, medians of the parts")
    one.grid(axis="x", alpha=0.3)
    one.legend(frameon=False, ncols=len(PARTS), fontsize=8, loc="lower right")
    figure.savefig(page.with_name(f"{page.stem}-split.png"), dpi=100)
    pyplot.close(figure)
