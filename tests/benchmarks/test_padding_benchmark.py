"""The benchmark of padding: what it counts."""

from __future__ import annotations

from padding import computed_for_real

from tezo_ds.tasks.batches import by_length


def test_computed_for_real_tokens() -> None:
    lengths = [3 if i % 2 else 30 for i in range(400)]
    assert computed_for_real([7] * 12, 4, 6, None) == 1.0
    assert 1.5 < computed_for_real(lengths, 4, 100, None) < 2
    assert computed_for_real(lengths, 4, 100, by_length(lengths, 4, 0)) < 1.1
