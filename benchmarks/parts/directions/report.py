"""Report of what `benchmarks/directions.py` has found so far: Markdown tables and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, pstdev
from typing import Any

from parts.common.pictures import load_pyplot
from parts.common.tables import markdown_table
from parts.directions.gradient import expected_cosine
from parts.directions.training import Way
from parts.methods.report import Record

MARKERS = ("<!-- benchmarks/directions.py: begin -->", "<!-- benchmarks/directions.py: end -->")


def gradient_lines(records: Sequence[Record]) -> list[dict[str, float]]:
    """Returns for each Q, over batches and groups of directions: mean and deviation of the cosine, the mean
    with exact slopes, and theory."""
    dims, lines = records[0]["coefficients"], []
    for queries in records[0]["measured"]:
        kinds = {
            kind: [value for record in records for value in record[kind][queries]]
            for kind in ("measured", "exact")
        }
        lines.append({
            "queries": int(queries),
            "measured": mean(kinds["measured"]),
            "deviation": pstdev(kinds["measured"]),
            "exact": mean(kinds["exact"]),
            "theory": expected_cosine(int(queries), dims),
            "estimates": len(kinds["measured"]),
        })  # fmt: skip
    return lines


def gradient(records: Sequence[Record]) -> str:
    """Makes a table of cosines by Q."""
    first, lines = records[0], gradient_lines(records)
    agree = ", ".join(f"{record['slopes_agree']:.4f}" for record in records)
    norms = ", ".join(f"{r['reported_norm']:.3g} of {r['norm']:.3g}" for r in records)
    return "\n\n".join([
        f"D = {first['coefficients']} coefficients, {len(records)} batches of {first['batch_size']} "
        f"examples, ρ {first['rho']:g}. Cosine of measured and exact slopes, by batch: {agree}. "
        f"‖∇‖ as the step reports it, of the true one: {norms}.",
        markdown_table(
            ("Q", "cosine", "standard deviation", "with exact slopes", "√(Q/(Q+D+1))", "estimates"),
            [
                (
                    f"{line['queries']:.0f}", f"{line['measured']:.3f}", f"{line['deviation']:.3f}",
                    f"{line['exact']:.3f}", f"{line['theory']:.3f}", f"{line['estimates']:.0f}",
                )
                for line in lines
            ],
        ),
    ])  # fmt: skip


def speed(records: Sequence[Record]) -> str:
    """Makes a table of ratios by Q."""
    rows = [
        (
            f"{record['queries']}", name, f"{record[name]['plain']:.3f}",
            f"{record[name]['seconds']:.3f}", f"{record[name]['ratio']:.3f}",
            f"{record[name]['least']:.3f}–{record[name]['most']:.3f}",
        )
        for record in records
        for name in ("central", "forward")
    ]  # fmt: skip
    first = records[0]
    return "\n\n".join([
        f"{first['shape']} tokens, all matrices, rank 16, at most {first['chunk']} branches in a forward, "
        f"{first['rounds']} rounds in each of which everything is timed in turn.",
        markdown_table(("Q", "difference", "forward, s", "step, s", "ratio", "range"), rows),
    ])  # fmt: skip


def update(records: Sequence[Record]) -> str:
    """Makes a table of milliseconds by world."""
    first, rows = records[0], []
    for r in records:
        draw, weigh, rest = (1e3 * r[name] for name in ("draw", "weigh", "update"))
        share = f"{(weigh + rest) / 10:.2f} %"
        own = r["queries"] // r["world"]
        rows.append(
            (str(r["world"]), str(own), f"{draw:.1f}", f"{weigh:.1f}", f"{rest:.2f}", share)
        )
    return "\n\n".join([
        f"Q = {first['queries']}, D = {first['coefficients']}, processor time, {first['threads']} thread(s).",
        markdown_table(
            ("ranks", "own directions", "draw τ, ms", "Σκτ, ms", "update, ms",
             "Σκτ and update of 1 s"), rows,
        ),
    ])  # fmt: skip


def training(records: Sequence[Record], ways: Sequence[Way], paced: bool) -> str:
    """Makes a table of where each way ends, and where it is after as many steps as the slowest makes."""
    rows, (first, *_) = [], records
    for way in ways:
        runs = [record for record in records if record["way"] == way.name and record["curve"]]
        if not runs:
            continue
        least = max(first["least"], 0)
        at_least = [p for r in runs for p in r["curve"] if p["steps"] == least] or runs[0]["curve"][
            :1
        ]
        ends = [run["curve"][-1] for run in runs]
        rows.append((
            way.name, str(way.directions), f"{runs[0]['lr']:.2g}", str(ends[0]["steps"]),
            f"{runs[0]['step_seconds']:.2f}" if paced else "as the other",
            _mean(at_least, "loss", 1), _mean(ends, "loss", 1), _mean(ends, "accuracy", 100),
            str(len(runs)),
        ))  # fmt: skip
    start = first["curve"][0]
    return "\n\n".join([
        f"Before training: loss {start['loss']:.3f}, accuracy {100 * start['accuracy']:.1f} %. Batches of "
        f"{first['batch_size']}, {first['budget']:g} s at the measured pace, "
        f"at least {first['rates']} learning rates each, half a decade apart, and more beyond an end that "
        f"was best; chosen by the loss of {first['valid_examples']} validation examples, judged on "
        f"{first['test_examples']} test examples. Means over seeds (least to most).",
        markdown_table(
            ("way", "Q", "lr", "steps", "s/step", f"loss after {first['least']} steps", "loss at the end",
             "accuracy, %", "seeds"), rows,
        ),
    ])  # fmt: skip


def tuning(records: Sequence[Record], ways: Sequence[Way]) -> str:
    """Makes a table of all learning rates that were tried, for the choice to be judged."""
    rows = []
    for way in ways:
        tried = sorted((r for r in records if r["way"] == way.name), key=lambda r: float(r["lr"]))
        cells = (
            f"{r['lr']:.2g}: {_mean([r], 'loss', 1)}, {100 * r['accuracy']:.0f} %" for r in tried
        )
        rows.append((way.name, "; ".join(cells)))
    return (
        "Learning rates tried, with loss and accuracy of the validation examples:\n\n"
        + markdown_table(("way", "rate: loss, accuracy"), rows)
    )


def _mean(points: Sequence[dict[str, Any]], name: str, scale: float) -> str:
    values = [scale * point[name] for point in points if point[name] is not None]
    if not values:
        return "not finite"
    average, *ends = (
        f"{value:.{3 if scale == 1 else 1}f}" for value in (mean(values), min(values), max(values))
    )
    return average if len(values) == 1 else f"{average} ({'–'.join(ends)})"


def draw_gradient(records: Sequence[Record], picture: Path) -> None:
    """Draws the cosine against Q, measured and expected."""
    pyplot = load_pyplot()
    lines = gradient_lines(records)
    figure, axis = pyplot.subplots(figsize=(5, 4), layout="constrained")
    counts = [line["queries"] for line in lines]
    axis.errorbar(
        counts, [line["measured"] for line in lines], [line["deviation"] for line in lines],
        fmt="o", capsize=3, label="measured, ± a standard deviation",
    )  # fmt: skip
    axis.plot(counts, [line["theory"] for line in lines], "k--", label="√(Q/(Q+D+1))")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    axis.set_xlabel("directions Q")
    axis.set_ylabel("cosine with the true gradient")
    _save(pyplot, figure, axis, picture)


def draw_training(
    records: Sequence[Record], ways: Sequence[Way], paced: bool, picture: Path
) -> None:
    """Draws loss and accuracy against steps, and if paced against seconds, a line a way: means over its
    seeds, within a band from the least to the most."""
    pyplot, columns = load_pyplot(), 1 + paced
    figure, axes = pyplot.subplots(
        2,
        columns,
        figsize=(1 + 4 * columns, 6.5),
        layout="constrained",
        sharey="row",
        squeeze=False,
    )
    for way in ways:
        runs = [r for r in records if r["way"] == way.name and r["curve"]]
        if not runs:
            continue
        for row, (name, scale) in zip(axes, (("loss", 1), ("accuracy", 100)), strict=True):
            steps, values = _by_steps(runs, name, scale)
            seconds = [step * runs[0]["step_seconds"] for step in steps]
            for axis, at in zip(row, (steps, seconds)[:columns], strict=True):
                axis.plot(at, [mean(v) for v in values], "o-", markersize=3, label=way.name)
                axis.fill_between(at, [*map(min, values)], [*map(max, values)], alpha=0.15)
            row[0].set_ylabel(f"test {name}" + (", %" if scale == 100 else ""))
    for row in axes:
        row[0].set_xscale("symlog", linthresh=1)
        row[0].set_xlim(left=0)
    axes[1][0].set_xlabel("steps")
    if paced:
        axes[1][1].set_xlabel("seconds, steps times the measured pace")
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    _save(pyplot, figure, axes[0][0], picture)


def _by_steps(
    runs: Sequence[Record], name: str, scale: float
) -> tuple[list[int], list[list[float]]]:
    """Returns numbers of steps, and after each what the runs that came as far and are finite had."""
    found: dict[int, list[float]] = {}
    for point in (point for run in runs for point in run["curve"] if point[name] is not None):
        found.setdefault(point["steps"], []).append(scale * point[name])
    return sorted(found), [found[steps] for steps in sorted(found)]


def _save(pyplot: Any, figure: Any, axis: Any, picture: Path) -> None:
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    figure.savefig(picture, dpi=100)
    pyplot.close(figure)
