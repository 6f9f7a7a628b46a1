"""Runs the cases of tests/world_*.py in real worlds of 1 to 4 gloo ranks, one world per size."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import pytest
from worlds import load_cases, run_world


@functools.lru_cache(None)
def results(size: int) -> dict[str, list[str]]:
    with tempfile.TemporaryDirectory() as folder:
        return run_world(size, Path(folder))


@pytest.mark.parametrize(
    ("size", "name"),
    sorted((size, case.name) for case in load_cases() for size in case.worlds),
)
def test_case(size: int, name: str) -> None:
    errors = results(size)[name]
    assert not errors, "\n".join(errors)
