"""Runs that fit inner layers: what they say and keep, the second fit of the output layer, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from command_line import Given, Run, assert_found_again, call
from test_runs import FIT, terms

from tezo_ds.output_layer.fit import Choice
from tezo_ds.output_layer.problem import States
from tezo_ds.output_layer.states import collect
from tezo_ds.output_layer.term import BIAS, WEIGHT
from tezo_ds.training import output_layer

pytest_plugins = ("cli_fixtures",)

Captured = pytest.CaptureFixture[str]


def test_the_output_layer_is_fitted_to_what_inner_layers_make_of_its_states(
    untied: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[States] = []

    def collected(*given: Any, **named: Any) -> States:
        seen.append(collect(*given, **named))
        return seen[-1]

    monkeypatch.setattr(output_layer, "collect", collected)
    options = {**FIT, "steps": 1, "inner_layers": "layers:0-1"}
    assert call(*untied.train(tmp_path / "run", **options)) == 0
    found = Run(tmp_path / "run").summary["output_layer"]
    (term,) = terms(tmp_path / "run").values()
    before, after = seen
    assert (after.logits - before.logits).abs().max() > 1e-3 and not after.inner
    weight, bias = (term[name].double().requires_grad_() for name in (WEIGHT, BIAS))
    logits = after.logits + after.hidden.double() @ weight.t() + bias
    loss = F.cross_entropy(logits, after.truth) + found["ridge"] * weight.square().sum()
    slopes = torch.autograd.grad(loss, (weight, bias))
    assert all(float(slope.abs().max()) < 1e-4 for slope in slopes)


@pytest.mark.parametrize("better", [True, False])
def test_auto_measures_what_terms_are_worth_that_it_foresees_a_gain_of(
    better: bool, untied: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[States] = []
    asked: list[tuple[Choice, Choice]] = []

    def collected(*given: Any, **named: Any) -> States:
        seen.append(collect(*given, **named))
        return seen[-1]

    def gained(less: Choice, more: Choice) -> tuple[float, float]:
        asked.append((less, more))
        return (2.0, 1.0) if better or len(asked) == 1 else (1.0, 2.0)

    monkeypatch.setattr(output_layer, "collect", collected)
    monkeypatch.setattr(output_layer, "gain", gained)
    options = {**FIT, "steps": 1, "inner_layers": "auto", "inner_maps": "values"}
    assert call(*untied.train(tmp_path / "run", **options)) == 0
    (without, foreseen), (_, measured) = asked
    found = Run(tmp_path / "run").summary["output_layer"]
    assert bool(found["inner_layers"]) == better
    assert found["held_out_loss_after"] == (measured if better else without).after.loss
    # By hand: A of the examples that are not held out, ΔW and b of the same, what the others lose.
    states = seen[1]
    assert (states.logits - seen[0].logits).abs().max() > 1e-3 and not states.inner
    weight, bias = (x.double().requires_grad_() for x in measured._problem.solution(measured._x)[0])
    logits = states.logits + states.hidden.double() @ weight.t() + bias
    losses = F.cross_entropy(logits, states.truth, reduction="none")
    assert float(losses[states.held].mean()) == pytest.approx(measured.after.loss, abs=1e-6)
    loss = losses[~states.held].mean() + foreseen.strength * weight.square().sum()
    assert all(float(x.abs().max()) < 1e-3 for x in torch.autograd.grad(loss, (weight, bias)))
    assert measured.strength == foreseen.strength and len(seen) == (3 if better else 2)
    if better:
        assert not torch.equal(seen[2].logits, states.logits)  # of A by all examples


@pytest.mark.parametrize(
    ("chosen", "maps"),
    [("auto", "last"), ("layers:0-1", "last"), ("auto", "values"), ("layers:0-1", "values")],
)
def test_a_run_with_inner_layers(
    untied: Given, chosen: str, maps: str, tmp_path: Path, capsys: Captured
) -> None:  # fmt: skip
    options = {**FIT, "steps": 2, "inner_layers": chosen, "inner_maps": maps}
    assert call(*untied.train(tmp_path / "run", **options)) == 0
    run, out = Run(tmp_path / "run"), capsys.readouterr().out
    found = run.summary["output_layer"]
    paths = found["inner_layers"]
    assert f"with a term of {' and '.join(paths) or 'no inner layer'}" in out
    assert "inner_maps (for" not in out
    plain = {**options, "inner_layers": "none", "inner_maps": "last"}
    assert call(*untied.train(tmp_path / "fit", **plain)) == 0
    alone = Run(tmp_path / "fit").summary["output_layer"]
    if chosen == "auto":
        assert found["held_out_loss_after"] <= alone["held_out_loss_after"] + 1e-6
    else:
        assert len(paths) == 2 and all(("v_proj" in path) == (maps == "values") for path in paths)
    assert "inner_layers" not in alone and found["bytes_of_states"] > alone["bytes_of_states"]
    capsys.readouterr()
    assert_found_again(run, capsys, 1e-6)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"output_layer": "bias", "objective": "choices"}, "set that, too"),
        ({"output_layer": "fit", "objective": "lm"}, "add --objective choices"),
        ({**FIT, "inner_layers": "layers:9"}, "their indices are 0 to"),
        ({**FIT, "trunk_cache": "memory", "include": "last:1"}, "leave one of them off"),
    ],
)
def test_inner_layers_are_refused_in_a_line(
    given: Given, tmp_path: Path, capsys: Captured, options: dict[str, Any], what: str
) -> None:
    options = {"inner_layers": "last:1", **options}
    assert call(*given.train(tmp_path / "run", **options)) != 0
    error = capsys.readouterr().err
    assert "inner_layers: " in error and what in " ".join(error.split())
