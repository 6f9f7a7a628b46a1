"""Methods that write 16-bit weights: updates far below an ulp arrive by stochastic rounding alone."""

from __future__ import annotations

import pytest
import torch
from tiny import make_batch, tiny

import tezo_ds

STEPS = 24
FIELDS = {"rank": 3, "rho": 1e-2, "seed": 5}
LR = {torch.bfloat16: 2e-5, torch.float16: 2e-6}  # far below half an ulp of 0.1


def change(method: str, dtype: torch.dtype, lr: float, **more: object) -> torch.Tensor:
    """Returns the change of all weights of 0.1 and more, by given slopes, so that dtypes differ by
    rounding alone."""
    start = tiny("llama").half().to(dtype)  # values that every dtype has
    for parameter in start.parameters():
        parameter.data.copy_(parameter.data.bfloat16())
    engine = tezo_ds.initialize(start, {**FIELDS, "method": method, **more})
    before = {name: tensor.double() for name, tensor in engine.state_dict().items()}
    for step in range(STEPS):
        engine.replay(step, [1.0], lr, 1e-3)
    after = engine.state_dict()
    names = [matrix.name for matrix in engine.space.matrices]
    moved = torch.cat([(after[name].double() - before[name]).flatten() for name in names])
    return moved[torch.cat([before[name].flatten() for name in names]).abs() > 0.1]


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("tezo-adam", {}),
        ("mezo-adam", {"restore": "copy"}),
        ("lozo", {"nu": 4, "share": 0.1}),
        ("tezo", {"refresh_every": 4, "share": 0.02}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_updates_arrive_on_average(method: str, more: dict, dtype: torch.dtype) -> None:
    more = dict(more)
    lr = LR[dtype] * more.pop("share", 1.0)  # of what a write is the sum of several steps
    goal = change(method, torch.float32, lr, **more)
    stochastic = change(method, dtype, lr, **more)
    nearest = change(method, dtype, lr, stochastic_rounding=False, **more)
    # Regression of what arrived on what should have: 1 without bias, 0 where all of it is lost.
    arrived, lost = ((goal @ given / (goal @ goal)).item() for given in (stochastic, nearest))
    assert arrived == pytest.approx(1, abs=0.25)
    assert lost == pytest.approx(0, abs=0.05)


def test_a_bfloat16_run_is_repeated_to_the_bit() -> None:
    states = []
    for _ in range(2):
        fields = {**FIELDS, "method": "tezo-adam", "lr": 1e-3, "rank": 3}
        engine = tezo_ds.initialize(tiny("llama").bfloat16(), fields)
        for step in range(3):
            engine.step(make_batch(3, seed=step))
        states.append(engine.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    other = tezo_ds.initialize(tiny("llama").bfloat16(), fields).state_dict()
    assert not torch.equal(other["lm_head.weight"], states[0]["lm_head.weight"])
