"""Writer of the texts on options outside of the code: docs/configuration.md, the table of docs/python.md, and
the help texts that tests/cli/test_help.py compares with. Run this after a change of a field.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from pydantic import BaseModel
from typer.testing import CliRunner

from tezo_ds.cli import app
from tezo_ds.cli.options import shown_default
from tezo_ds.config import TezoConfig
from tezo_ds.config.declared import extra_of
from tezo_ds.config.registry import METHODS
from tezo_ds.settings import RunOptions, Settings

REPO = Path(__file__).resolve().parent.parent
HELP = REPO / "tests" / "cli" / "help"
COMMANDS = (
    "",
    "train",
    "evaluate",
    "export",
    "replay",
    "doctor",
    "env",
    "plan",
    "probe-layers",
    "sweep",
)
FIRST = (
    "method", "rank", "rho", "lr", "schedule", "queries", "placement", "probe", "memory_budget", "include",
    "exclude", "seed",
)  # fmt: skip
HEADING, RULE = "| field | default | used by | | example |", "|---|---|---|---|---|"
BEGIN, END = "<!-- made by launch/reference.py -->", "<!-- end -->"

HEAD = """# Every field

Made by `python launch/reference.py` from the fields that `tezo_ds/config/fields.py` and `tezo_ds/settings.py`
declare; `--help` shows the same sentences.

A run is configured in two places. The **`tezo` block** says how it learns: it stands in a DeepSpeed JSON, or
is a dict for `tezo_ds.initialize`; on the command line each of its fields has an option of the same name with
`-` for `_`, which wins. The **settings** say what it learns from and where; they are options of the command
line alone, and are kept in the run's `config.json`.
"""


def configuration() -> str:
    """Returns the text of docs/configuration.md."""
    parts = [
        HEAD,
        "## The `tezo` block\n",
        *_sections(TezoConfig, "###"),
        "### Methods\n",
        _methods(),
    ]
    parts += ["## Settings\n", "Of `train` and `evaluate`.\n", *_sections(Settings, "###")]
    parts += ["## The run\n", "Of `train` alone.\n", *_sections(RunOptions, "###")]
    return "\n".join(parts)


def _sections(model: type[BaseModel], level: str) -> Iterator[str]:
    groups: dict[str | None, list[str]] = {}
    for name, field in model.model_fields.items():
        extra = extra_of(field)
        if not extra["flag"]:
            continue
        example = f"`{_example(model, name, extra['example'])}`"
        text = _cell(field.description)
        row = f"| `{name}` | {_default(shown_default(field))} | {extra['used_by']} | {text} | {example} |"
        groups.setdefault(extra["group"], []).append(row)
    for group, rows in groups.items():
        heading = f"{level} {group}\n\n" if group else ""
        yield "\n".join([heading + HEADING, RULE, *rows, ""])


def _example(model: type[BaseModel], name: str, value: object) -> str:
    if model is TezoConfig:
        return f'"{name}": {json.dumps(value)}'
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    text = json.dumps(value) if isinstance(value, dict) else str(value)
    return f"--{flag} '{text}'" if re.search(r"[\s{]", text) else f"--{flag} {text}"


def _methods() -> str:
    rows = [
        f"| `{name}` | {facts.summary} | {facts.rank or 'none: dense directions'} "
        f"| {'coefficients, a LoRA adapter' if facts.learns_coefficients else 'weights'} |"
        for name, facts in METHODS.items()
    ]
    return (
        "| `method` | | default rank | what it learns |\n|---|---|---|---|\n"
        + "\n".join(rows)
        + "\n"
    )


def _default(text: str) -> str:
    return f"`{text}`" if text else ""


def _cell(text: str | None) -> str:
    return str(text).replace("|", "\\|")


def table() -> str:
    """Returns the table of docs/python.md: fields that people set first."""
    fields = TezoConfig.model_fields
    rows = [
        f"| `{name}` | {_default(shown_default(fields[name]))} | {_cell(fields[name].description)} |"
        for name in FIRST
    ]
    return "\n".join(["| field | default | |", "|---|---|---|", *rows])


def help_of(command: str) -> str:
    """Returns what `tezo-ds COMMAND --help` prints on 100 columns."""
    with mock.patch.dict(os.environ, {"COLUMNS": "100", "TERMINAL_WIDTH": "100"}):
        words = [command, "--help"] if command else ["--help"]
        shown = CliRunner().invoke(app, words, prog_name="tezo-ds", color=False)
    return "\n".join(line.rstrip() for line in shown.output.splitlines()) + "\n"


def with_table(page: str) -> str:
    """Returns docs/python.md with its table as it has to be."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}"


def main() -> None:
    """Writes docs/configuration.md, the table of docs/python.md and the help texts."""
    (REPO / "docs" / "configuration.md").write_text(configuration())
    page = REPO / "docs" / "python.md"
    page.write_text(with_table(page.read_text()))
    HELP.mkdir(parents=True, exist_ok=True)
    for command in COMMANDS:
        (HELP / f"{command or 'tezo-ds'}.txt").write_text(help_of(command))


if __name__ == "__main__":
    main()
