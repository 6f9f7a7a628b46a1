"""The benchmark of many directions: its true gradient, its ranks in turn, its records and its page."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import directions
import pytest
import torch
from parts.directions import gradient as directions_gradient
from parts.directions.gradient import agreement, cosine, cosines, differentiable, expected_cosine
from parts.directions.report import MARKERS
from parts.directions.speed import update_cost
from parts.directions.training import Curves, RanksInTurn, Way, points_of
from parts.methods.data import read_splits
from parts.methods.report import Results
from parts.methods.training import choice_loss
from rich.console import Console
from task_files import WORDS, reviews, write
from tiny import make_batch, part_of, tiny
from tiny_tokenizer import save_tiny_llama
from torch import Tensor

import tezo_ds

INCLUDE = ("*_proj*",)


def at_some_coefficients(dtype: torch.dtype = torch.float64, **more: object) -> tezo_ds.Engine:
    """Makes an engine whose coefficients are not zero."""
    fields = {"rank": 3, "rho": 1e-4, "lr": 0.0, "include": INCLUDE, "seed": 3, **more}
    engine = tezo_ds.initialize(tiny().to(dtype), fields)
    engine.objective.choices = torch.arange(engine.sharding.module.config.vocab_size)
    noise = torch.randn(engine.space.numel, generator=torch.manual_seed(0))
    engine.method.coefficients.copy_(2e-2 * noise)
    return engine


def true_gradient(engine: tezo_ds.Engine, batch: dict[str, Tensor]) -> Tensor:
    with differentiable(engine) as leaf:
        loss = choice_loss(engine.sharding.module, batch, engine.objective.choices)
    assert loss.item() == pytest.approx(engine.loss(batch), rel=1e-6)
    return torch.autograd.grad(loss, leaf)[0]


BATCH = make_batch(4, seed=1)


def test_the_gradient_is_that_of_finite_differences() -> None:
    engine = at_some_coefficients()
    found, a = true_gradient(engine, BATCH), engine.method.coefficients
    assert not any(m._forward_hooks for m in engine.sharding.module.modules()), "hooks are gone"
    expected, eps = torch.empty_like(found), 3e-4  # the model's norms and its loss are of float32
    for place in range(engine.space.numel):
        before, sides = a[place].item(), []
        for sign in (1, -1):
            a[place] = before + sign * eps
            sides.append(engine.loss(BATCH))
        a[place] = before
        expected[place] = (sides[0] - sides[1]) / (2 * eps)
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-4)
    assert found.abs().max() > 0.1


def test_where_it_stands_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient would be another one at a = 0, or with U and V of another seed."""
    engine = at_some_coefficients()
    found = true_gradient(engine, BATCH)
    kept = engine.method.coefficients.clone()
    engine.method.coefficients.zero_()
    assert cosine(found, true_gradient(engine, BATCH)) < 0.999
    engine.method.coefficients.copy_(kept)
    factors = directions_gradient.factors
    monkeypatch.setattr(
        directions_gradient, "factors", lambda *args: factors(*args[:3], args[3] + 1)
    )
    with pytest.raises(AssertionError):
        true_gradient(engine, BATCH)


def test_measured_slopes_are_those_of_the_true_gradient() -> None:
    engine = at_some_coefficients(queries=8, branch_chunk=5)
    with differentiable(engine) as leaf:
        loss = choice_loss(engine.sharding.module, BATCH, engine.objective.choices)
    found = agreement(engine, BATCH, loss, leaf, (1, 2, 8))
    assert found["slopes_agree"] > 0.9999
    assert found["measured"][8] == pytest.approx(found["exact"][8], abs=1e-3)
    assert {q: len(values) for q, values in found["measured"].items()} == {1: 8, 2: 4, 8: 1}
    other = make_batch(4, seed=2)
    with differentiable(engine) as leaf:
        loss = choice_loss(engine.sharding.module, BATCH, engine.objective.choices)
    assert agreement(engine, other, loss, leaf, (1,))["slopes_agree"] < 0.99, "not of another batch"


def test_cosines_of_a_known_gradient_follow_theory() -> None:
    generator, dims, most = torch.Generator().manual_seed(0), 40, 512
    gradient = torch.randn(dims, generator=generator, dtype=torch.float64)
    taus = torch.randn(most, dims, generator=generator)
    found = cosines(taus.double() @ gradient, taus, gradient, (4, 16, 64))
    for queries, values in found.items():
        assert statistics.mean(values) == pytest.approx(expected_cosine(queries, dims), rel=0.1)
    assert expected_cosine(41, 40) == pytest.approx(math.sqrt(0.5))


def test_a_matrix_that_is_not_a_linear_layers_is_named() -> None:
    engine = at_some_coefficients(torch.float32, include=("*embed*",))
    with (
        pytest.raises(ValueError, match=r"embed_tokens\.weight: belongs to a Emb"),
        differentiable(engine),
    ):
        pass


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_in_turn_find_what_each_would(ranks: int) -> None:
    """Ranks measured in turn find what real ranks find in
    `world_directions.each_rank_measures_on_its_own_data`."""
    queries, batch = 2, make_batch(7, seed=1)
    engine = at_some_coefficients(queries=queries, lr=1e-3)
    engine.measuring = RanksInTurn(engine, ranks)
    for step in range(3):
        alone = at_some_coefficients(queries=queries * ranks)
        alone.method.coefficients.copy_(engine.method.coefficients)
        expected: list[float] = []
        for rank in range(ranks):
            alone.step_index = step
            kappa = alone.step(part_of(batch, rank, ranks)).kappa
            expected += kappa[rank * queries : (rank + 1) * queries]
        before = engine.method.coefficients.clone()
        report = engine.step(batch)
        assert report.kappa == pytest.approx(expected, rel=1e-6)
        tau = engine.space.taus(step, range(queries * ranks)).double()
        g = (torch.tensor(expected).double()[:, None] * tau).mean(dim=0)
        moved = engine.method.coefficients - before
        torch.testing.assert_close(moved, -1e-3 * g, rtol=1e-6, atol=1e-9)
    whole = at_some_coefficients(queries=queries * ranks)
    assert report.kappa != pytest.approx(whole.step(batch).kappa, rel=1e-2), "own data counts"


def test_the_update_is_timed_on_its_own_share() -> None:
    shapes = [("a", (30, 20)), ("b", (20, 30))]
    found = update_cost(4, 64, 8, 3, shapes)
    assert found["coefficients"] == 16 and all(value > 0 for value in found.values())


def test_rates_and_points_are_those_announced() -> None:
    assert [Way("x", 1).rate(i, 3) for i in range(-1, 4)] == [2e-7, 6.3e-7, 2e-6, 6.3e-6, 2e-5]
    low, high = (Way("x", 4, 4).rate(i, 3) / 2e-6 for i in (0, 2))
    assert low < math.sqrt(16) and high > 16, "from √Q to Q"
    assert points_of(60, 7) == [0, 7, 10, 20, 30, 40, 50, 60]
    assert points_of(2, 7) == [0, 1, 2]


@pytest.mark.parametrize(
    ("accuracies", "tried", "best"),
    [
        ({1: 0.5, 0: 0.4, 2: 0.4}, [0, 1, 2], 1),
        ({0: 0.5, 1: 0.4, 2: 0.4, -1: 0.3}, [-1, 0, 1, 2], 0),
        ({0: 0.1, 1: 0.2, 2: 0.3, 3: 0.4, 4: 0.3}, [0, 1, 2, 3, 4], 3),
        ({0: 0.1, 1: 0.2, 2: 0.3, 3: 0.4, 4: 0.5}, [0, 1, 2, 3, 4], 4),
    ],
    ids=["inside", "below", "above", "given up"],
)
def test_beyond_an_end_that_was_best_more_rates_are_tried(
    accuracies: dict[int, float], tried: list[int], best: int, tmp_path: Path
) -> None:
    args = directions.arguments().parse_args(["--queries", "1", "--more-rates", "2"])
    results = Results(tmp_path / "results.jsonl")
    benchmark = directions.Benchmark(args, results, Console(quiet=True))
    by_rate = {Way("Q = 1", 1).rate(i, 3): accuracy for i, accuracy in accuracies.items()}
    results.add({**benchmark.wanted("training")[0], "step_seconds": 1.0})
    args.only = ["training"]
    while (key := benchmark.left()[0])["role"] == "tune":
        results.add({**key, "loss": 1 - by_rate[key["lr"]], "accuracy": 0.5})
    found = sorted(r["lr"] for r in results.records if r["role"] == "tune")
    assert found == [Way("Q = 1", 1).rate(i, 3) for i in tried]
    assert key["lr"] == Way("Q = 1", 1).rate(best, 3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Makes a folder with a tiny model, its tokenizer, and a task."""
    made = tmp_path_factory.mktemp("benchmark")
    (made / TASK).mkdir()
    rows = reviews(60)
    for name, part in (("train", slice(0, 40)), ("valid", slice(40, 48)), ("test", slice(48, 60))):
        write(made / TASK / f"{name}.jsonl", rows[part])
    texts = [f"{row['text']} It was {word}" for row in rows for word in WORDS.values()]
    save_tiny_llama(made / "model", texts, num_key_value_heads=2, head_dim=16)
    return made


TASK = "rotten-tomatoes"


@pytest.fixture
def call(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., list[dict[str, Any]]]:
    """Returns a function that runs the benchmark on the tiny model and returns the lines of results.jsonl."""
    page, out = tmp_path / "page.md", tmp_path / "out"
    page.write_text("by hand\n{}\n{}\nalso by hand\n".format(*MARKERS))
    monkeypatch.setattr(directions, "TASK", TASK)
    monkeypatch.setattr(
        directions,
        "load_splits",
        lambda task, cache, *sizes: read_splits(task, cache / task, *sizes),
    )

    def call(*more: object) -> list[dict[str, Any]]:
        sizes = "--queries 1 3 --placement-queries 1 --budget 0.02 --rates 2 --more-rates 1"
        sizes += " --train-examples 20 --valid-examples 6 --test-examples 9"
        sizes += " --gradient-queries 1 2 4 --gradient-batches 2"
        sizes += " --speed-queries 1 2 --speed-shape 2x8 --speed-rounds 2"
        sizes += " --update-queries 8 --update-worlds 1 4 --update-rounds 2"
        places = ["--model", folder / "model", "--cache", folder, "--out", out, "--page", page]
        directions.main([*sizes.split(), *map(str, [*places, *more])])
        return Results(out / "results.jsonl").records

    return call


@pytest.mark.slow
def test_all_sections_are_run_once_and_reported(
    call: Callable[..., list[dict[str, Any]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = call("--only", "gradient", "update")
    assert [r["section"] for r in some] == ["gradient"] * 2 + ["update"] * 2
    agree = [record["slopes_agree"] for record in some[:2]]
    assert min(agree) > 0.9, "the benchmark's own batch and loss"
    stop, curve = [1], Curves.curve

    def stopping(self: Curves, *args: Any) -> Any:
        stop[0] -= 1
        if stop[0] < 0:
            raise KeyboardInterrupt
        return curve(self, *args)

    monkeypatch.setattr(Curves, "curve", stopping)
    stopped = call()
    assert stopped[:4] == some and len(stopped) == 4 + 2 + 2 + 2 * 3 + 1
    stop[0] = 100
    whole = call()
    assert whole[: len(stopped)] == stopped and len(whole) == 6 + 2 * 10
    for section in ("training", "placement"):
        of_it = [record for record in whole if record["section"] == section]
        assert [r["role"] for r in of_it] == ["pace"] * 2 + ["tune"] * 6 + ["final"] * 2
        for final in (record for record in of_it if record["role"] == "final"):
            tuned = [r for r in of_it if (r["role"], r["way"]) == ("tune", final["way"])]
            best = max(tuned, key=lambda r: (-r["loss"], r["accuracy"]))
            assert final["lr"] == best["lr"] and final["curve"][-1]["steps"] == best["steps"]
    steps = {r["way"]: r["curve"][-1]["steps"] for r in whole if "curve" in r}
    assert steps["shared, q = 1"] == steps["per_rank, q = 1"], "equal data"
    page = (tmp_path / "page.md").read_text()
    assert page.startswith("by hand") and page.endswith("also by hand\n") and page.count("###") == 5
    for name in ("gradient", "training", "placement"):
        assert (tmp_path / f"directions-{name}.png").stat().st_size < 200_000
    monkeypatch.setattr(Curves, "__init__", None)
    assert call("--report") == whole, "a report loads no model"
    assert "NaN" not in json.dumps(whole)
