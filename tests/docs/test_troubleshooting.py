"""Messages that docs/troubleshooting.md explains are messages of the package."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROWS = re.findall(r"^\| `([^`]+)` \|", (ROOT / "docs" / "troubleshooting.md").read_text(), re.M)


@cache
def said() -> str:
    """Returns all text of the package's strings; what f-strings put in is a space."""
    parts = []
    for path in sorted((ROOT / "tezo_ds").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                values = (v.value if isinstance(v, ast.Constant) else " " for v in node.values)
                parts.append("".join(map(str, values)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                parts.append(node.value)
    return "\n".join(" ".join(part.split()) for part in parts)


def test_twenty_or_more_are_explained() -> None:
    assert len(set(ROWS)) == len(ROWS) >= 20


@pytest.mark.parametrize("row", ROWS)
def test_each_is_a_message_of_the_package(row: str) -> None:
    text = said()
    for part in re.split(r"\s*…\s*", row):
        assert " ".join(part.split()) in text, part
