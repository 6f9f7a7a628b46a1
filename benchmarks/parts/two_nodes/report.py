"""Report of what `benchmarks/two_nodes.py` has found so far: a Markdown table and a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from parts.common.pictures import load_pyplot
from parts.common.tables import markdown_table
from parts.methods.report import Record

MARKERS = ("<!-- benchmarks/two_nodes.py: begin -->", "<!-- benchmarks/two_nodes.py: end -->")
COLUMNS = ("link", "way", "s/step", "to the other host", "back", "ranks", "store")


def markdown(records: Sequence[Record], names: Mapping[str, str]) -> str:
    """Returns the text between the page's markers. `names` are the ways', in the order of the table."""
    if not records:
        return "Nothing was measured yet."
    first = records[0]
    sizes = ", ".join(f"{first[name]} {what}" for name, what in (
        ("batch_size", "questions"), ("queries", "directions"), ("steps", "steps at each rate"),
    ))  # fmt: skip
    rows = [
        (
            record["rate"], names[way], f"{record['step_seconds']:.2f}",
            *(amount(record[kind]) for kind in ("sent", "received", "ranks", "store")),
        )
        for rate in dict.fromkeys(record["rate"] for record in records)
        for way in names
        for record in records
        if (record["way"], record["rate"]) == (way, rate)
    ]  # fmt: skip
    parts = [f"`{c}`" for c in dict.fromkeys(record["command"] for record in records)]
    parts += [f"Machine: {m}." for m in dict.fromkeys(record["machine"] for record in records)]
    return "\n\n".join([
        *parts,
        f"Two hosts of two ranks each; {sizes}; the weights take {amount(first['weights'])}. Per step: the "
        "median of its seconds, and the mean of what the link's counters grew by, headers included. Of "
        "that, in both directions and without headers: between ranks, and to and from the store.",
        markdown_table(COLUMNS, rows),
    ])  # fmt: skip


def amount(count: float) -> str:
    """Returns bytes in units that fit the column."""
    for unit, size in (("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} B"


def draw(records: Sequence[Record], names: Mapping[str, str], picture: Path) -> None:
    """Draws seconds and bytes of a step, a bar for each way and rate."""
    if not records:
        return
    pyplot = load_pyplot()
    rates = list(dict.fromkeys(record["rate"] for record in records))
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 3.6), layout="constrained", sharey=True)
    height = 0.8 / len(rates)
    for number, rate in enumerate(rates):
        found = [record for record in records if record["rate"] == rate]
        places = [list(names).index(record["way"]) + height * number for record in found]
        seconds = [record["step_seconds"] for record in found]
        crossed = [(record["sent"] + record["received"]) for record in found]
        for axis, values in zip(axes, (seconds, crossed), strict=True):
            axis.barh(places, values, height, label=rate)
    axes[1].axvline(records[0]["weights"], color="black", linestyle="--", label="the weights")
    axes[0].set_yticks([n + 0.4 - height / 2 for n in range(len(names))], names.values())
    axes[0].invert_yaxis()
    axes[0].set_xlabel("seconds a step")
    axes[1].set_xlabel("bytes a step over the link, both directions")
    for axis in axes:
        axis.grid(axis="x", alpha=0.3)
    axes[1].set_xscale("log")
    axes[1].set_xlim(left=100)
    axes[1].legend(loc="center right")
    figure.savefig(picture, dpi=100)
    pyplot.close(figure)
