"""The command line of `benchmarks/learning.py`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from parts.learning.arms import FIRST_ORDER, HEADS, OTHERS, STEPS, Arm
from parts.methods.data import TASKS
from parts.methods.report import MOST_SEEDS

ROOT = Path(__file__).resolve().parents[3]
DEFAULT_ARMS = [
    *HEADS, *(f"{head}+{steps}" for steps in STEPS for head in HEADS),
    *(f"frozen+{steps}" for steps in FIRST_ORDER),
]  # fmt: skip
# Of the command that makes the same runs again.
NAMED = (
    "tasks", "arms", "budget", "seeds", "include", "examples", "test_examples", "batch_size", "factor",
    "trunk_cache", "beside",
)  # fmt: skip


def of_arm(words: Sequence[str] | None, arm: Arm) -> float | None:
    """Returns the number of the first word that is an arm's: of all (100), or of its steps (mezo=100)."""
    for word in words or ():
        name, _, number = word.rpartition("=")
        if name in ("", arm.steps):
            return float(number)
    return None


def _numbered(word: str) -> str:
    """Checks a word of `of_arm`, and returns it."""
    name, _, number = word.rpartition("=")
    if name and name not in (known := [*STEPS, *OTHERS, *FIRST_ORDER]):
        raise argparse.ArgumentTypeError(f"{word}: {name} is none of {', '.join(known)}")
    try:
        float(number)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{word}: 100, or mezo=100") from None
    return word


def arguments(doc: str) -> argparse.ArgumentParser:
    """Makes the parser of the command line, whose help has the first line of `doc` above it."""
    parser = argparse.ArgumentParser(description=doc.split("\n")[0])
    add = parser.add_argument
    add("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    add("--arms", nargs="+", default=DEFAULT_ARMS, help="head or head+steps: fit, fit+tezo-gn")
    add("--budget", type=float, default=300.0, help="processor seconds of training of a run")
    add("--seeds", type=int, default=3, choices=range(1, MOST_SEEDS + 1), metavar="N")
    add("--include", nargs="+", default=["last:3"], help="what the steps train")
    add("--examples", type=int, default=1000, help="training examples of a fit, drawn by the seed")
    add("--test-examples", type=int, default=400)
    add(
        "--batch-size", nargs="+", type=_numbered, metavar="[METHOD=]N",
        help="of all methods, or of one; each its own by default",
    )  # fmt: skip
    add(
        "--factor", nargs="+", type=_numbered, metavar="[METHOD=]X",
        help="of all rates, or of one method's, which are then not tuned",
    )  # fmt: skip
    add(
        "--trunk-cache", action="store_true",
        help="train on --examples alone, keep the frozen blocks' states, and stop runs by their clock",
    )  # fmt: skip
    add("--beside", default="fit", help="the arm that others are compared with, seed by seed")
    add("--max-length", type=int, default=64)
    add("--model", default=str(ROOT / ".cache/quickstart/SmolLM2-135M-Instruct"))
    add("--cache", type=Path, default=ROOT / ".cache/methods", help="of the data")
    add("--out", type=Path, default=ROOT / "docs/learning.jsonl", help="finished runs")
    add("--page", type=Path, default=ROOT / "docs/learning.md", help="where the tables go")
    add("--part", help="which of the page's tables, of a page with several")
    add("--compact", action="store_true", help="one table on the page, a column a task")
    add("--curves", action="store_true", help="draw those of runs with --trunk-cache as well")
    add("--no-page", dest="page", action="store_const", const=None, help="on the screen only")
    add("--report", action="store_true", help="run nothing, report what there is")
    return parser


def command(args: argparse.Namespace) -> str:
    """Returns the command that makes the same runs again."""
    parser, words = arguments(""), ["python benchmarks/learning.py"]
    for name in NAMED:
        value = getattr(args, name)
        if value != parser.get_default(name):
            given = value if isinstance(value, list) else [] if value is True else [str(value)]
            words.append(" ".join([f"--{name.replace('_', '-')}", *given]))
    return " ".join(words)
