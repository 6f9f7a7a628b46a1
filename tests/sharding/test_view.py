"""A shard as rectangles: every element once, in order, and never more than asked for."""

from __future__ import annotations

import pytest
import torch

from tezo_ds.sharding.view import ShardView

W = torch.arange(7 * 5).view(7, 5)


def of(piece) -> torch.Tensor:
    rows, columns = piece.rows, piece.columns
    return W[rows.start : rows.stop, columns.start : columns.stop]


@pytest.mark.parametrize("columns", [None, range(1, 4)])
@pytest.mark.parametrize("numel", [1, 5, 11, 100])
def test_pieces_cover_a_shard_in_order(columns: range | None, numel: int) -> None:
    held = W if columns is None else W[:, columns.start : columns.stop]
    flat = held.reshape(-1)
    for start in range(flat.numel()):
        for stop in range(start, flat.numel() + 1):
            view = ShardView("w", (7, 5), start, flat[start:stop], columns)
            seen = list(view.pieces(numel))
            assert all(torch.equal(piece.values, of(piece)) for piece in seen)
            assert all(piece.values.numel() <= max(numel, view.width) for piece in seen)
            joined = torch.cat([piece.values.flatten() for piece in seen]) if seen else flat[:0]
            assert torch.equal(joined, flat[start:stop])


def test_writing_a_piece_writes_the_shard() -> None:
    shard = torch.zeros(17)
    for piece in ShardView("w", (7, 5), 3, shard).pieces(10):
        piece.values.add_(1)
    assert torch.equal(shard, torch.ones(17))
