"""`normalize: std`: σ of a step's losses, and steps that do not depend on the loss's unit."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from own_directions import OWN, ragged
from tiny import make_batch, tiny

import tezo_ds
from tezo_ds.directions.branches import kappas
from tezo_ds.solving.deviation import deviation, scale_of

RHO = 1e-2


def test_sigma_is_the_standard_deviation_of_the_losses() -> None:
    generator = torch.Generator().manual_seed(0)
    for count in (1, 2, 7, 300):
        middle, half = torch.randn(2, count, generator=generator, dtype=torch.float64)
        pairs = torch.stack([middle + half, middle - half], dim=1).view(1, -1)  # L⁺, L⁻, L⁺, …
        found = deviation(kappas(pairs, RHO, True)[0], RHO, True)
        centred = torch.stack([half, -half]).flatten().tolist()  # each about the middle of its pair
        assert found == pytest.approx(statistics.stdev(centred), rel=1e-12)
        ahead = torch.cat([torch.tensor([0.7]).double(), 0.7 + half])[None]
        found = deviation(kappas(ahead, RHO, False)[0], RHO, False)
        expected = statistics.stdev(ahead[0, 1:].tolist()) if count > 1 else 0.0  # FZOO's
        assert found == pytest.approx(expected, rel=1e-9)


def test_sigma_does_not_depend_on_an_order_of_summing() -> None:
    kappa = torch.randn(1000, generator=torch.Generator().manual_seed(1)).double()
    turned = kappa[torch.randperm(1000, generator=torch.Generator().manual_seed(2))]
    for central in (True, False):
        assert deviation(kappa, RHO, central) == deviation(turned, RHO, central)
        assert deviation(kappa, RHO, central) == pytest.approx(
            deviation(1e-200 * kappa, RHO, central) * 1e200, rel=1e-12
        )
        assert math.isfinite(deviation(1e300 * kappa, 1.0, central))


def test_it_is_defined_where_there_is_nothing_to_divide_by() -> None:
    nan = math.nan
    for central in (True, False):
        config = tezo_ds.TezoConfig(
            normalize="std", difference="central" if central else "forward", queries=2
        )
        for odd in ([0.0, 0.0], [nan, nan], [5e-324, 5e-324]):
            assert scale_of(config, torch.tensor(odd, dtype=torch.float64), 1e-3) == 0.0
    central = tezo_ds.TezoConfig(normalize="std")
    one, two = (torch.tensor(k, dtype=torch.float64) for k in ([3.0, nan], [3.0]))
    assert (
        scale_of(central, one, RHO) == scale_of(central, two, RHO) == 1 / (RHO * 3 * math.sqrt(2))
    )
    assert scale_of(tezo_ds.TezoConfig(), one, RHO) == 1.0


def scaled(by: float):
    def loss(outputs, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
        losses = by * outputs.logits.double().square().mean(dim=(1, 2))
        return losses, torch.ones(len(losses))

    return loss


@pytest.mark.parametrize(
    "more",
    [{}, {"difference": "forward"}, {"placement": "per_example"}, {"method": "lozo"}],
    ids=str,
)
def test_a_step_does_not_depend_on_the_unit_of_the_loss(more: dict) -> None:
    def learnt(by: float, **fields: object) -> torch.Tensor:
        base = {"rank": 3, "rho": RHO, "lr": 1e-4, "queries": 3, "seed": 2}
        engine = tezo_ds.initialize(tiny(), {**base, **more, **fields}, scaled(by))
        for step in range(3):
            engine.step({k: v for k, v in make_batch(5, seed=step).items() if k != "labels"})
        state = engine.method.state
        return state.get("change", state["coefficients"]).data

    one, many = (learnt(by, normalize="std") for by in (1.0, 64.0))
    torch.testing.assert_close(one, many, rtol=1e-6, atol=1e-6 * one.abs().max().item())
    plain = learnt(1.0)
    assert one.any() and not torch.allclose(
        plain, learnt(64.0), rtol=0.5, atol=plain.abs().max().item()
    )


@pytest.mark.parametrize(
    "more", [{}, {"difference": "forward", "method": "tezo-m"}, {"clip_kappa": 0.9}], ids=str
)
def test_the_journals_slopes_give_the_same_bits(more: dict) -> None:
    for fields in (
        {**OWN, "normalize": "std", **more},
        {**OWN, "placement": "shared", "normalize": "std", **more},
    ):
        engine = tezo_ds.initialize(tiny(), fields)
        reports = [engine.step(ragged(5, step)) for step in range(6)]
        again = tezo_ds.initialize(tiny(), fields)
        for report in reports:
            again.replay(report.step, report.kappa, report.lr, report.rho)
        assert torch.equal(again.method.coefficients, engine.method.coefficients)
        assert engine.method.coefficients.any()


def test_the_quality_of_slopes_is_of_slopes_as_measured() -> None:
    found = []
    for normalize in ("none", "std"):
        fields = {**OWN, "lr": 0.0, "normalize": normalize}
        found.append(tezo_ds.initialize(tiny(), fields).step(ragged(6)).quality)
    assert found[0].snr == pytest.approx(found[1].snr, rel=1e-6)
    assert found[0].gradient_norm == found[1].gradient_norm


def test_what_has_no_sigma_is_refused_in_one_line() -> None:
    fields = {"rank": 2, "difference": "forward", "normalize": "std"}
    with pytest.raises(
        tezo_ds.ConfigError, match="one forward difference has no standard deviation"
    ) as caught:
        tezo_ds.initialize(tiny(), fields).step(make_batch(3))
    assert "\n" not in str(caught.value)
    with pytest.raises(tezo_ds.ConfigError, match="normalize: tezo-gn"):
        tezo_ds.initialize(tiny(), {"method": "tezo-gn", "normalize": "std"})
