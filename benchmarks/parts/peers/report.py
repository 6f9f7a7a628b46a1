"""Report of what `benchmarks/peers.py` has found so far: tables, a CSV and a picture."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from parts.common.pictures import load_pyplot
from parts.common.tables import markdown_table
from parts.methods.report import Record, put_between_markers
from parts.peers.ways import ALL, WAYS

MARKERS = ("<!-- benchmarks/peers.py: begin -->", "<!-- benchmarks/peers.py: end -->")
COST = (
    "way", "ranks", "a step is", "s/step", "time ÷ plain", "range", "peak MB", "plain MB", "above MB",
    "memory ÷ plain",
)  # fmt: skip
TRAINED = ("way", "trains", "lr", "steps", "s", "accuracy, %", "loss")
NAMES = {"*": "all", "*v_proj*": "value projections"}
CSV = (
    "way", "made", "task", "model", "dtype", "include", "ranks", "forwards", "copies", "batch_size", "seed",
    "lr", "budget", "step_seconds", "plain_seconds", "ratio", "ratio_least", "ratio_most", "peak_bytes",
    "plain_bytes", "steps", "seconds", "accuracy", "loss", "n", "machine",
)  # fmt: skip


def rows(records: Sequence[Record]) -> list[Record]:
    """Returns a line of the CSV for each run of a way, with what plain inference of its sequences needs."""
    plain = {(r["ranks"], r["copies"]): r["peak_bytes"] for r in records if r["way"] == "inference"}
    found = []
    for record in (record for record in records if record["way"] in WAYS):
        way = WAYS[record["way"]]
        least, most = record["ratio_range"]
        more = {
            "made": way.made, "forwards": way.forwards, "include": " ".join(record["include"]),
            "plain_bytes": plain.get((way.ranks, way.copies)), "ratio_least": least, "ratio_most": most,
        }  # fmt: skip
        line = {**record, **more}
        found.append({name: line.get(name) for name in CSV})
    return found


def cost(line: Record) -> list[str]:
    """Returns a line's cells, by COST."""
    times, copies = line["forwards"], line["copies"]
    peak, plain = line["peak_bytes"], line["plain_bytes"]
    forwards = f"{times} forward{'s' if times > 1 else ''} of {copies * line['batch_size']}"
    backward = " and back" if WAYS[line["way"]].backward else ""
    known = plain is not None
    return [
        line["way"], str(line["ranks"]), forwards + backward, f"{line['step_seconds']:.2f}",
        f"{line['ratio']:.2f}", f"{line['ratio_least']:.2f}–{line['ratio_most']:.2f}", f"{peak / 1e6:.0f}",
        f"{plain / 1e6:.0f}" if known else "", f"{(peak - plain) / 1e6:+.0f}" if known else "",
        f"{peak / plain:.2f}" if known else "",
    ]  # fmt: skip


def trained(line: Record) -> list[str]:
    """Returns a line's cells, by TRAINED."""
    loss = "not finite" if line["loss"] is None else f"{line['loss']:.3f}"
    return [
        line["way"], NAMES.get(line["include"], line["include"]), f"{line['lr']:.2g}", str(line["steps"]),
        f"{line['seconds']:.0f}", f"{100 * line['accuracy']:.1f}", loss,
    ]  # fmt: skip


def markdown(records: Sequence[Record]) -> str:
    """Returns the text between the page's markers; "" if there is nothing."""
    lines = rows(records)
    if not lines:
        return ""
    first = lines[0]
    some = [line for line in lines if line["include"] not in ALL]
    whole = [line for line in lines if line["include"] in ALL]
    finals = [line for line in lines if line["accuracy"] is not None]
    parts = [f"Measured on: {machine}." for machine in dict.fromkeys(r["machine"] for r in records)]
    parts.append(
        f"{Path(first['model']).name}, {first['task']}, batches of {first['batch_size']} over all ranks, "
        f"{first['dtype']}, seed {first['seed']}."
    )
    if some:
        names = ", ".join(dict.fromkeys(str(NAMES.get(x["include"], x["include"])) for x in some))
        parts += [
            f"### A step that trains the {names}",
            markdown_table(COST, [cost(x) for x in some]),
        ]
    if whole:
        parts += [
            "### A step that trains all weights",
            markdown_table(COST, [cost(x) for x in whole]),
        ]
    if finals:
        before = next((r["accuracy"] for r in records if r["way"] == "no training"), None)
        start = "" if before is None else f" Without training: {100 * before:.1f} %."
        parts += [
            "### Accuracy at equal wall-clock",
            f"{max(x['budget'] for x in finals):g} s at the pace of each, judged on {finals[0]['n']} test "
            f"examples.{start}",
            markdown_table(TRAINED, [trained(x) for x in finals]),
        ]
    return "\n\n".join(parts)


def save(lines: Sequence[Record], path: Path) -> None:
    """Writes the CSV."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, CSV)
        writer.writeheader()
        writer.writerows(lines)


def draw(records: Sequence[Record], picture: Path) -> None:
    """Draws bars of time and memory over plain inference (of each way as it trains), and of accuracy."""
    pyplot = load_pyplot()
    lines = [line for line in rows(records) if line["accuracy"] is not None]
    before = next((r["accuracy"] for r in records if r["way"] == "no training"), None)
    figure, axes = pyplot.subplots(1, 3, figsize=(11, 3.2), layout="constrained", sharey=True)
    names = [f"{line['way']}\n({NAMES.get(line['include'], line['include'])})" for line in lines]
    panels = (
        ("time of a step ÷ plain forwards", [line["ratio"] for line in lines], 1),
        ("peak memory ÷ plain inference",
         [line["peak_bytes"] / (line["plain_bytes"] or float("nan")) for line in lines], 1),
        ("accuracy at equal wall-clock, %", [100 * line["accuracy"] for line in lines],
         None if before is None else 100 * before),
    )  # fmt: skip
    for axis, (title, values, mark) in zip(axes, panels, strict=True):
        axis.barh(names, values, color="tab:blue")
        if mark is not None:
            axis.axvline(mark, color="black", linestyle=":")
        axis.set_title(title, fontsize=10)
        axis.grid(axis="x", alpha=0.3)
    axes[0].invert_yaxis()
    figure.savefig(picture, dpi=110)
    pyplot.close(figure)


def report(records: Sequence[Record], page: Path | None, console: Console) -> None:
    """Prints the tables and, with a page, writes them there, the CSV and the picture beside it."""
    text = markdown(records)
    console.print(text or "no run is finished yet", markup=False)
    if page is None or not text:
        return
    save(rows(records), page.with_suffix(".csv"))
    draw(records, page.with_suffix(".png"))
    picture = f"![Time, memory and accuracy]({page.stem}.png)"
    put_between_markers(page, f"{text}\n\n{picture}", MARKERS)
