"""Tables and the picture of `benchmarks/learning.py`."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from parts.common.pictures import load_pyplot
from parts.common.tables import markdown_table
from parts.learning.arms import Arm
from parts.methods.report import Record, interval

COLUMNS = ("arm", "acc. %", "± 95 %", "vs {}", "loss ± 95 %", "vs {}", "seeds", "steps", "s")

Line = tuple[str, Arm, list[Record]]  # task, arm, its runs by seed


def _cells(arm: Arm, runs: Sequence[Record], beside: Sequence[Record]) -> list[str]:
    mean, half = interval([run["accuracy"] for run in runs])
    losses = [run["loss"] for run in runs if run["loss"] is not None]
    loss = _loss(losses) if len(losses) == len(runs) else "not finite"
    return [
        arm.name, f"{100 * mean:.1f}", "" if half is None else f"{100 * half:.1f}",
        _more(runs, beside, "accuracy", 100, 1), loss, _more(runs, beside, "loss", 1, 3), str(len(runs)),
        f"{statistics.mean(run['steps_made'] for run in runs):.0f}",
        f"{statistics.mean(run['seconds'] for run in runs):.0f}",
    ]  # fmt: skip


def _loss(losses: Sequence[float]) -> str:
    mean, half = interval(losses)
    return f"{mean:.3f}" + ("" if half is None else f" ± {half:.3f}")


def _more(
    runs: Sequence[Record], beside: Sequence[Record], what: str, scale: float, digits: int
) -> str:
    """Returns by how much runs are above others of the same seeds, which drew the same examples."""
    theirs = {run["seed"]: run[what] for run in beside if beside is not runs}
    pairs = [(run[what], theirs[run["seed"]]) for run in runs if run["seed"] in theirs]
    if not pairs or any(None in pair for pair in pairs):
        return ""
    mean, half = interval([scale * (ours - other) for ours, other in pairs])
    return f"{mean:+.{digits}f}" + ("" if half is None else f" ± {half:.{digits}f}")


def _rows(lines: Sequence[Line], task: str, beside: str) -> list[list[str]]:
    of_task = [(arm, runs) for name, arm, runs in lines if name == task]
    # By seed; a run of backpropagation does not look.
    zero = {run["seed"]: run for _, runs in of_task for run in runs if run["zero_shot"] is not None}
    shown = [run["zero_shot"] for run in zero.values()]
    rows = []
    if shown:
        mean, half = interval(shown)
        rows = [["zero-shot", f"{100 * mean:.1f}", "" if half is None else f"{100 * half:.1f}"]]
    if known := [run["majority"] for run in zero.values() if run.get("majority") is not None]:
        rows.insert(0, ["most frequent class", f"{100 * statistics.mean(known):.1f}", ""])
    rows = [[*row, *[""] * (len(COLUMNS) - len(row))] for row in rows]
    others = next((runs for arm, runs in of_task if arm.name == beside), [])
    return rows + [_cells(arm, runs, others) for arm, runs in of_task if arm.name != "zero-shot"]


def markers(part: str | None = None) -> tuple[str, str]:
    """Returns what stands before and after a table in a page; `part` tells those of one page apart."""
    name = f"benchmarks/learning.py {part}" if part else "benchmarks/learning.py"
    return f"<!-- {name}: begin -->", f"<!-- {name}: end -->"


def tasks_of(lines: Sequence[Line]) -> list[str]:
    """Returns the tasks that there are runs of, in order."""
    return list(dict.fromkeys(task for task, _, _ in lines))


def columns(beside: str) -> list[str]:
    """Returns the heads of the columns."""
    return [column.format(beside) for column in COLUMNS]


def tables_of(lines: Sequence[Line], beside: str) -> list[Table]:
    """Makes tables for the screen, one a task; `beside` names the arm whose runs of the same seeds each
    other's are compared with."""
    made = []
    for task in tasks_of(lines):
        table = Table(title=task)
        for column in columns(beside):
            table.add_column(column, no_wrap=True)
        for row in _rows(lines, task, beside):
            table.add_row(*row)
        made.append(table)
    return made


def _machines(described: Sequence[str]) -> list[str]:
    """Returns a line for each machine, with the commits of all its runs."""
    commits: dict[str, dict[str, None]] = {}
    for one in described:
        machine, _, commit = one.partition("; commit ")
        commits.setdefault(machine, {})[commit] = None
    return [
        f"Machine: {machine}"
        + (f"; commit{'s' * (len(made) > 1)} {', '.join(made)}." if any(made) else ".")
        for machine, made in commits.items()
    ]


def _compact(lines: Sequence[Line]) -> list[list[str]]:
    """Returns the rows of one table of all tasks, a column each: accuracy and loss."""
    of = {task: {row[0]: row for row in _rows(lines, task, "")} for task in tasks_of(lines)}
    arms: list[str] = []
    for rows in of.values():  # an arm that no earlier task has comes behind the one that it follows
        place = 0
        for arm in rows:
            if arm not in arms:
                arms.insert(place, arm)
            place = arms.index(arm) + 1
    empty = [""] * len(COLUMNS)

    def cell(row: Sequence[str]) -> str:
        accuracy = f"{row[1]} ± {row[2]}" if row[2] else row[1]
        return f"{accuracy}; {row[4].split()[0]}" if row[4] else accuracy

    return [[arm, *(cell(rows.get(arm, empty)) for rows in of.values())] for arm in arms]


def markdown(
    lines: Sequence[Line], command: str, picture: str, beside: str, compact: bool = False
) -> str:
    """Returns the text between the page's markers.

    Args:
        lines: what is finished.
        command: what prints it.
        picture: beside the page.
        beside: as in `tables_of`.
        compact: one table, a column a task, instead of one a task.
    """
    parts = [f"`{command}`", *_machines([run["machine"] for _, _, runs in lines for run in runs])]
    if compact:
        parts.append(markdown_table(["accuracy, %; loss", *tasks_of(lines)], _compact(lines)))
    for task in [] if compact else tasks_of(lines):
        parts += [f"### {task}", markdown_table(columns(beside), _rows(lines, task, beside))]
    return "\n\n".join([*parts, f"![Accuracy by arm]({picture})"])


def draw(lines: Sequence[Line], picture: Path) -> None:
    """Draws accuracy by arm with intervals, a panel a task, into a PNG."""
    pyplot, names = load_pyplot(), tasks_of(lines)
    size = (4.2 * len(names), 4)
    figure, axes = pyplot.subplots(1, len(names), figsize=size, layout="constrained", squeeze=False)
    for axis, task in zip(axes[0], names, strict=True):
        for name, arm, runs in lines:
            if name == task:
                mean, half = interval([run["accuracy"] for run in runs])
                bar = 100 * (half or 0)
                axis.errorbar(100 * mean, arm.name, xerr=bar, fmt="o", color="tab:blue", capsize=3)
        axis.invert_yaxis()
        axis.set_title(task)
        axis.set_xlabel("test accuracy, %")
        axis.grid(axis="x", alpha=0.3)
    figure.savefig(picture, dpi=110)
    pyplot.close(figure)
