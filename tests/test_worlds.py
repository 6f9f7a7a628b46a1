"""Runs the cases of tests/world_*.py in real worlds of 1 to 4 gloo ranks, one world per size."""

from __future__ import annotations

import pytest
from worlds import Background, load_cases


@pytest.mark.parametrize(
    ("size", "name"),
    sorted((size, case.name) for case in load_cases() for size in case.worlds),
)
def test_case(size: int, name: str, worlds_in_background: Background) -> None:
    errors = worlds_in_background.results(size)[name]
    assert not errors, "\n".join(errors)
