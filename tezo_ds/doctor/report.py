"""What a doctor says: a row for each check, as a table or as JSON."""

from __future__ import annotations

import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Literal, TypeVar

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tezo_ds.errors import TezoError
from tezo_ds.files.text import to_json

Thing = TypeVar("Thing")
Status = Literal["green", "yellow", "red", "unchecked"]
WORDS: dict[Status, str] = {
    "green": "ok", "yellow": "warning", "red": "FAILED", "unchecked": "not checked",
}  # fmt: skip
STYLES: dict[Status, str] = {
    "green": "green", "yellow": "yellow", "red": "bold red", "unchecked": "bright_black",
}  # fmt: skip
WIDTH = 130  # columns of a table that no terminal shows


@dataclass(frozen=True)
class Row:
    """What one check found; `advice` says what to do about it."""

    check: str
    status: Status
    found: str
    advice: str = ""


@dataclass(frozen=True)
class Failed:
    """In place of what could not be found out: why not, in one line."""

    why: str


def attempt(work: Callable[[], Thing]) -> Thing | Failed:
    """What `work` gives; an error of any kind is a finding of its own."""
    try:
        return work()
    except Exception as error:
        return Failed(one_line(error))


def row_of(check: str, judge: Callable[[], Row]) -> Row:
    """The row that `judge` gives. What it raises for users to read is a finding, and red; any other error is
    ours, so the check was not made."""
    try:
        return judge()
    except (TezoError, OSError) as error:
        return Row(check, "red", one_line(error))
    except Exception as error:
        return Row(
            check, "unchecked", f"could not be judged: {one_line(error)}", "report this error"
        )


def one_line(error: BaseException) -> str:
    """An error as users see it: ours as they are, others with their type."""
    if isinstance(error, TezoError):
        return str(error)
    first, *_ = str(error).splitlines() or [""]
    return textwrap.shorten(f"{type(error).__name__}: {first}", 300, placeholder=" …")


def exit_code(rows: Sequence[Row]) -> int:
    """1 where something is red, else 0."""
    return int(any(row.status == "red" for row in rows))


def show(rows: Sequence[Row], as_json: bool) -> None:
    """Prints all rows, on standard output."""
    if as_json:
        print(to_json({"ok": not exit_code(rows), "rows": [asdict(row) for row in rows]}))
        return
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console = Console(highlight=False, markup=False, emoji=False, width=WIDTH)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("check", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("found", overflow="fold")
    table.add_column("what to do", overflow="fold")
    for row in rows:
        word = Text(WORDS[row.status], style=STYLES[row.status])
        table.add_row(row.check, word, row.found, row.advice)
    console.print(table)
    counts = Counter(row.status for row in rows)
    said = (f"{counts[status]} {word}" for status, word in WORDS.items() if counts[status])
    console.print(", ".join(said))
    sys.stdout.flush()
