"""Many directions a step: how many there are, how they are measured, and which of them count."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from tiny import make_batch, tiny
from torch import nn

import tezo_ds
from tezo_ds.directions.branches import Ask, kappas
from tezo_ds.directions.space import CoefficientSpace, Matrix, Vector
from tezo_ds.engine.live_bytes import LiveBytes
from tezo_ds.engine.slopes import WINDOW, clip, quality, slopes_of

FIELDS = {"rank": 3, "rho": 1e-2, "lr": 1e-3, "queries": 3, "seed": 5}


def run(batches: list[dict], **more: object) -> tuple[list[tuple[float, ...]], torch.Tensor]:
    """Trains a tiny model and returns κ of each step and the coefficients at the end."""
    engine = tezo_ds.initialize(tiny(), {**FIELDS, **more})
    found = [engine.step(batch).kappa for batch in batches]
    state = engine.method.state
    return found, state.get("change", state["coefficients"]).data


BATCHES = [make_batch(5, seed=step) for step in range(3)]


@pytest.mark.parametrize(
    ("method", "probe"),
    [*itertools.product(["tezo-m", "lozo"], ["fused", "inplace"]), ("mezo", "inplace")],
)
@pytest.mark.parametrize("difference", ["central", "forward"])
@pytest.mark.parametrize("cut", [{"branch_chunk": 1}, {"branch_chunk": 4}, {"micro_batch": 2}])
def test_several_forwards_give_what_one_does(
    method: str, probe: str, difference: str, cut: dict
) -> None:
    more = {"method": method, "probe": probe, "difference": difference}
    whole, learnt = run(BATCHES, **more)
    parts, same = run(BATCHES, **more, **cut)
    torch.testing.assert_close(parts, whole, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(same, learnt, rtol=1e-3, atol=1e-3 * learnt.abs().max().item())


def test_forward_differences_share_one_centre() -> None:
    fields = {**FIELDS, "difference": "forward"}
    engine = tezo_ds.initialize(tiny(), fields)
    batch, rho = BATCHES[0], FIELDS["rho"]
    ask = Ask.of(0, range(3), rho, central=False)
    assert len(ask) == 4
    sums = engine.probe.measure(engine.objective, batch, engine.method.branches(ask))
    losses = sums[0] / sums[1]
    assert losses[0].item() == pytest.approx(engine.loss(batch), rel=1e-6)
    expected = [(loss - losses[0]).item() / rho for loss in losses[1:]]
    assert engine.step(batch).kappa == pytest.approx(expected, rel=1e-6)
    errors = []
    for radius in (2e-2, 5e-3):  # the error of a forward difference is of first order in ρ
        both = (
            tezo_ds.initialize(tiny(), {**FIELDS, "rho": radius, "difference": difference}).step(
                batch
            )
            for difference in ("central", "forward")
        )
        exact, close = (torch.tensor(report.kappa) for report in both)
        errors.append((exact - close).norm().item())
    assert errors[1] < 0.4 * errors[0]


def test_fewer_branches_at_a_time_take_less_memory() -> None:
    def peak(**more: int) -> int:
        engine = tezo_ds.initialize(tiny(), {**FIELDS, "queries": 16, **more})
        batch = make_batch(8, length=60)
        engine.step(batch)
        with LiveBytes() as live:
            engine.step(batch)
        return live.peak

    whole = peak()
    assert peak(branch_chunk=4) < 0.3 * whole
    assert peak(micro_batch=2) < 0.4 * whole


def test_a_memory_budget_sets_how_many_branches_go_at_once() -> None:
    fields, batch = {**FIELDS, "queries": 16}, make_batch(8, length=60)

    def peak(**more: float) -> tuple[int, tuple[float, ...]]:
        engine = tezo_ds.initialize(tiny(), {**fields, **more})
        engine.step(make_batch(2))
        with LiveBytes() as live:
            report = engine.step(batch)
        return live.peak, report.kappa

    whole, kappa = peak()
    for share in (0.5, 0.25):
        budget = share * whole
        most, same = peak(memory_budget=budget / 2**30)
        assert 0.5 * budget < most <= 1.1 * budget
        torch.testing.assert_close(same, kappa, rtol=1e-3, atol=1e-3)
    with pytest.raises(
        tezo_ds.ConfigError, match=r"GiB: one branch of 480 tokens takes .* raise it"
    ):
        tezo_ds.initialize(tiny(), {**fields, "memory_budget": 1e-4}).step(batch)
    with pytest.raises(tezo_ds.ConfigError, match="sets branch_chunk by itself"):
        tezo_ds.initialize(tiny(), {**fields, "memory_budget": 1.0, "branch_chunk": 2})


def test_a_batch_is_cut_whatever_else_it_holds() -> None:
    engine = tezo_ds.initialize(tiny(), {**FIELDS, "micro_batch": 2})
    plain = tezo_ds.initialize(tiny(), FIELDS)
    batch = {**BATCHES[0], "position_ids": torch.arange(11)[None]}
    assert engine.loss(batch) == pytest.approx(plain.loss(batch), rel=1e-6)


def config(**fields: object) -> tezo_ds.TezoConfig:
    return tezo_ds.TezoConfig(**fields)


def test_the_number_of_directions_follows_its_schedule() -> None:
    constant = config(queries=4)
    assert {constant.queries_at(step) for step in range(50)} == {4}
    # TT-ZO: α = ln 16 / ln 100; epochs 0, 1, 2, … of 10 steps have (epoch)^α
    adaptive = config(
        query_schedule="adaptive", queries_max=16, total_steps=100, steps_per_epoch=10
    )
    alpha = math.log(16) / math.log(100)
    found = [adaptive.queries_at(step) for step in range(100)]
    assert found == [max(1, round((step // 10) ** alpha)) for step in range(100)]
    assert found[0] == 1 and found[-1] == 4 and found == sorted(found)
    one = config(query_schedule="adaptive", queries_max=16, total_steps=100, steps_per_epoch=1)
    assert one.queries_at(100) == 16
    # AdaZeta: ⌊2 · epoch^0.5⌋ with epochs from 1
    adazeta = config(
        query_schedule="adazeta", query_alpha=2.0, query_beta=0.5, queries_max=5, steps_per_epoch=3
    )
    assert [adazeta.queries_at(step) for step in range(0, 24, 3)] == [2, 2, 3, 4, 4, 4, 5, 5]
    small = adazeta.model_copy(update={"query_alpha": 0.1})
    assert small.queries_at(0) == 1


@pytest.mark.parametrize("method", ["tezo-adam", "lozo-m", "mezo"])
def test_a_growing_number_of_directions_works_with_every_method(method: str) -> None:
    fields = {
        "query_schedule": "adazeta",
        "query_beta": 1.0,
        "queries_max": 3,
        "steps_per_epoch": 1,
    }
    engine = tezo_ds.initialize(tiny(), {**FIELDS, **fields, "method": method, "lr": 1e-4})
    assert [len(engine.step(batch).kappa) for batch in [*BATCHES, BATCHES[0]]] == [1, 2, 3, 3]


class Failing:
    """A loss that is infinite in some branch of some forwards, as float16 may have it."""

    def __init__(self, branches: int, fails: dict[int, int]) -> None:
        self.branches, self.fails, self.forwards = branches, fails, 0

    def __call__(self, outputs: object, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
        loss = outputs.logits.float().square().mean(dim=(1, 2)).view(self.branches, -1).clone()
        if self.forwards in self.fails:
            loss[self.fails[self.forwards]] = math.inf
        self.forwards += 1
        return loss.flatten(), torch.ones(loss.numel())


def test_a_direction_that_failed_is_left_out_of_its_step() -> None:
    engine = tezo_ds.initialize(tiny(), FIELDS, Failing(6, {1: 3}))  # step 1, - of direction 1
    whole = tezo_ds.initialize(tiny(), FIELDS, Failing(6, {}))
    for step, batch in enumerate(BATCHES):
        before = engine.method.coefficients.clone()
        report, full = engine.step(batch), whole.step(batch)
        if step == 1:
            assert report.dropped == 1 and math.isnan(report.kappa[1])
            assert report.kappa[0::2] == pytest.approx(full.kappa[0::2], rel=1e-6)
            assert math.isfinite(report.loss) and report.quality.mean == pytest.approx(
                (report.kappa[0] + report.kappa[2]) / 2
            )
            tau = engine.space.taus(1, range(3)).double()
            g = (report.kappa[0] * tau[0] + report.kappa[2] * tau[2]) / 2
            moved = engine.method.coefficients - before
            torch.testing.assert_close(moved, -FIELDS["lr"] * g, rtol=1e-9, atol=1e-12)
            break
        assert report.kappa == full.kappa and report.dropped == 0
    again = tezo_ds.initialize(tiny(), FIELDS)
    for step, kappa in enumerate([engine_kappa(0), [report.kappa[0], None, report.kappa[2]]]):
        again.replay(step, kappa, FIELDS["lr"], FIELDS["rho"])
    assert torch.equal(again.method.coefficients, engine.method.coefficients)


def engine_kappa(step: int) -> tuple[float, ...]:
    return tezo_ds.initialize(tiny(), FIELDS, Failing(6, {})).step(BATCHES[step]).kappa


def test_failures_in_a_row_stop_a_run_and_single_ones_do_not() -> None:
    now_and_then = tezo_ds.initialize(tiny(), FIELDS, Failing(6, dict.fromkeys(range(1, 40, 2), 0)))
    for step in range(12):
        assert now_and_then.step(BATCHES[0]).dropped == step % 2
    always = tezo_ds.initialize(tiny(), FIELDS, Failing(6, dict.fromkeys(range(2, 40), 0)))
    for _ in range(6):
        always.step(BATCHES[0])
    with pytest.raises(tezo_ds.ProbeError, match="step 6: loss is inf in 1 of 6 branches, the 5th"):
        always.step(BATCHES[0])


def test_slopes_are_a_mean_of_those_that_were_measured() -> None:
    losses = torch.tensor([[1.0, 0.5, math.inf, 2.0, 3.0, 1.0]]).double()
    found = kappas(losses, 0.25, central=True)
    torch.testing.assert_close(found, torch.tensor([[1.0, math.nan, 4.0]]).double(), equal_nan=True)
    assert slopes_of(found[0]).tolist() == [0.5, 0.0, 2.0]
    assert slopes_of(torch.tensor([math.nan])).tolist() == [0.0]
    forward = kappas(torch.tensor([[1.0, 2.0, 0.5], [math.nan, 1.0, 2.0]]).double(), 0.5, False)
    assert forward[0].tolist() == [2.0, -1.0] and bool(forward[1].isnan().all())


def test_clipping_bounds_by_a_quantile_of_what_was_seen_before() -> None:
    generator, window = torch.Generator().manual_seed(0), torch.empty(0, dtype=torch.float64)
    seen = torch.randn(WINDOW + 50, 2, generator=generator, dtype=torch.float64)
    for kappa in seen[:8]:
        clipped, window = clip(kappa, 0.9, window)
        assert torch.equal(clipped, kappa), "too few to say what is usual"
    for kappa in seen[8:]:
        _, window = clip(kappa, 0.9, window)
    before = window
    assert torch.equal(before, seen.flatten().abs()[-WINDOW:])
    bound = torch.quantile(before, 0.9).item()
    odd = torch.tensor([100.0, -100.0, 1e-3, math.nan]).double()
    clipped, window = clip(odd, 0.9, before)
    expected = torch.tensor([bound, -bound, 1e-3, math.nan]).double()
    torch.testing.assert_close(clipped, expected, equal_nan=True)
    assert window.max() == 100, "the window has what was measured"
    engine = tezo_ds.initialize(tiny(), {**FIELDS, "clip_kappa": 0.5})
    for step in range(20):
        before = engine.method.coefficients.clone()
        report = engine.step(make_batch(3, seed=step))
    bound = torch.quantile(engine.run_state.window[:-3], 0.5).item()
    kappa = torch.tensor(report.kappa, dtype=torch.float64)
    assert kappa.abs().max() > bound, "a report has what was measured"
    g = (kappa.clamp(-bound, bound)[:, None] * engine.space.taus(19, range(3))).mean(dim=0)
    moved = engine.method.coefficients - before
    torch.testing.assert_close(moved, -FIELDS["lr"] * g, rtol=1e-9, atol=1e-12)


def space(vectors: bool = False) -> CoefficientSpace:
    matrices = [Matrix(f"m{i}", (90, 80), 16) for i in range(5)]
    return CoefficientSpace(matrices, 3, [Vector("v", 21)] if vectors else [])


def test_sums_are_the_same_bits_in_any_order_and_right(monkeypatch: pytest.MonkeyPatch) -> None:
    of, generator = space(vectors=True), torch.Generator().manual_seed(1)
    slopes = torch.randn(37, generator=generator, dtype=torch.float64).pow(5)
    whole = of.weighted(4, slopes, range(37))
    parts = [of.weighted(4, slopes, range(*cut)) for cut in ((20, 37), (0, 3), (3, 20))]
    assert torch.equal(whole, sum(parts))
    monkeypatch.setattr("tezo_ds.directions.space.AHEAD", 300)  # three directions at a time
    assert torch.equal(whole, of.weighted(4, slopes, range(37)))
    exact = (slopes[:, None] * of.taus(4, range(37)).double()).sum(dim=0)
    torch.testing.assert_close(of.unweighted(whole, slopes), exact, rtol=1e-12, atol=0)
    huge = torch.tensor([1e300, -1e300], dtype=torch.float64)
    assert bool(of.unweighted(of.weighted(0, huge, range(2)), huge).isfinite().all())
    nothing = torch.zeros(2, dtype=torch.float64)
    assert not of.weighted(0, nothing, range(2)).any()


def test_quality_tells_the_gradient_of_a_linear_loss() -> None:
    of, generator = space(), torch.Generator().manual_seed(2)
    true = torch.randn(of.numel, generator=generator, dtype=torch.float64)
    norms, ratios = [], []
    for step in range(30):
        tau = of.taus(step, range(64)).double()
        kappa = tau @ true
        g = (kappa[:, None] * tau).mean(dim=0)
        found = quality(kappa, g)
        norms.append(found.gradient_norm)
        ratios.append((found.snr, (true.square().sum() / (g - true).square().sum()).item()))
    norm = true.norm().item()
    assert sum(norms) / len(norms) == pytest.approx(norm, rel=0.05)
    estimated, actual = (sum(column) / len(ratios) for column in zip(*ratios, strict=True))
    assert estimated == pytest.approx(actual, rel=0.25)
    assert quality(torch.tensor([2.0, math.nan]).double(), true).snr is None
    assert quality(torch.tensor([math.nan]).double(), true).mean is None


@pytest.mark.parametrize("method", ["lozo", "mezo"])
@pytest.mark.parametrize("vectors", [False, True])
def test_directions_that_are_not_of_coefficients_have_no_snr(
    method: str, vectors: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = {"method": method, "train_vectors": vectors, "queries": 3, "lr": 0.0}
    engine = tezo_ds.initialize(tiny(), fields)
    if not vectors:  # then no τ is drawn, either
        monkeypatch.setattr(engine.space, "taus", None)
    found = engine.step(BATCHES[0]).quality
    assert found.snr is None and found.spread and found.gradient_norm


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"query_schedule": "adaptive", "total_steps": 9}, "adaptive needs queries_max"),
        ({"query_schedule": "adaptive", "queries_max": 4}, "adaptive needs total_steps"),
        ({"placement": "per_rank", "probe": "inplace"}, "per_rank needs the fused probe"),
        ({"placement": "per_rank", "method": "mezo"}, "placement per_rank needs the fused probe"),
        ({"query_schedule": "adazeta", "queries_max": 4}, "adazeta needs steps_per_epoch"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(fields: dict, message: str) -> None:
    with pytest.raises(tezo_ds.ConfigError) as caught:
        tezo_ds.initialize(
            nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 9)), {"rank": 2, **fields}
        )
    assert message in str(caught.value) and "\n" not in str(caught.value)
