"""The benchmark of padding: what it counts."""

from __future__ import annotations

from padding import FREE, GROUPED, PADDED, computed_for_real


def test_computed_for_real_tokens() -> None:
    lengths = [3 if i % 2 else 30 for i in range(400)]
    assert computed_for_real([7] * 12, 4, 6, PADDED) == 1.0
    assert 1.5 < computed_for_real(lengths, 4, 100, PADDED) < 2
    assert computed_for_real(lengths, 4, 100, GROUPED) < 1.1
    assert computed_for_real(lengths, 4, 100, FREE) == 1.0
    assert 1.0 < computed_for_real([100, 150, 300, 90], 4, 1, FREE) < 1.07
