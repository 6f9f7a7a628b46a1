"""Matrices with fewer rows or columns than the rank: each takes min(m, n) of it, and the rest is as ever."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from command_line import Given, Run, call
from reference_cases import quick_draws
from test_methods import FIELDS, LR, oracle
from tiny import make_batch, tiny

import tezo_ds

pytest_plugins = ("cli_fixtures",)
pytestmark = pytest.mark.usefixtures(quick_draws.__name__)
RANK = 12  # above the 10 rows of k_proj and v_proj
SMALL = (
    "of 15 matrices, which take that instead, e.g. 10 for model.layers.0.self_attn.k_proj.weight"
)


@pytest.mark.parametrize(
    "method", ["tezo", "tezo-m", "tezo-adam", "tezo-adam-coef", "lozo", "lozo-m"]
)
@pytest.mark.parametrize("probe", ["fused", "inplace"])
def test_the_engine_is_the_oracle_with_the_lower_rank(method: str, probe: str) -> None:
    lr = LR.get(method, FIELDS["lr"])
    fields = {**FIELDS, "method": method, "probe": probe, "rank": RANK, "lr": lr, "queries": 1}
    model = tiny("llama").double()
    engine = tezo_ds.initialize(tiny("llama").double(), fields)
    ranks = {m.name: m.rank for m in engine.space.matrices}
    assert ranks == {m.name: min(RANK, *m.shape) for m in engine.space.matrices}
    assert set(ranks.values()) == {10, 12}
    batches = [make_batch(3, seed=step) for step in range(4)]
    records = oracle(model, list(ranks), method, {**fields, "rank": ranks}, batches)
    for record, batch in zip(records, batches, strict=True):
        kappa = engine.step(batch).kappa
        torch.testing.assert_close(kappa, tuple(record.kappas), rtol=1e-4, atol=1e-5)
    merged = engine.state_dict()
    for name, weight in record.weights.items():
        torch.testing.assert_close(merged[name], weight, rtol=0, atol=1e-7)


@pytest.mark.parametrize("kind", ["roberta", "gpt2", "opt", "neox", "qwen-moe"])
def test_models_with_small_tables_train_at_a_higher_rank(kind: str) -> None:
    engine = tezo_ds.initialize(tiny(kind), {"rho": 1e-2, "rank": 25})
    ranks = {matrix.name: matrix.rank for matrix in engine.space.matrices}
    assert ranks == {m.name: min(25, *m.shape) for m in engine.space.matrices} != {}
    assert min(ranks.values()) < 25
    assert engine.step(make_batch(3)).kappa[0] != 0


def test_dense_directions_know_no_rank() -> None:
    assert {m.rank for m in tezo_ds.initialize(tiny(), {"method": "mezo"}).space.matrices} == {16}


def test_it_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "tezo_ds"):
        tezo_ds.initialize(tiny(), {"rank": RANK})
    (said,) = [r.getMessage() for r in caplog.records if "is above min(m, n)" in r.getMessage()]
    assert said.startswith("config: rank 12 is above min(m, n) in 4 of 15 matr") and SMALL in said
    caplog.clear()
    tezo_ds.initialize(tiny(), {"rank": 10})
    assert "is above min(m, n)" not in caplog.text


@pytest.mark.parametrize(("threshold", "bound"), [(1e-9, True), (0.9, False)])
def test_auto_says_when_it_chose_nothing(
    threshold: float, bound: bool, caplog: pytest.LogCaptureFixture
) -> None:
    config = {"rank": "auto", "rank_max": 4, "rank_threshold": threshold}
    with caplog.at_level(logging.WARNING, "tezo_ds"):
        tezo_ds.initialize(tiny(), config)
    assert ("rank auto chose nothing: all 15 matrices" in caplog.text) == bound


def test_files_of_a_run_have_the_lower_ranks(
    given: Given, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(tmp_path / "run")
    assert call(*given.train(run.path, rank=RANK, steps=2)) == 0
    assert "warning: rank 12 is above min(m, n)" in capsys.readouterr().out
    ranks = run.config["ranks"]
    assert {len(a) for a in run.coefficients.values()} == set(ranks.values())
    assert {name: len(a) for name, a in run.coefficients.items()} == ranks
    adapter = json.loads((run.path / "adapter" / "adapter_config.json").read_text())
    assert adapter["r"] == 12 and not adapter["rank_pattern"], "padded to one rank"
    assert call(*given.train(run.path, rank=RANK, steps=3)) == 0  # goes on
    assert call("evaluate", "--run", run.path) == 0
