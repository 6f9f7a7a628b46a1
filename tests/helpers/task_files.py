"""Data files for the tests of tasks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tezo_ds.tasks import Example

Rows = list[dict[str, Any]]
TEMPLATE = "{text} It was"
WORDS = {"neg": "terrible", "pos": "great"}


def write(path: Path, rows: Rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def reviews(n: int) -> Rows:
    return [{"text": f"film {i}", "label": ("neg", "pos")[i % 2]} for i in range(n)]


def prompts(examples: list[Example]) -> list[str]:
    return [e.prompt for e in examples]
