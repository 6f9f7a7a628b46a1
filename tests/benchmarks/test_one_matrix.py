"""The benchmark of one matrix: its ways make the same results."""

from __future__ import annotations

import one_matrix
import pytest
import torch
from torch import Tensor


def test_all_ways_make_the_same_results(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {24: ((24, (24, 11, 11)), (11, (24,)))}
    monkeypatch.setattr(one_matrix, "BLOCKS", sizes)
    torch.manual_seed(0)
    layers = one_matrix.made(24, 3)
    made: list[Tensor] = []
    product = Tensor.__matmul__

    def noted(x: Tensor, other: Tensor) -> Tensor:
        made.append(product(x, other))
        return made[-1]

    monkeypatch.setattr(Tensor, "__matmul__", noted)
    found: dict[str, list[Tensor]] = {}
    for way, run in one_matrix.forwards(layers, 5, 3).items():
        made.clear()
        run()
        outs = [11, 11, 24, 24]  # a result's width, also where V's columns follow
        results = [y[:, :24] for y in made if y.shape[1] not in (9, 3)]
        found[way] = sorted(results, key=lambda y: (y.shape[1], float(y.abs().sum())))
        assert [y.shape[1] for y in found[way]] == outs
    for way in ("V below W", "U beside W"):
        for ours, wanted in zip(found[way], found["apart"], strict=True):
            torch.testing.assert_close(ours, wanted)
    assert not torch.allclose(found["plain"][0], found["apart"][0])

    monkeypatch.setattr(
        "sys.argv", ["one_matrix.py", "--hidden", "24", "--rounds", "3", "--tokens", "4"]
    )
    one_matrix.main()
    assert "| 4 | " in capsys.readouterr().out
