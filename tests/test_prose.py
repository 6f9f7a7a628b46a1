"""First sentences of docstrings can be quoted alone: they name what they are about."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# They lean on a sentence before them, or on the name that they stand under.
LEANING = {
    "Of", "By", "Likewise", "See", "Within", "It", "Its", "They", "Them", "Those", "That", "Which", "So",
    "Also", "And", "Or", "But", "Same", "Ditto", "Likewise,",
}  # fmt: skip
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def leaning(path: Path) -> list[str]:
    """Places of docstrings that begin with a word of `LEANING`."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, DOCUMENTED) and (text := ast.get_docstring(node)):
            first = text.split()[0].rstrip(".,:;")
            if first in LEANING:
                line = getattr(node, "lineno", 1)
                found.append(f"{path.relative_to(ROOT)}:{line}: {text.splitlines()[0]}")
    return found


@pytest.mark.parametrize("folder", ["tezo_ds", "launch", "benchmarks", "tests"])
def test_first_sentences_stand_alone(folder: str) -> None:
    found = [line for path in sorted((ROOT / folder).rglob("*.py")) for line in leaning(path)]
    assert not found, "\n".join(found)


def test_a_first_sentence_that_leans_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("test_prose.ROOT", tmp_path)
    (tmp_path / "one.py").write_text('def f():\n    """Of a step: its losses."""\n')
    assert leaning(tmp_path / "one.py") == ["one.py:1: Of a step: its losses."]
