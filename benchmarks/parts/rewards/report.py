"""Tables of `benchmarks/rewards.py`, as text for the screen and for docs/rewards.md."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from parts.common.tables import markdown_table
from parts.methods.report import Record, interval

MARKERS = "<!-- benchmarks/rewards.py: begin -->", "<!-- benchmarks/rewards.py: end -->"


def tables_of(records: Sequence[Record]) -> str:
    """Returns the tables of finished runs, each of one kind, with the machines that made them."""
    parts = []
    finals = [r for r in records if r["part"] == "objectives" and r["role"] == "final"]
    for runs in _alike(finals, ("budget", "include", "batch_size", "examples", "test_examples")):
        parts += [_what_trec(runs[0]), _objectives(runs)]
    answers = [r for r in records if r["part"] == "answers"]
    same = ("task", "budget", "include", "batch_size", "rho", "lr", "queries")
    for runs in _alike(answers, same):
        parts += [_what_answers(runs[0]), _answers(runs), _samples(runs[0])]
    machines = dict.fromkeys(run["machine"] for run in (*finals, *answers))
    return "\n\n".join(
        [*parts, *(f"Machine: one core of a shared {machine}." for machine in machines)]
    )


def _alike(records: Iterable[Record], names: Sequence[str]) -> list[list[Record]]:
    """Groups records that have the same values of some fields, in the order of their first."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(str([record[name] for name in names]), []).append(record)
    return list(groups.values())


def _percent(values: Sequence[float]) -> str:
    mean, half = interval(values)
    return f"{100 * mean:.1f}" + ("" if half is None else f" ± {100 * half:.1f}")


def _mean(runs: Sequence[Record], name: str) -> float:
    return statistics.mean(run[name] for run in runs)


def _what_trec(run: Record) -> str:
    return (
        f"TREC, {run['budget']:g} processor seconds, {' '.join(run['include'])} trains, "
        f"{run['batch_size']} of {run['examples']} examples a step, accuracy on {run['test_examples']} test "
        "examples:"
    )


def _objectives(runs: Sequence[Record]) -> str:
    rows: list[Sequence[object]] = [
        ("objective", "ρ", "η", "test accuracy, %", "seeds", "steps", "tied, %")
    ]
    for group in _alike(runs, ("objective", "rho", "lr")):
        one = group[0]
        rows.append(
            (
                one["objective"], f"{one['rho']:g}", f"{one['lr']:g}", _percent([r["value"] for r in group]),
                len(group), f"{_mean(group, 'steps_made'):.0f}", f"{100 * _mean(group, 'tied'):.0f}",
            )
        )  # fmt: skip
    return markdown_table(rows[0], rows[1:])


def _what_answers(run: Record) -> str:
    return (
        f"`{run['task']}`, exact match, {run['budget']:g} processor seconds, {' '.join(run['include'])} "
        f"trains, {run['batch_size']} prompts and {run['queries']} directions a step, ρ {run['rho']:g}, η "
        f"{run['lr']:g}:"
    )


def _answers(runs: Sequence[Record]) -> str:
    rows: list[Sequence[object]] = [
        ("seed", "reward before", "after", "steps", "tied, %", "seconds")
    ]
    for run in runs:
        rows.append(
            (
                run["seed"], f"{run['before']:.2f}", f"{run['value']:.2f}", run["steps_made"],
                f"{100 * run['tied']:.0f}", f"{run['seconds']:.0f}",
            )
        )  # fmt: skip
    return markdown_table(rows[0], rows[1:])


def _samples(run: Record) -> str:
    rows: list[Sequence[object]] = [("prompt", "right", "before", "after")]
    for one in run["samples"]:
        rows.append(
            [f"`{str(one[name]).strip()!r}`" for name in ("prompt", "answer", "before", "after")]
        )
    return markdown_table(rows[0], rows[1:])
