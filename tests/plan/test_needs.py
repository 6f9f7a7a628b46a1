"""Memory that a run needs, from shapes alone."""

from __future__ import annotations

from typing import Any

import torch
from tiny import tiny

from tezo_ds.config import TezoConfig
from tezo_ds.plan.needs import RECORDS, Layout, Needs, PlannedRun, factor_numel, needs


def test_needs_of_a_tiny_model() -> None:
    with torch.device("meta"):
        model = tiny()
    numel = sum(p.numel() for p in model.parameters())
    matrices = {n: p for n, p in model.named_parameters() if p.dim() == 2}
    trained = sum(p.numel() for p in matrices.values())

    def of(layout: Layout, **fields: Any) -> Needs:
        run = PlannedRun(model, TezoConfig(**{"rank": 3, **fields}), layout)
        return needs(run, snapshots=2)

    factors = 3 * sum(sum(p.shape) for p in matrices.values())
    whole = of(Layout())
    assert (whole.shard, whole.gathered, whole.probe) == (4 * numel, 0, 4 * factors)
    assert whole.state == 8 * 3 * len(matrices)
    assert whole.disk == RECORDS + 3 * whole.state + 4 * factors
    assert of(Layout(), probe="inplace").probe == 4 * (factors + trained)
    lozo = of(Layout(), method="lozo", queries=2)
    left = sum(p.shape[0] for p in matrices.values())
    assert lozo.probe == 4 * (factors + 2 * 3 * left)
    assert lozo.disk > RECORDS + 3 * 4 * trained
    adam = of(Layout(2), method="mezo-adam")
    assert adam.probe == 0 and adam.state > 8 * trained // 2
    auto = PlannedRun(model, TezoConfig(rank="auto", rank_max=5))
    assert factor_numel(auto.method, auto.config, auto.space.matrices) == 5 * factors // 3
    three = of(Layout(3, gathers=True))
    assert 4 * numel / 3 <= three.shard < 4 * numel / 3 + 4 * 2 * len(list(model.parameters()))
    block = 4 * sum(p.numel() for p in model.model.layers[0].parameters())
    assert three.gathered == 4 * numel  # two blocks are all that there are
    assert three.sent == 4 * numel > 2 * block
    assert of(Layout(4, second=2, gathers=True)).shard > 0.74 * 4 * numel
